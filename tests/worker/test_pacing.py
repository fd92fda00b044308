from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from itertools import count, pairwise
from typing import Any

import pytest

from imagegen.errors import UpstreamError
from imagegen.providers.protocol import UpstreamLimits
from imagegen.tasks.task import WaitReason
from imagegen.worker.circuit_breaker import BreakerConfig
from imagegen.worker.pacing import Pacing
from imagegen.worker.permits import Permit
from tests.support import Clock, logged
from tests.worker.conftest import ScriptedProvider, only_route

ROUTE = only_route(ScriptedProvider())
OK = UpstreamLimits()
LIMIT = UpstreamError("upstream_rate_limited", "429", retryable=True, status=429)
BROKEN = UpstreamError("upstream_error", "500", retryable=True, status=500)
LOSS = UpstreamError("upstream_timeout", "no answer", retryable=True, ambiguous=True)
REFUSED = UpstreamError("upstream_error", "no connection", retryable=True)
INVALID = UpstreamError("upstream_invalid_request", "400", status=400)
QUICK = BreakerConfig(0.1, 0.1, longest_s=0.5, step_s=0.02)


@pytest.fixture
def clock() -> Clock:
    """Set the monotonic clock by hand; the wall clock is 1,000 s ahead."""
    return Clock(0.0)


@pytest.fixture
def pacing(clock: Clock) -> Pacing:
    return make(clock)


def make(clock: Clock, **changes: Any) -> Pacing:
    return Pacing(ROUTE, clock=clock, wall=lambda: clock.now + 1000.0, **changes)


def limited(retry_after_s: float | None) -> UpstreamError:
    return UpstreamError("upstream_rate_limited", "429", retryable=True, status=429, retry_after_s=retry_after_s)


def taken(pacing: Pacing) -> Permit:
    """Return the permit of a call that is admitted."""
    permit = pacing.try_acquire("m")
    assert permit is not None
    return permit


def call(pacing: Pacing, error: UpstreamError | None = None, *, task: str | None = "t", model: str = "m") -> bool:
    """Make a call that ends at once; return False if it is not admitted."""
    turn = pacing.try_acquire(model)
    if turn is None:
        return False
    with turn:
        if error is None:
            pacing.record_success(turn, OK)
        else:
            pacing.failed(turn, error, unfinished=task)
    return True


def die(pacing: Pacing, model: str = "m", error: UpstreamError = BROKEN) -> None:
    for i in range(5):
        assert call(pacing, error, task=f"{model}{i}", model=model)


def test_without_trouble_and_without_a_rate_every_call_is_made_at_once(pacing: Pacing) -> None:
    turns = [pacing.try_acquire("m") for _ in range(100)]
    assert all(turns)
    assert pacing.blocked("m") is None


def test_a_rate_spaces_calls_evenly_over_all_models(clock: Clock) -> None:
    pacing = make(clock, rate_per_min=10)
    made: list[float] = []
    while clock.now < 60.0:
        if call(pacing, model=str(len(made) % 2)):
            made.append(clock.now)
        clock.now += 0.5
    assert made == [6.0 * i for i in range(10)]


def test_a_rate_saves_nothing_up(clock: Clock) -> None:
    pacing = make(clock, rate_per_min=10)
    clock.now = 600.0
    assert [call(pacing) for _ in range(3)] == [True, False, False]


def test_a_rate_limited_waiter_gets_its_start_time(clock: Clock) -> None:
    pacing = make(clock, rate_per_min=10)
    call(pacing)
    assert pacing.blocked("m") == (WaitReason.UPSTREAM_RATE_LIMITED, 1006.0)
    assert pacing.resting("m") is None


def test_a_rate_limit_pauses_all_calls_of_the_model_and_no_other(clock: Clock, pacing: Pacing) -> None:
    call(pacing, limited(30.0))
    assert not call(pacing)
    assert pacing.blocked("m") == pacing.resting("m") == (WaitReason.UPSTREAM_RATE_LIMITED, 1030.0)
    assert call(pacing, model="other")
    clock.now = 30.0
    assert call(pacing)


def test_a_rate_limit_without_retry_after_is_probed_after_half_a_second_and_then_less_often(
    clock: Clock, pacing: Pacing
) -> None:
    probes = []
    while clock.now < 30.0:
        if call(pacing, limited(None)):
            probes.append(clock.now)
        clock.now += 0.25
    assert [after - before for before, after in pairwise(probes)] == [0.5, 1.0, 2.0, 4.0, 5.0, 5.0, 5.0, 5.0]


def test_limits_of_single_tasks_without_retry_after_stop_their_model_for_half_a_second_each(
    clock: Clock, pacing: Pacing
) -> None:
    for number in range(5):
        call(pacing, LIMIT, task=f"faulty {number}")
        assert not call(pacing)
        clock.now += 0.5
        assert call(pacing)
    assert clock.now == 2.5


def test_a_job_that_is_accepted_ends_a_rate_limit_before_it_has_ended(clock: Clock, pacing: Pacing) -> None:
    call(pacing, limited(5.0), task="faulty")
    clock.now = 5.0
    taken(pacing).accepted()
    assert call(pacing, limited(5.0), task="faulty")
    assert pacing.blocked("m") is None, "the limit is its own, as the accepted job shows"


def test_a_job_that_is_accepted_does_not_show_that_a_dead_upstream_works(clock: Clock, pacing: Pacing) -> None:
    die(pacing)
    clock.now = 0.5
    taken(pacing).accepted()
    assert pacing.blocked("m")
    assert not pacing.is_suspect("m0")


def test_no_remaining_budget_pauses_calls_until_the_reset(clock: Clock, pacing: Pacing) -> None:
    with taken(pacing) as turn:
        pacing.record_success(turn, UpstreamLimits(remaining=0, reset_s=8.0))
    assert pacing.blocked("m") == (WaitReason.UPSTREAM_RATE_LIMITED, 1008.0)
    clock.now = 8.0
    assert call(pacing)


@pytest.mark.parametrize("limits", [UpstreamLimits(1, 8.0), UpstreamLimits(0, None), UpstreamLimits(None, 8.0)])
def test_incomplete_or_unspent_limits_cause_no_pause(pacing: Pacing, limits: UpstreamLimits) -> None:
    with taken(pacing) as turn:
        pacing.record_success(turn, limits)
    assert pacing.blocked("m") is None


@pytest.mark.parametrize("error", [BROKEN, LOSS], ids=["500", "loss"])
def test_five_unfinished_tasks_that_fail_in_a_row_open_the_breaker(
    clock: Clock, pacing: Pacing, error: UpstreamError
) -> None:
    die(pacing, error=error)
    assert not call(pacing)
    assert pacing.blocked("m") == (WaitReason.UPSTREAM_OVERLOADED, 1000.5)
    assert call(pacing, model="other")
    clock.now = 0.5
    with taken(pacing) as probe:
        assert pacing.excuses(probe, error)
        assert pacing.try_acquire("m") is None


def test_tasks_that_fail_one_after_the_other_never_open_the_breaker(pacing: Pacing) -> None:
    for i in range(20):
        for _ in range(2):
            assert call(pacing, BROKEN, task=f"task {i}")
        assert call(pacing, BROKEN, task=None)
        pacing.finished(f"task {i}")
    assert pacing.blocked("m") is None


@pytest.mark.parametrize("sign", [None, INVALID], ids=["an answer", "a refusal"])
def test_any_response_resets_the_failure_count(pacing: Pacing, sign: UpstreamError | None) -> None:
    for i in range(4):
        call(pacing, BROKEN, task=str(i))
    call(pacing, sign, task=None)
    for i in range(4):
        call(pacing, BROKEN, task=str(i))
    assert pacing.blocked("m") is None


@pytest.mark.parametrize("status", [408, 425, 499])
def test_a_gateway_timeout_does_not_reset_the_failure_count(pacing: Pacing, status: int) -> None:
    gave_up = UpstreamError("upstream_error", str(status), retryable=True, ambiguous=True, status=status)
    for i in range(5):
        call(pacing, gave_up, task=str(i))
    blocked = pacing.blocked("m")
    assert blocked is not None
    assert blocked.reason is WaitReason.UPSTREAM_OVERLOADED


def test_a_limit_that_comes_and_goes_is_one_warning_a_minute(clock: Clock, pacing: Pacing) -> None:
    with logged("INFO") as lines:
        for now in (0.0, 10.0, 20.0, 61.0):
            clock.now = now
            call(pacing, limited(1.0), task=str(now))
            clock.now = now + 5.0
            call(pacing)
    assert [line.split()[0] for line in lines] == ["WARNING", "INFO"] * 2


def test_upstream_capacity_is_shared_by_all_models(clock: Clock, pacing: Pacing) -> None:
    assert pacing.capacity("m") == pacing.upstream_capacity() == math.inf
    for i in range(2):
        call(pacing, REFUSED, model=str(i))
    assert (pacing.capacity("m"), pacing.upstream_capacity()) == (0, 0)
    clock.now = 0.5
    assert (pacing.capacity("m"), pacing.upstream_capacity(), pacing.opens_in_s("m")) == (1, 1, 0.0)
    with taken(pacing):
        assert (pacing.capacity("other"), pacing.closed("other").reason) == (0, WaitReason.UPSTREAM_OVERLOADED)


def test_a_rate_limit_does_not_reset_the_failure_count(clock: Clock, pacing: Pacing) -> None:
    for i in range(4):
        call(pacing, BROKEN, task=str(i))
    call(pacing, limited(0.0), task="4")
    call(pacing, BROKEN, task="5")
    assert pacing.blocked("m") == (WaitReason.UPSTREAM_OVERLOADED, 1005.0)


def test_two_calls_that_never_reached_it_open_the_breaker_for_all_models(clock: Clock, pacing: Pacing) -> None:
    assert [call(pacing, REFUSED, model=str(i)) for i in range(3)] == [True, True, False]
    assert pacing.blocked("any") == (WaitReason.UPSTREAM_OVERLOADED, 1000.5)
    clock.now = 0.5
    assert call(pacing, BROKEN, task="t")
    assert call(pacing)


def test_a_response_between_two_lost_calls_resets_the_count(pacing: Pacing) -> None:
    for error in (REFUSED, BROKEN, REFUSED, None, REFUSED):
        assert call(pacing, error)
    assert pacing.blocked("m") is None


class Storm:
    """Simulation of five busy slots against an upstream given by a function, in steps of 0.05 s."""

    def __init__(self, clock: Clock, pacing: Pacing, call_s: float = 0.5) -> None:
        self.clock, self.pacing, self.call_s = clock, pacing, call_s
        self.calls: list[float] = []
        self.successes: list[float] = []
        self._running: list[tuple[float, Permit]] = []
        self._tasks = count()

    def until(self, end_s: float, error_at: Callable[[float], UpstreamError | None]) -> None:
        while self.clock.now < end_s:
            for ends_at, turn in tuple(self._running):
                if ends_at <= self.clock.now:
                    self._end(turn, error_at(self.clock.now))
                    self._running.remove((ends_at, turn))
            while len(self._running) < 5 and (admitted := self.pacing.try_acquire("m")):
                self.calls.append(self.clock.now)
                self._running.append((self.clock.now + self.call_s, admitted))
            self.clock.now = round(self.clock.now + 0.05, 2)

    def _end(self, turn: Permit, error: UpstreamError | None) -> None:
        with turn:
            if error is None:
                self.successes.append(self.clock.now)
                self.pacing.record_success(turn, OK)
            else:
                self.pacing.failed(turn, error, unfinished=str(next(self._tasks)))


@pytest.mark.parametrize("retry_after_s", [None, 0.0, 1.0, 7.0, 20.0])
def test_a_minute_of_rate_limits_is_probed_at_most_every_five_seconds(
    clock: Clock, pacing: Pacing, retry_after_s: float | None
) -> None:
    storm = Storm(clock, pacing)
    storm.until(60.0, lambda _now: limited(retry_after_s))
    probes = storm.calls[5 if retry_after_s is not None else 8 :]  # without a time the first ones come sooner
    assert 2 <= len(probes) <= 12
    assert all(after - before >= 5.0 for before, after in pairwise(probes))


@pytest.mark.parametrize("error", [limited(1.0), BROKEN, LOSS, REFUSED], ids=["429", "500", "loss", "refused"])
def test_full_speed_is_back_within_fifteen_seconds(clock: Clock, pacing: Pacing, error: UpstreamError) -> None:
    storm = Storm(clock, pacing)
    storm.until(60.0, lambda _now: error)
    assert len(storm.calls) <= 30
    storm.until(75.0, lambda _now: None)
    before = len(storm.calls)
    storm.until(85.0, lambda _now: None)
    assert len(storm.calls) - before >= 0.9 * 5 * 10 / storm.call_s


def test_models_without_state_are_dropped(clock: Clock, pacing: Pacing) -> None:
    call(pacing, limited(100.0), model="paused")
    for i in range(1000):
        call(pacing, model=str(i))
    assert len(pacing._models) <= 201
    assert pacing.blocked("paused")


async def test_turns_follow_the_order_of_requests() -> None:
    pacing = Pacing(ROUTE, rate_per_min=60 / 0.02)
    given: list[int] = []

    async def wait(name: int) -> None:
        permit = await pacing.acquire("m", 5.0)
        assert permit is not None
        with permit:
            given.append(name)

    await asyncio.gather(*(wait(i) for i in range(6)))
    assert given == [0, 1, 2, 3, 4, 5]


async def test_a_later_request_for_another_model_does_not_wait() -> None:
    pacing = Pacing(ROUTE)
    call(pacing, limited(60.0))
    waiting = asyncio.create_task(pacing.acquire("m", 60.0))
    await asyncio.sleep(0)
    assert await asyncio.wait_for(pacing.acquire("other", 1.0), 20)
    waiting.cancel()


async def test_a_waiter_gets_its_turn_when_the_probe_was_answered() -> None:
    pacing = Pacing(ROUTE, breaker_config=QUICK)
    call(pacing, limited(0.0))
    probe = taken(pacing)
    waiting = asyncio.create_task(pacing.acquire("m", 5.0))
    await asyncio.sleep(0)
    assert not waiting.done()
    pacing.record_success(probe, OK)
    probe.close()
    assert await asyncio.wait_for(waiting, 3.0)


async def test_a_wait_ends_at_its_timeout() -> None:
    pacing = Pacing(ROUTE)
    call(pacing, limited(60.0))
    assert await asyncio.wait_for(pacing.acquire("m", 0.02), 20) is None


async def test_quiet_ends_every_wait_and_starts_no_other() -> None:
    pacing = Pacing(ROUTE)
    call(pacing, limited(60.0))
    waiting = [asyncio.create_task(pacing.acquire("m", 60.0)) for _ in range(3)]
    await asyncio.sleep(0)
    pacing.quiet()
    assert await asyncio.wait_for(asyncio.gather(*waiting), 20) == [None] * 3
    assert await pacing.acquire("m", 60.0) is None
    assert pacing.try_acquire("other")


async def test_a_cancelled_wait_takes_no_turn() -> None:
    pacing = Pacing(ROUTE, breaker_config=QUICK)
    call(pacing, limited(0.0))
    probe = taken(pacing)
    first, second = (asyncio.create_task(pacing.acquire("m", 5.0)) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    pacing.failed(probe, LIMIT, unfinished="t")
    probe.close()
    assert await asyncio.wait_for(second, 20)
    assert first.cancelled()


async def test_the_turn_of_a_cancelled_wait_is_released(clock: Clock, pacing: Pacing) -> None:
    call(pacing, limited(0.0))
    call(pacing, limited(0.0))
    first, second = (asyncio.create_task(pacing.acquire("m", 60.0)) for _ in range(2))
    await asyncio.sleep(0)
    clock.now = 5.0
    pacing.try_acquire("other")
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    assert not second.done()
    clock.now = 10.0
    pacing.try_acquire("other")
    assert await asyncio.wait_for(second, 20)
