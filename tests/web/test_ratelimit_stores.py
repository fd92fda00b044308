"""Tests of the rate limit stores: exact and bounded windows, with the same limit while the shared store is down."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from imagegen.errors import QueueUnavailable
from imagegen.ratelimit.stores import MAX_ENTRIES, FallbackRateLimitStore, LimitState, MemoryRateLimitStore, Window
from tests.support import Clock

ONE = Window("general:a", 2, 60.0)


def test_a_hit_over_the_whole_limit_is_rejected_for_a_window() -> None:
    assert MemoryRateLimitStore().hit_sync([ONE], 3) == [LimitState(2, 0.0, 60.0)]


def test_a_hit_waits_until_enough_has_been_refilled(clock: Clock) -> None:
    windows = MemoryRateLimitStore(clock)
    windows.hit_sync([ONE], 1)
    clock.now += 10
    windows.hit_sync([ONE], 1)
    assert windows.hit_sync([ONE], 1) == [LimitState(0, 50.0, 50.0)]
    assert windows.hit_sync([ONE], 2) == [LimitState(0, 50.0, 60.0)]


def test_a_hit_may_cost_more_than_one(clock: Clock) -> None:
    store, window = MemoryRateLimitStore(clock), Window("units:a", 100, 60.0)
    assert store.hit_sync([window], 60) == [LimitState(40, 60.0, 0.0)]
    clock.now += 10
    assert store.hit_sync([window], 60) == [LimitState(40, 50.0, 50.0)]
    assert store.hit_sync([window], 40) == [LimitState(0, 50.0, 0.0)]
    clock.now += 50
    assert store.hit_sync([window], 100) == [LimitState(60, 10.0, 10.0)]
    store.refund([window], 30)
    assert store.hit_sync([window], 0) == [LimitState(90, 10.0, 0.0)]


def test_a_great_limit_takes_bounded_memory_and_never_admits_more(clock: Clock) -> None:
    store, window, admitted = MemoryRateLimitStore(clock), Window("general:a", 50_000, 60.0), list[float]()
    for _ in range(40_000):
        clock.now += 0.003
        admitted += [clock.now] * (2 if not store.hit_sync([window], 2)[0].retry_s else 0)
    assert all(later - first >= window.window_s for first, later in zip(admitted, admitted[50_000:], strict=False))
    assert len(admitted) > 50_000
    assert len(store._spent[window.key]._times) <= MAX_ENTRIES + 1


def test_the_memory_is_bounded_and_evicts_the_least_recent_client() -> None:
    windows = MemoryRateLimitStore(max_windows=2)
    for name in ("a", "b", "a", "c"):
        windows.hit_sync([Window(name, 2, 60.0)], 1)
    assert windows.hit_sync([Window("a", 2, 60.0)], 1)[0].retry_s > 0
    assert windows.hit_sync([Window("b", 2, 60.0)], 1)[0].remaining == 1


class Shared:
    """Shared store with scripted answers."""

    def __init__(self) -> None:
        self.calls = 0
        self.answer: LimitState | Exception | None = LimitState(1, 60.0, 0.0)

    async def hit(self, windows: Sequence[Window], cost: int) -> Sequence[LimitState]:
        self.calls += 1
        if self.answer is None:
            await asyncio.Event().wait()
        if isinstance(self.answer, Exception):
            raise self.answer
        assert self.answer is not None
        return [self.answer] * len(windows)


@pytest.mark.parametrize("away", [QueueUnavailable(), ConnectionRefusedError(), None])
async def test_the_limit_holds_while_the_shared_store_is_unavailable(clock: Clock, away: Exception | None) -> None:
    port = Shared()
    port.answer = away
    windows = FallbackRateLimitStore(port, MemoryRateLimitStore(clock), clock)
    answers = [(await windows.hit([ONE], 1))[0].retry_s for _ in range(3)]
    assert answers == [0.0, 0.0, 60.0]
    assert port.calls == 1


async def test_budget_spent_before_an_outage_stays_spent(clock: Clock) -> None:
    port = Shared()
    windows = FallbackRateLimitStore(port, MemoryRateLimitStore(clock), clock)
    await windows.hit([ONE], 1)
    port.answer = QueueUnavailable()
    assert [(await windows.hit([ONE], 1))[0].retry_s for _ in range(2)] == [0.0, 60.0]


async def test_the_shared_store_is_retried_after_a_pause(clock: Clock) -> None:
    port = Shared()
    port.answer = QueueUnavailable()
    windows = FallbackRateLimitStore(port, MemoryRateLimitStore(clock), clock)
    await windows.hit([ONE], 1)
    port.answer = LimitState(0, 60.0, 0.0)
    clock.now += 5
    assert await windows.hit([ONE], 1) == [port.answer]


async def test_a_client_over_its_local_limit_costs_no_shared_hit(clock: Clock) -> None:
    port = Shared()
    windows = FallbackRateLimitStore(port, MemoryRateLimitStore(clock), clock)
    for _ in range(5):
        await windows.hit([ONE], 1)
    assert port.calls == 2


async def test_hits_rejected_by_the_shared_store_are_not_spent_locally(clock: Clock) -> None:
    port = Shared()
    port.answer = LimitState(0, 9.0, 9.0)
    windows = FallbackRateLimitStore(port, MemoryRateLimitStore(clock), clock)
    refused = [(await windows.hit([ONE], 1))[0] for _ in range(4)]
    assert (refused, port.calls) == ([port.answer] * 4, 4)
