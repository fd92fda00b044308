"""Shared rate limit windows: exact over instances, all or nothing, by the server's clock, and cheap."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack

import pytest

from imagegen.errors import QueueUnavailable
from imagegen.ratelimit.redis import RedisRateLimitStore
from imagegen.ratelimit.stores import LimitState, RateLimitStore, Window
from imagegen.redis_client.connection import Connection
from imagegen.redis_client.keys import Keys
from tests.support import eventually

MakeWindows = Callable[..., RedisRateLimitStore]


@pytest.fixture
async def connection(redis_url: str) -> AsyncIterator[Connection]:
    connection = Connection(redis_url)
    yield connection
    await connection.close()


@pytest.fixture
async def make_windows(redis_url: str, prefix: str) -> AsyncIterator[MakeWindows]:
    """Return a factory: each call makes the windows of another instance."""
    async with AsyncExitStack() as stack:

        def make(connection: Connection | None = None) -> RedisRateLimitStore:
            if connection is None:
                connection = Connection(redis_url)
                stack.push_async_callback(connection.close)
            return RedisRateLimitStore(connection, Keys(prefix))

        yield make


def admitted(standings: list[list[LimitState]]) -> int:
    return sum(all(retry_s == 0 for _, _, retry_s in standing) for standing in standings)


def test_the_class_implements_the_protocol_of_the_web_layer(make_windows: MakeWindows) -> None:
    _: RateLimitStore = make_windows()


@pytest.mark.parametrize("limit", [7, 150])
async def test_a_storm_over_two_instances_is_admitted_exactly_to_the_limit(
    make_windows: MakeWindows, limit: int
) -> None:
    instances = [make_windows(), make_windows()]
    window = Window("general:a", limit, 60.0)
    hits = [instance.hit([window], 1) for _ in range(limit + 25) for instance in instances]
    began = time.monotonic()
    standings = await asyncio.gather(*hits)
    took_s = time.monotonic() - began
    assert admitted(standings) == limit
    assert min(standing[0][0] for standing in standings) == 0
    assert all(59 - took_s < retry_s <= 61 for [(_, _, retry_s)] in standings if retry_s)


async def test_a_hit_spends_from_all_its_windows_or_not_at_all(make_windows: MakeWindows) -> None:
    windows = make_windows()
    general, generation = Window("general:a", 10, 60.0), Window("generation:a", 2, 60.0)
    both = await asyncio.gather(*(windows.hit([general, generation], 1) for _ in range(5)))
    assert admitted(both) == 2
    assert [(standing[0][0], standing[0][2]) for standing in both[2:]] == [(8, 0.0)] * 3
    assert (await windows.hit([general], 1))[0][0] == 7


async def test_each_client_has_its_own_window(make_windows: MakeWindows) -> None:
    windows = make_windows()
    hits = [
        windows.hit([Window(f"general:{client}", 1, 60.0)], 1) for client in ("a", "b", "2001:db8::1") for _ in range(2)
    ]
    assert admitted(await asyncio.gather(*hits)) == 3


async def test_a_cost_over_what_is_left_spends_nothing(make_windows: MakeWindows) -> None:
    windows, window = make_windows(), Window("general:a", 5, 60.0)
    assert (await windows.hit([window], 6))[0] == (5, 0.0, 60.0)
    first, second = await asyncio.gather(*(windows.hit([window], 3) for _ in range(2)))
    assert first == [(2, 60.0, 0.0)]
    assert second == [(2, 60.0, 60.0)]
    assert (await windows.hit([window], 2))[0][0] == 0


@pytest.mark.parametrize("limit", [2, 200])
async def test_the_budget_returns_when_the_window_has_moved_on(make_windows: MakeWindows, limit: int) -> None:
    windows, window = make_windows(), Window("general:a", limit, 0.3)
    _, [(_, _, retry_s)] = await asyncio.gather(windows.hit([window], limit), windows.hit([window], 1))
    assert 0 < retry_s <= 0.31
    await asyncio.sleep(retry_s + 0.002)
    left, reset_s, retry_s = (await windows.hit([window], 1))[0]
    assert (left, retry_s) == (limit - 1, 0.0)
    assert 0 < reset_s <= 0.31


async def test_a_key_expires_with_its_window_and_stays_short(
    connection: Connection, make_windows: MakeWindows, prefix: str
) -> None:
    windows = make_windows()
    for _ in range(10):
        await asyncio.gather(*(windows.hit([Window("general:a", 10_000, 20.0)], 1) for _ in range(100)))
    key = Keys(prefix).rate_limit("general:a")
    assert 0 < await connection.commands.pttl(key) <= 20_200
    assert await connection.commands.strlen(key) < 2_500


async def test_a_malformed_window_counts_as_empty(
    connection: Connection, make_windows: MakeWindows, prefix: str
) -> None:
    await connection.commands.set(Keys(prefix).rate_limit("general:a"), b"\xff?", ex=60)
    await connection.commands.lpush(Keys(prefix).rate_limit("general:b"), "x")
    windows: list[Window] = [Window("general:a", 2, 60.0), Window("general:b", 2, 60.0)]
    assert [left for left, _, _ in await make_windows().hit(windows, 1)] == [1, 1]


async def test_hits_of_one_turn_share_their_commands(connection: Connection, make_windows: MakeWindows) -> None:
    windows, spent = make_windows(connection), connection.meter.commands
    window, other = Window("general:a", 50, 60.0), Window("generation:a", 9, 60.0)
    await windows.hit([window], 1)
    await connection.commands.config_resetstat()
    spent.clear()
    await asyncio.gather(*(windows.hit([window, other], 1) for _ in range(5)))
    assert await billed(connection) == {"evalsha": 1, "time": 1, "mget": 1, "set": 2}
    assert spent == {"limits": 5}
    await connection.commands.config_resetstat()
    await windows.hit([other], 5)
    assert await billed(connection) == {"evalsha": 1, "time": 1, "mget": 1}
    assert spent == {"limits": 8}


async def billed(connection: Connection) -> dict[str, int]:
    """Return the number of commands since the last reset, including those of scripts."""
    stats = await connection.commands.info("commandstats")
    calls = {name.removeprefix("cmdstat_"): numbers["calls"] for name, numbers in stats.items()}
    return {name: count for name, count in calls.items() if name not in {"config|resetstat", "info", "ping"}}


async def test_an_unreachable_redis_is_reported() -> None:
    connection = Connection("redis://127.0.0.1:1")
    with pytest.raises(QueueUnavailable):
        await RedisRateLimitStore(connection, Keys("away")).hit([Window("general:a", 1, 60.0)], 1)
    await connection.close()


async def test_a_hit_that_costs_nothing_only_looks(
    make_windows: MakeWindows, connection: Connection, prefix: str
) -> None:
    windows, window = make_windows(), Window("general:a", 2, 60.0)
    assert await windows.hit([window], 0) == [LimitState(2, 0.0, 0.0)]
    assert not await connection.commands.exists(Keys(prefix).rate_limit("general:a"))
    await windows.hit([window], 2)
    ((left, reset_s, retry_s),) = await windows.hit([window], 0)
    assert (left, 0 < reset_s <= 60, retry_s) == (0, True, 0.0)


@pytest.mark.parametrize(("limit", "left"), [(2, 0), (150, 148)])
async def test_after_the_clock_of_the_server_was_set_back_a_client_waits_for_one_window_at_most(
    make_windows: MakeWindows, connection: Connection, prefix: str, limit: int, left: int
) -> None:
    windows, window = make_windows(), Window("general:a", limit, 0.5)
    day_ms = 86_400_000
    ahead_ms = int(time.time() * 1000) + day_ms
    stored = f"{ahead_ms} 1 {ahead_ms + 1} 1"
    await connection.multiplexer.execute("SET", Keys(prefix).rate_limit("general:a"), stored, "PX", day_ms)
    ((remaining, reset_s, _),) = await windows.hit([window], 0)
    assert remaining == left
    assert reset_s <= 0.51

    async def has_passed() -> bool:
        ((remaining, _, _),) = await windows.hit([window], 0)
        return remaining == limit

    await eventually(has_passed)
