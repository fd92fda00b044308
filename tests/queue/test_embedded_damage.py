"""Damaged data of the embedded Redis: a cut tail, a missing manifest, a folder that was deleted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from redis.asyncio import Redis

from imagegen.errors import SettingsError
from imagegen.redis_client.aof_repair import repair, whole_bytes
from imagegen.redis_client.embedded import EmbeddedRedis
from tests.queue.embedded_servers import Servers, put, the_only
from tests.support import eventually, logged


async def test_broken_data_stops_the_start(servers: Servers, tmp_path: Path) -> None:
    server = await servers.start(tmp_path)
    await put(server, "stored")
    await server.stop()
    the_only(tmp_path, "*/appendonlydir/*.base.rdb").write_text("nonsense")
    with pytest.raises(SettingsError, match=r"^DATA_DIR: .*can't work in[\s\S]*AOF"):
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


def _first_line(manifest: Path) -> None:
    manifest.write_text(manifest.read_text().splitlines(keepends=True)[0])


DAMAGES: dict[str, Callable[[Path], object]] = {
    "gone": Path.unlink,
    "empty": lambda manifest: manifest.write_bytes(b""),
    "zeros": lambda manifest: manifest.write_bytes(bytes(manifest.stat().st_size)),
    "cut within a line": lambda manifest: manifest.write_bytes(manifest.read_bytes()[:-20]),
    "cut between lines": _first_line,
    "garbage": lambda manifest: manifest.write_bytes(b"\xff\xfe nonsense"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
async def test_a_lost_or_damaged_manifest_is_written_again_if_its_files_are_certain(
    tmp_path: Path, warnings: list[str], damage: Callable[[Path], object]
) -> None:
    await _written(tmp_path, 50)
    damage(the_only(tmp_path, "*/appendonlydir/*.manifest"))
    server = EmbeddedRedis(tmp_path)
    await server.start()
    async with Redis.from_url(server.url) as redis:
        assert await redis.get("key49")
    await server.stop()
    assert len([line for line in warnings if "the manifest was written again" in line]) == 1


async def test_data_that_a_damaged_manifest_lacks_is_not_overwritten(tmp_path: Path) -> None:
    path = await _written(tmp_path, 50)
    written = path.read_bytes()
    manifest = the_only(tmp_path, "*/appendonlydir/*.manifest")
    kept = manifest.read_bytes()
    further = path.with_name(path.name.replace(".1.incr", ".2.incr"))
    further.write_bytes(written)
    for damaged in (b"", kept.splitlines(keepends=True)[0], kept):
        manifest.write_bytes(damaged)
        with pytest.raises(SettingsError, match=r"^DATA_DIR: .* appendonly.aof.manifest .* Put back"):
            await EmbeddedRedis(tmp_path).start()
    assert path.read_bytes() == further.read_bytes() == written
    further.unlink()
    server = EmbeddedRedis(tmp_path)
    await server.start()
    async with Redis.from_url(server.url) as redis:
        assert await redis.get("key49")
    await server.stop()


async def test_an_empty_base_is_not_taken_for_no_data(tmp_path: Path) -> None:
    server = EmbeddedRedis(tmp_path)
    await server.start()
    async with Redis.from_url(server.url) as redis:
        await redis.set("kept", 1)
        await redis.bgrewriteaof()
        await eventually(lambda: list(tmp_path.glob("*/appendonlydir/*.2.base.rdb")))
        await eventually(lambda: not list(tmp_path.glob("*/appendonlydir/*.1.*")))
    await server.stop()
    the_only(tmp_path, "*/appendonlydir/*.base.rdb").write_bytes(b"")
    with pytest.raises(SettingsError, match=r"^DATA_DIR: .*base.rdb is empty"):
        await EmbeddedRedis(tmp_path).start()


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
