"""The embedded Redis of several processes on one folder: its owner, and those that attach to it."""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import sys
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from imagegen.errors import SettingsError
from imagegen.redis_client import embedded
from imagegen.redis_client.embedded import EmbeddedRedis
from imagegen.redis_client.server_binary import find_binary
from tests.queue.embedded_servers import Servers, gone, got, put, the_only
from tests.support import eventually, logged

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a child with its parent")


@linux_only
async def test_the_server_dies_with_its_killed_parent_and_its_data_remains(servers: Servers, tmp_path: Path) -> None:
    process, pid = await servers.other_process(tmp_path)
    attached = await servers.start(tmp_path)
    assert attached.pid is None
    await put(attached, "stored")
    process.kill()
    await eventually(lambda: gone(pid))
    next_one = await servers.start(tmp_path)
    assert next_one.pid
    assert await got(next_one) == "stored"


@linux_only
async def test_a_start_right_after_a_kill_runs_a_server_of_its_own(servers: Servers, tmp_path: Path) -> None:
    for number in range(5):
        process, _ = await servers.other_process(tmp_path)
        process.kill()
        await process.wait()
        next_one = await servers.start(tmp_path)
        assert next_one.pid, "the server of the killed process still answers for a moment"
        await put(next_one, str(number))
        assert await got(next_one) == str(number)
        await next_one.stop()


async def test_a_second_process_attaches_and_exits_without_harm(servers: Servers, tmp_path: Path) -> None:
    owner = await servers.start(tmp_path)
    attached = await servers.start(tmp_path)
    assert owner.pid
    assert attached.pid is None
    assert attached.url == owner.url
    await put(attached, "shared")
    await attached.stop()
    assert await got(owner) == "shared"


async def test_a_deleted_lock_file_starts_no_second_server_on_the_data(servers: Servers, tmp_path: Path) -> None:
    owner = await servers.start(tmp_path)
    the_only(tmp_path, "*/lock").unlink()
    attached = await servers.start(tmp_path)
    assert attached.pid is None
    await put(attached, "shared")
    assert await got(owner) == "shared"


@pytest.mark.usefixtures("temporary")
@pytest.mark.parametrize("is_long", [False, True])
async def test_a_deleted_socket_is_made_again_with_the_data(
    servers: Servers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, is_long: bool
) -> None:
    monkeypatch.setattr(embedded, "_FOLDER_LOOK_S", 0.05)
    owner = await servers.start(tmp_path / ("data" * (30 if is_long else 1)), watched=True)
    await put(owner, "stored")
    looks = asyncio.create_task(owner.watch_folder())
    (socket := Path(unquote(owner.url.removeprefix("unix://")))).unlink()
    if is_long:
        socket.parent.rmdir()
    try:
        await eventually(socket.exists)
        await eventually(lambda: got(owner))
        assert await got(owner) == "stored"
    finally:
        looks.cancel()


def open_to_others(socket: Path) -> None:
    """Replace the folder of a socket by one that others can read."""
    socket.unlink()
    socket.parent.rmdir()
    socket.parent.mkdir(mode=0o755)


@pytest.mark.usefixtures("temporary")
async def test_a_server_is_not_started_again_behind_a_socket_in_the_folder_of_another_user(
    servers: Servers, tmp_path: Path
) -> None:
    with logged("ERROR") as lines:
        owner = await servers.start(tmp_path / ("data" * 30), watched=True)
        await put(owner, "stored")
        socket, server = Path(unquote(owner.url.removeprefix("unix://"))), owner.pid
        assert server
        open_to_others(socket)
        os.kill(server, signal.SIGKILL)
        await eventually(lambda: lines)
    assert f"{socket.parent} is not yours alone" in lines[0]
    assert not list(socket.parent.iterdir())
    socket.parent.chmod(0o700)
    await eventually(lambda: got(owner))


async def test_a_socket_that_can_not_be_looked_at_ends_no_server(
    servers: Servers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "_FOLDER_LOOK_S", 0.02)
    owner = await servers.start(tmp_path)
    socket, lstat, looks_at = unquote(owner.url.removeprefix("unix://")), os.lstat, list[Path]()

    def failing(path: Path, **options: Any) -> os.stat_result:
        if str(path) == socket:
            looks_at.append(path)
            raise PermissionError
        return lstat(path, **options)

    monkeypatch.setattr(os, "lstat", failing)
    monkeypatch.setattr(Path, "lstat", failing)
    looks = asyncio.create_task(owner.watch_folder())
    await eventually(lambda: len(looks_at) > 2)
    looks.cancel()
    await put(owner, "stored")
    assert await got(owner) == "stored"


async def test_only_one_of_many_concurrent_starts_runs_the_server(servers: Servers, tmp_path: Path) -> None:
    started = await asyncio.gather(*(servers.start(tmp_path) for _ in range(4)))
    assert len([server for server in started if server.pid]) == 1
    await put(started[0], "shared")
    assert [await got(server) for server in started] == ["shared"] * 4


async def test_an_attached_process_takes_over_when_the_owner_exits(servers: Servers, tmp_path: Path) -> None:
    owner = await servers.start(tmp_path)
    left = [await servers.start(tmp_path, watched=True) for _ in range(3)]
    await put(owner, "stored")
    await owner.stop()
    await eventually(lambda: got(left[0]))
    assert [await got(server) for server in left] == ["stored"] * 3
    assert len([server for server in left if server.pid]) == 1


@linux_only
async def test_an_attached_process_takes_over_when_the_owner_is_killed(servers: Servers, tmp_path: Path) -> None:
    process, pid = await servers.other_process(tmp_path)
    attached = await servers.start(tmp_path, watched=True)
    await put(attached, "stored")
    process.kill()
    await eventually(lambda: attached.pid)
    await eventually(lambda: got(attached))
    assert await got(attached) == "stored"
    assert gone(pid)


async def test_the_owner_restarts_a_killed_server_and_clients_stay_attached(servers: Servers, tmp_path: Path) -> None:
    owner = await servers.start(tmp_path, watched=True)
    attached = await servers.start(tmp_path, watched=True)
    await put(attached, "stored")
    assert owner.pid
    os.kill(owner.pid, signal.SIGKILL)
    await eventually(lambda: got(attached))
    assert owner.pid
    assert attached.pid is None


async def test_a_lock_without_a_server_times_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imagegen.redis_client.embedded._SILENT_S", 0.1)
    folder = tmp_path / f"valkey-{find_binary().version[0]}"
    folder.mkdir()
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(SettingsError, match=r"^DATA_DIR: another process holds .* does not answer"):
            await EmbeddedRedis(tmp_path).start()
