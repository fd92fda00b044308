"""Tests of image bytes in Redis: parts, expiry, the cap, the cost of an image, and an unreachable Redis."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import pytest

from imagegen.errors import QueueUnavailable
from imagegen.images.redis_blobs import PART_BYTES, RedisBlobStore
from imagegen.redis_client.connection import Connection
from imagegen.redis_client.keys import Keys
from imagegen.tasks.image import StoredImage

TASK = "0123456789abcdef0123456789abcdef"


@pytest.fixture
async def connection(redis_url: str) -> AsyncIterator[Connection]:
    connection = Connection(redis_url)
    yield connection
    await connection.close()


@pytest.fixture
async def away() -> AsyncIterator[RedisBlobStore]:
    async with AsyncExitStack() as stack:
        connection = Connection("redis://127.0.0.1:1")
        stack.push_async_callback(connection.close)
        yield RedisBlobStore(connection, Keys("away"), 1000)


def stored_image(index: int, size_bytes: int) -> StoredImage:
    return StoredImage(index, "image/png", size_bytes, 8, 8, f"{index:02x}" * 32)


def later() -> float:
    return time.time() + 60


async def got(port: RedisBlobStore, image: StoredImage) -> bytes | None:
    """Return all bytes of an image, None if some are missing."""
    data = b"".join([piece async for piece in port.get(TASK, image, 0, image.size_bytes)])
    return data if len(data) == image.size_bytes else None


async def test_a_large_image_is_stored_in_parts_and_loaded_whole(connection: Connection, prefix: str) -> None:
    port = RedisBlobStore(connection, Keys(prefix), 10 * PART_BYTES)
    data = b"start" + bytes(2 * PART_BYTES) + b"end"
    image = stored_image(0, len(data))
    await port.put(TASK, image, data, later())
    assert await got(port, image) == data
    keys = sorted(await connection.commands.keys(f"{{{prefix}}}:picture:*"))
    assert [await connection.commands.strlen(key) for key in keys] == [PART_BYTES, PART_BYTES, 8]
    await connection.commands.delete(keys[1])
    assert await got(port, image) is None
    assert not await port.contains_all(TASK, [image])


async def test_every_key_expires_and_the_index_outlives_the_images(connection: Connection, prefix: str) -> None:
    port = RedisBlobStore(connection, Keys(prefix), 1000)
    for index, life_s in enumerate((60, 200, 100)):
        await port.put(TASK, stored_image(index, 100), bytes(100), time.time() + life_s)
    ends = {key: await connection.commands.pttl(key) / 1000 for key in await connection.commands.keys(f"*{prefix}*")}
    of_index = Keys(prefix).image_index.encode()
    assert all(0 < end <= 200 for key, end in ends.items() if key != of_index)
    assert 390 < ends[of_index] <= 400


async def test_a_lost_index_gets_its_expiry_again(connection: Connection, prefix: str) -> None:
    port = RedisBlobStore(connection, Keys(prefix), 1000)
    await port.put(TASK, stored_image(0, 100), bytes(100), later())
    await connection.commands.delete(Keys(prefix).image_index)
    await port.put(TASK, stored_image(1, 100), bytes(100), time.time() + 30)
    assert await connection.commands.pttl(Keys(prefix).image_index) > 60_000


async def test_two_instances_share_a_cap_and_evict_the_oldest(
    connection: Connection, redis_url: str, prefix: str
) -> None:
    other = Connection(redis_url)
    ports = [RedisBlobStore(each, Keys(prefix), 1000) for each in (connection, other)]
    images = [stored_image(index, 240) for index in range(8)]
    for index, image in enumerate(images):
        await ports[index % 2].put(TASK, image, bytes(240), later())
    there = [await ports[0].contains_all(TASK, [image]) for image in images]
    await other.close()
    assert there == [False] * 4 + [True] * 4
    assert len(await connection.commands.keys(f"{{{prefix}}}:picture:*")) == 4


async def test_an_eviction_frees_space_for_the_next_images(connection: Connection, prefix: str) -> None:
    port = RedisBlobStore(connection, Keys(prefix), 1600)
    for index in range(33):
        await port.put(TASK, stored_image(index, 50), bytes(50), later())
    assert await connection.commands.zcard(Keys(prefix).image_index) == 1 + 30


async def test_the_count_of_bytes_stays_true(connection: Connection, prefix: str) -> None:
    port, keys = RedisBlobStore(connection, Keys(prefix), 100_000), Keys(prefix)
    for _ in range(2):
        for index in range(1, 300):
            await port.put(TASK, stored_image(index % 256, index), bytes(index), later())
    total = await connection.commands.zscore(keys.image_index, "total")
    members: Any = await connection.commands.zrange(keys.image_index, 1, -1)
    assert total == -sum(int(member.rpartition(b":")[2]) for member in members)
    small = RedisBlobStore(connection, keys, 10)
    await small.put(TASK, stored_image(0, 50), bytes(50), later())
    assert await connection.commands.zrange(keys.image_index, 0, -1, withscores=False) == [
        b"total",
        f"{TASK}:0:000000000000:50".encode(),
    ]
    assert await connection.commands.zscore(keys.image_index, "total") == -50
    assert len(await connection.commands.keys(f"{{{prefix}}}:picture:*")) == 1


async def test_an_image_costs_four_commands_to_put_and_one_to_read(connection: Connection, prefix: str) -> None:
    port = RedisBlobStore(connection, Keys(prefix), 1000)
    for index in range(2):
        await port.put(TASK, stored_image(index, 9), bytes(9), time.time() + 60 + index)
    spent = connection.meter.commands
    await connection.commands.config_resetstat()
    spent.clear()
    await port.put(TASK, stored_image(2, 9), bytes(9), later())
    assert await billed(connection) == {"evalsha": 1, "zadd": 1, "zincrby": 1, "set": 1}
    assert spent == {"pictures": 4}
    await connection.commands.config_resetstat()
    assert await got(port, stored_image(2, 9)) == bytes(9)
    assert await port.contains_all(TASK, [stored_image(index, 9) for index in range(3)])
    await port.extend_expiry(TASK, [stored_image(2, 9)], later())
    assert await billed(connection) == {"get": 1, "exists": 1, "pexpireat": 1}
    assert spent == {"pictures": 7}


async def test_evictions_are_metered(connection: Connection, prefix: str) -> None:
    port = RedisBlobStore(connection, Keys(prefix), 1000)
    for index in range(220):
        await port.put(TASK, stored_image(index, 4), bytes(4), time.time() + 60 - index / 10)
    await connection.commands.config_resetstat()
    connection.meter.commands.clear()
    await port.put(TASK, stored_image(220, 990), bytes(990), later() - 30)
    assert sum((await billed(connection)).values()) == connection.meter.commands["pictures"]
    assert await connection.commands.zcard(Keys(prefix).image_index) == 2


async def billed(connection: Connection) -> dict[str, int]:
    """Return the commands since the last reset, including those of scripts."""
    stats = await connection.commands.info("commandstats")
    calls = {name.removeprefix("cmdstat_"): numbers["calls"] for name, numbers in stats.items()}
    return {name: count for name, count in calls.items() if name not in {"config|resetstat", "info", "ping"}}


async def test_an_unreachable_redis_is_reported_unavailable(away: RedisBlobStore) -> None:
    image = stored_image(0, 9)
    for call in (
        away.put(TASK, image, bytes(9), later()),
        got(away, image),
        away.contains_all(TASK, [image]),
        away.extend_expiry(TASK, [image], later()),
    ):
        with pytest.raises(QueueUnavailable):
            await call


async def test_reusing_an_image_costs_two_commands_a_part_and_four(connection: Connection, prefix: str) -> None:
    port = RedisBlobStore(connection, Keys(prefix), 10 * PART_BYTES)
    image = stored_image(0, PART_BYTES + 1)
    await port.put(TASK, image, bytes(image.size_bytes), later())
    before = connection.meter.commands["pictures"]
    assert await port.reuse(TASK, image, "f" * 32, 0, later())
    assert connection.meter.commands["pictures"] - before == 2 * 2 + 4


async def test_an_image_is_reused_although_redis_may_not_copy(
    connection: Connection, redis_url: str, prefix: str
) -> None:
    await connection.commands.execute_command("ACL", "SETUSER", prefix, "on", ">secret", "~*", "&*", "+@all", "-copy")
    limited = Connection(redis_url.replace("://", f"://{prefix}:secret@"))
    port = RedisBlobStore(limited, Keys(prefix), 10 * PART_BYTES)
    image, other = stored_image(0, PART_BYTES + 1), "f" * 32
    await port.put(TASK, image, bytes(image.size_bytes), later())
    assert await port.reuse(TASK, image, other, 0, later())
    assert b"".join([piece async for piece in port.get(other, image, 0, image.size_bytes)]) == bytes(image.size_bytes)
    assert not await port.reuse("e" * 32, image, other, 0, later())  # there is none
    await limited.close()


async def test_an_index_of_another_type_is_renamed_and_no_image_is_lost(connection: Connection, prefix: str) -> None:
    keys = Keys(prefix)
    await connection.commands.set(keys.image_index, "of another program")
    port = RedisBlobStore(connection, keys, 1000)
    await port.put(TASK, stored_image(0, 9), bytes(9), later())
    assert await got(port, stored_image(0, 9)) == bytes(9)
    assert await connection.commands.get(f"{keys.image_index}:aside") == b"of another program"
    assert await connection.commands.zscore(keys.image_index, "total") == -9


async def test_a_foreign_member_of_the_index_is_no_image(connection: Connection, prefix: str) -> None:
    keys = Keys(prefix)
    port = RedisBlobStore(connection, keys, 100)
    await connection.commands.zadd(keys.image_index, {b"\xff:of another:program": 1.0, b"x:y:-5": 2.0})
    for index in range(5):
        await port.put(TASK, stored_image(index, 60), bytes(60), later())
    assert await got(port, stored_image(4, 60)) == bytes(60)
    assert await connection.commands.zrange(keys.image_index, 0, -1) == [
        b"total",
        f"{TASK}:4:040404040404:60".encode(),
    ]


async def test_a_part_of_another_type_is_gone(connection: Connection, prefix: str) -> None:
    port = RedisBlobStore(connection, Keys(prefix), 100)
    await port.put(TASK, stored_image(0, 9), bytes(9), later())
    (part,) = await connection.commands.keys(f"{{{prefix}}}:picture:*")
    await connection.commands.delete(part)
    await connection.commands.rpush(part, "of another program")
    assert await got(port, stored_image(0, 9)) is None
