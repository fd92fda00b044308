from __future__ import annotations

import math

from imagegen.tasks.task import WaitReason
from imagegen.worker.circuit_breaker import BreakerConfig, CircuitBreaker, FailingTasks

TEMPO = BreakerConfig(probe_s=5.0, longest_s=120.0, step_s=1.0)
LIMIT, DEAD = WaitReason.UPSTREAM_RATE_LIMITED, WaitReason.UPSTREAM_OVERLOADED


def open_places(gate: CircuitBreaker, now: float, at_most: int = 20) -> int:
    """Return how many calls may begin now if none of them ends."""
    count = 0
    while count < at_most and gate.next_allowed_at(now) <= now:
        gate.enter(now)
        count += 1
    return count


def test_a_new_breaker_admits_everything() -> None:
    assert open_places(CircuitBreaker(TEMPO), 0.0) == 20


def test_a_pause_admits_nothing_and_then_one_probe() -> None:
    gate = CircuitBreaker(TEMPO)
    open_places(gate, 0.0)
    assert gate.open_for(0.0, 10.0, LIMIT)
    assert gate.next_allowed_at(9.0) == 10.0
    assert open_places(gate, 10.0) == 1
    assert gate.next_allowed_at(10.0) == 15.0
    assert gate.next_allowed_at(16.0) == math.inf


def test_a_failed_probe_is_repeated_after_five_seconds() -> None:
    gate = CircuitBreaker(TEMPO)
    gate.open_for(0.0, 1.0, LIMIT)
    period = gate.enter(1.0)
    assert not gate.open_for(1.1, 1.0, LIMIT)
    gate.leave(period)
    assert gate.next_allowed_at(1.1) == 6.0


def test_a_probe_honours_a_longer_retry_after() -> None:
    gate = CircuitBreaker(TEMPO)
    gate.open_for(0.0, 1.0, LIMIT)
    period = gate.enter(1.0)
    gate.open_for(1.1, 30.0, LIMIT)
    gate.leave(period)
    assert gate.next_allowed_at(1.1) == 31.1


def test_a_dropped_probe_counts_as_a_probe() -> None:
    gate = CircuitBreaker(TEMPO)
    gate.open_for(0.0, 1.0, LIMIT)
    gate.leave(gate.enter(1.0))
    assert gate.next_allowed_at(1.0) == 6.0


def test_no_pause_is_longer_than_two_minutes() -> None:
    gate = CircuitBreaker(TEMPO)
    gate.open_for(0.0, 86_400.0, LIMIT)
    assert gate.next_allowed_at(0.0) == 120.0


def test_late_refusals_of_the_same_burst_only_lengthen_the_pause() -> None:
    gate = CircuitBreaker(TEMPO)
    periods = [gate.enter(0.0) for _ in range(3)]
    assert [gate.open_for(0.1 * i, 1.0, LIMIT) for i in range(3)] == [True, False, False]
    for period in periods:
        gate.leave(period)
    assert gate.next_allowed_at(0.5) == 1.2


def test_a_held_breaker_stays_open_after_answered_probes_until_it_is_released() -> None:
    gate = CircuitBreaker(TEMPO)
    assert [gate.hold(0.0, 5.0), gate.hold(0.0, 5.0)] == [True, False]
    for at in (5.0, 15.0):
        probe = gate.enter(at)
        assert not gate.record_success(at, probe)
        gate.leave(probe)
        assert gate.next_allowed_at(at) > at
    assert [gate.release(16.0), gate.release(16.0)] == [True, False]
    assert open_places(gate, 16.0) == 2


def test_a_released_breaker_with_another_trouble_stays_open_until_a_probe_soon_is_answered() -> None:
    gate = CircuitBreaker(TEMPO)
    gate.trip(0.0)
    gate.hold(0.0, 5.0)
    gate.leave(gate.enter(5.0))
    assert gate.next_allowed_at(5.0) == 15.0
    assert gate.release(6.0)
    assert gate.next_allowed_at(6.0) == 11.0
    assert gate.record_success(11.0, gate.enter(11.0))


def test_the_probes_of_a_held_breaker_become_rare_and_are_frequent_again_once_it_is_held_again() -> None:
    gate = CircuitBreaker(TEMPO)
    gate.hold(0.0, 5.0)
    at, pauses = 5.0, []
    while at < 3_600.0:
        gate.leave(gate.enter(at))
        pauses.append(gate.next_allowed_at(at) - at)
        at += pauses[-1]
    assert pauses[:8] == [10.0, 20.0, 40.0, 80.0, 160.0, 300.0, 300.0, 300.0]
    gate.release(at)
    gate.record_success(at, gate.enter(at))
    gate.hold(at, 5.0)
    assert gate.next_allowed_at(at) == at + 5.0


def test_calls_double_after_an_answered_probe() -> None:
    gate = CircuitBreaker(TEMPO)
    gate.open_for(0.0, 1.0, LIMIT)
    probe = gate.enter(1.0)
    assert gate.record_success(2.0, probe)
    gate.leave(probe)
    assert open_places(gate, 2.0) == 2
    assert gate.next_allowed_at(2.5) == 3.0
    assert open_places(gate, 3.0) == 2
    assert open_places(gate, 4.0) == 4
    assert open_places(gate, 20.0, at_most=100) == 100


def test_an_answer_from_before_a_rate_limit_does_not_end_it() -> None:
    gate = CircuitBreaker(TEMPO)
    before = gate.enter(0.0)
    gate.open_for(1.0, 10.0, LIMIT)
    assert not gate.record_success(2.0, before)
    assert gate.next_allowed_at(2.0) == 11.0


def test_any_response_ends_the_pause_of_a_dead_upstream() -> None:
    gate = CircuitBreaker(TEMPO)
    before = gate.enter(0.0)
    assert gate.trip(1.0)
    assert not gate.trip(1.0)
    assert (gate.is_tripped, gate.reason, gate.next_allowed_at(1.0)) == (True, DEAD, 1.5)
    assert gate.record_success(2.0, before)
    assert not gate.is_tripped
    assert open_places(gate, 2.0) == 2


def test_a_dead_upstream_is_probed_soon_and_then_every_five_seconds() -> None:
    gate, asked, now = CircuitBreaker(TEMPO), [], 0.0
    gate.trip(0.0)
    while now < 30.0:
        if gate.next_allowed_at(now) <= now:
            gate.leave(gate.enter(now))
            asked.append(now)
        now += 0.25
    assert asked == [0.5, 1.5, 3.5, 7.5, 12.5, 17.5, 22.5, 27.5]


def test_capacity_is_the_number_of_calls_that_may_begin_now() -> None:
    gate = CircuitBreaker(TEMPO)
    assert gate.capacity(0.0) == math.inf
    gate.trip(0.0)
    assert (gate.capacity(0.4), gate.capacity(0.5)) == (0, 1)
    probe = gate.enter(0.5)
    assert gate.capacity(2.0) == 0
    gate.record_success(2.0, probe)
    gate.leave(probe)
    assert (gate.capacity(2.0), gate.capacity(3.0), gate.capacity(20.0)) == (2, 4, math.inf)


def test_reduced_upstream_capacity_returns_slowly_without_a_probe() -> None:
    gate = CircuitBreaker(TEMPO)
    gate.enter(0.0)
    gate.pause(0.0, 10.0)
    assert (gate.next_allowed_at(0.0), gate.is_open) == (10.0, False)
    assert open_places(gate, 10.0) == 1
    assert open_places(gate, 11.0) == 1
    assert open_places(gate, 12.0) == 2


def test_a_breaker_without_state_is_idle() -> None:
    gate = CircuitBreaker(TEMPO)
    assert gate.idle(0.0)
    period = gate.enter(0.0)
    assert not gate.idle(0.0)
    gate.leave(period)
    gate.pause(0.0, 10.0)
    assert not gate.idle(15.0)
    assert gate.idle(25.0)
    gate.open_for(30.0, 1.0, LIMIT)
    assert not gate.idle(1000.0)


def test_failing_tasks_are_counted_for_each_model_and_each_task_once() -> None:
    streaks = FailingTasks()
    assert [streaks.failed(task, "m") for task in ("a", "b", "a")] == [1, 2, 2]
    assert streaks.failed("c", "other") == 1


def test_a_success_clears_the_failing_tasks_of_its_model() -> None:
    streaks = FailingTasks()
    streaks.failed("a", "m")
    streaks.failed("b", "other")
    streaks.alive("m")
    assert streaks.failed("c", "m") == 1
    assert streaks.failed("d", "other") == 2


def test_a_task_that_failed_among_successes_is_no_evidence() -> None:
    streaks = FailingTasks()
    streaks.failed("a", "m")
    assert streaks.has_failed("a")
    assert not streaks.is_suspect("a")
    streaks.alive("m")
    assert streaks.is_suspect("a")
    assert streaks.failed("a", "m") == 0
    assert streaks.failed("b", "m") == 1
    streaks.finished("a")
    assert not streaks.has_failed("a")


def test_a_finished_task_is_not_counted() -> None:
    streaks = FailingTasks()
    for task in ("a", "b", "c", "d"):
        streaks.failed(task, "m")
        streaks.finished(task)
    assert streaks.failed("e", "m") == 1


def test_tasks_that_never_end_here_are_forgotten_once_there_are_many() -> None:
    streaks = FailingTasks(most=3)
    for number in range(5):
        streaks.failed(f"t{number}", "m")
    assert [streaks.has_failed(f"t{number}") for number in range(5)] == [False, False, True, True, True]
    streaks.alive("m")
    streaks.failed("t5", "m")
    streaks.alive("m")
    assert [streaks.is_suspect(f"t{number}") for number in range(6)] == [False, False, False, True, True, True]
