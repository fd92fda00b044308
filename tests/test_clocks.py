"""Tests of the clocks of tests: of limits of time on a busy machine, and of comparisons of money by day."""

from __future__ import annotations

import time

import pytest

from tests.support import Clock, Stopwatch, eventually, wait_for_one_day

MIDNIGHT = 1_000_080_000.0
"""Unix time of the beginning of 2001-09-10 in UTC."""


def stand_still(for_s: float) -> None:
    time.sleep(for_s)


def compute(for_s: float) -> None:
    until_s = time.process_time() + for_s
    while time.process_time() < until_s:
        pass


async def test_time_in_which_the_process_is_paused_does_not_count() -> None:
    async with Stopwatch() as watch:
        await eventually(lambda: watch.elapsed_s > 0.1)
        before_s = watch.elapsed_s
        stand_still(0.6)
        await eventually(lambda: watch.elapsed_s < before_s + 0.4)


async def test_time_in_which_the_loop_waits_or_computes_counts() -> None:
    async with Stopwatch() as watch:
        await eventually(lambda: watch.elapsed_s > 0.1)
        began_s = watch.elapsed_s
        compute(0.5)
        computed_s = watch.elapsed_s
        await eventually(lambda: watch.elapsed_s > computed_s + 0.2)
        assert watch.elapsed_s > began_s + 0.5


@pytest.mark.parametrize(
    ("now", "waited_s"), [(MIDNIGHT - 43_200, []), (MIDNIGHT - 46, []), (MIDNIGHT - 44, [45.0]), (MIDNIGHT - 1, [2.0])]
)
def test_a_test_of_money_waits_for_the_next_day_only_right_before_it(
    monkeypatch: pytest.MonkeyPatch, now: float, waited_s: list[float]
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "time", Clock(now))
    monkeypatch.setattr(time, "sleep", waits.append)
    wait_for_one_day(45.0)
    assert waits == waited_s
