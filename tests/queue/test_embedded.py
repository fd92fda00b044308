"""The embedded Redis of one process, with real servers: starts, stops, and restarts after a crash."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from msgspec.structs import replace
from redis.asyncio import Redis
from redis.exceptions import RedisError

from imagegen.backoff import Backoff
from imagegen.errors import SettingsError
from imagegen.redis_client import embedded
from imagegen.redis_client.embedded import EmbeddedRedis
from tests.queue.embedded_servers import MakeProgram, Servers, client, gone, got, put, the_only
from tests.support import eventually


async def got_pong(server: EmbeddedRedis) -> bool:
    try:
        async with client(server) as redis:
            return bool(await redis.ping())
    except (RedisError, OSError):
        return False


async def test_the_server_answers_quickly_and_persists_every_write(servers: Servers, tmp_path: Path) -> None:
    began_at = time.monotonic()
    server = await servers.start(tmp_path)
    assert time.monotonic() - began_at < 10.0
    async with client(server) as redis:
        shown = await redis.config_get("appendonly", "appendfsync", "maxmemory-policy", "port", "save")
    expected = {
        "appendonly": "yes",
        "appendfsync": "everysec",
        "maxmemory-policy": "noeviction",
        "port": "0",
        "save": "",
    }
    assert shown == expected
    assert the_only(tmp_path, "valkey-*").stat().st_mode & 0o777 == 0o700


async def test_data_survives_a_stop_and_a_start(servers: Servers, tmp_path: Path) -> None:
    first = await servers.start(tmp_path)
    await put(first, "stored")
    await first.stop()
    assert await got(first) is None
    assert await got(await servers.start(tmp_path)) == "stored"


async def test_ctrl_c_in_the_terminal_does_not_reach_the_server(servers: Servers, tmp_path: Path) -> None:
    server = await servers.start(tmp_path)
    assert server.pid
    assert os.getsid(server.pid) != os.getsid(0)


async def test_a_long_and_odd_path_works(servers: Servers, tmp_path: Path) -> None:
    server = await servers.start(tmp_path / 'it\'s 10% "odd" 图' / ("x" * 120))
    await put(server, "stored")
    assert await got(server) == "stored"


async def test_a_system_without_a_free_process_is_not_called_a_matter_of_rights(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def no_process(*_arguments: object, **_options: object) -> None:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(subprocess, "Popen", no_process)
    with pytest.raises(SettingsError, match=r"can't be used \(Resource temporarily unavailable\)\. Remove the cause"):
        await EmbeddedRedis(tmp_path).start()


async def test_a_shared_temporary_socket_folder_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / f"imagegen-{os.getuid()}").mkdir(mode=0o777)
    (tmp_path / f"imagegen-{os.getuid()}").chmod(0o777)
    with pytest.raises(SettingsError, match="Set a shorter DATA_DIR"):
        await EmbeddedRedis(tmp_path / ("x" * 120)).start()


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EIO])
async def test_a_server_runs_in_a_folder_of_a_disk_without_sockets(
    temporary: Path, servers: Servers, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, number: int
) -> None:
    """FAT and exFAT refuse them with EPERM, SMB with EOPNOTSUPP; some file systems of FUSE have no mknod (ENOSYS)."""

    class Socketless(socket.socket):
        def bind(self, address: Any) -> None:
            if str(tmp_path / "disk") in os.fsdecode(address):
                raise OSError(number, os.strerror(number))
            super().bind(address)

    monkeypatch.setattr(socket, "socket", Socketless)
    first = await servers.start(tmp_path / "disk")
    second = await servers.start(tmp_path / "disk")
    assert first.url == second.url
    assert str(temporary) in unquote(first.url)
    await put(first, "stored")
    assert await got(second)
    assert {path.name for path in the_only(tmp_path, "disk/*").iterdir()} == {"appendonlydir", "lock", "server.log"}


async def test_a_server_runs_though_the_data_folder_and_the_temporary_one_have_long_names(
    temporary: Path, servers: Servers, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(embedded, "_SHORT_TEMPORARY", str(temporary))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("t" * 120)))
    server = await servers.start(tmp_path / ("x" * 120))
    assert str(temporary) in unquote(server.url)
    await put(server, "stored")
    assert await got(server)


async def test_an_unusable_folder_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match=r"^DATA_DIR: .*Not a directory.* set another DATA_DIR"):
        await EmbeddedRedis(tmp_path / "file").start()


async def test_the_log_size_is_limited(servers: Servers, tmp_path: Path) -> None:
    server = await servers.start(tmp_path)
    await server.stop()
    log = the_only(tmp_path, "*/server.log")
    with log.open("ab") as file:
        file.write(b"x" * 2**21)
    await servers.start(tmp_path)
    assert log.stat().st_size < 10_000
    assert b"Ready to accept connections" in log.read_bytes()


async def test_a_killed_server_is_started_at_once_and_returns_with_its_data(
    servers: Servers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses_s, next_s = list[float](), Backoff.next_s

    def recorded(backoff: Backoff) -> float:
        pauses_s.append(next_s(backoff))
        return pauses_s[-1]

    monkeypatch.setattr(Backoff, "next_s", recorded)
    server = await servers.start(tmp_path, watched=True)
    for value in ("first", "second", "third"):
        await put(server, value)
        assert server.pid
        os.kill(server.pid, signal.SIGKILL)
        await eventually(lambda: got(server))
        assert await got(server) == value
    assert (len(pauses_s), sum(pauses_s) < 0.2) == (3, True)


async def test_a_server_that_dies_again_and_again_is_one_line_a_minute(
    servers: Servers, tmp_path: Path, log_lines: list[str]
) -> None:
    server = await servers.start(tmp_path, watched=True)
    for _ in range(4):
        assert server.pid
        os.kill(server.pid, signal.SIGKILL)
        await eventually(partial(gone, server.pid))
        await eventually(lambda: got_pong(server))
    assert len([line for line in log_lines if "died with code -9" in line]) == 1
    assert len([line for line in log_lines if "The embedded Redis runs" in line]) == 2


async def test_a_cut_connection_does_not_restart_the_server(servers: Servers, tmp_path: Path) -> None:
    server = await servers.start(tmp_path, watched=True)
    before = server.pid

    async def watched_again() -> bool:
        async with client(server) as redis:
            return len(await redis.client_list()) == 2

    await eventually(watched_again)
    async with client(server) as redis:
        await redis.client_kill_filter(_type="normal", skipme=True)
    await eventually(watched_again)
    assert server.pid == before


async def test_restarts_are_retried_while_the_server_cannot_start(
    servers: Servers, tmp_path: Path, make_program: MakeProgram, log_lines: list[str]
) -> None:
    server = await servers.start(tmp_path, watched=True)
    await put(server, "stored")
    assert server.pid
    good = server._binary
    tries = tmp_path / "tries"
    broken = make_program("valkey-server", "Valkey server v=9.1.2", f"echo x >> {tries}; echo 'disk full'; exit 1")
    server._binary = replace(good, path=str(broken))

    def tried(times: int) -> bool:
        return tries.exists() and len(tries.read_text()) > 2 * times

    os.kill(server.pid, signal.SIGKILL)
    await eventually(lambda: tried(2))
    assert len([line for line in log_lines if "does not come back" in line and "disk full" in line]) == 1
    server._binary = good
    await eventually(lambda: got(server))


async def test_a_frozen_server_is_not_waited_for_and_keeps_what_it_has_answered(
    servers: Servers, tmp_path: Path
) -> None:
    server = await servers.start(tmp_path)
    async with Redis.from_url(server.url) as redis:
        await redis.set("kept", "yes")
    assert server.pid is not None
    os.kill(server.pid, signal.SIGSTOP)
    began = time.monotonic()
    await server.stop()
    assert time.monotonic() - began < 9  # a server that answers gets 10 s
    again = await servers.start(tmp_path)
    async with Redis.from_url(again.url) as redis:
        assert await redis.get("kept") == b"yes"
