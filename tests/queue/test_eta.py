from __future__ import annotations

import asyncio
import heapq
import random
from typing import Any

import pytest

from imagegen.queue.eta import EtaEstimator, SlotForecast, WaitingEntries
from imagegen.tasks.task import State, Task
from tests.conftest import MakeInstance
from tests.support import eventually, over_rows, submission


def task(name: str, **changes: Any) -> Task:
    fields = {"id": name, "epoch": 1, "sequence": 1, "digest": "d", "model": "m", "created_at": 0.0}
    return Task(**{**fields, "request_json": b'{"width":512,"height":512,"n":1}', **changes})


def test_positions_follow_the_order_of_entry_ids() -> None:
    line = WaitingEntries()
    ids = [f"{ms}-{n}" for ms in (1, 9, 10, 100) for n in (0, 2, 10)]
    for entry_id in random.sample(ids, len(ids)):
        line.add(entry_id)
    assert [line.position(entry_id) for entry_id in ids] == list(range(1, 13))
    line.remove(ids[0])
    line.remove("5-5")
    assert line.position(ids[1]) == 1


@over_rows(
    ("ahead", "running", "expected"), [(0, [], 0), (0, [3, 4], 3), (1, [3, 4], 4), (2, [3, 4], 13), (5, [3, 4], 24)]
)
def test_a_task_waits_for_its_slot(ahead: int, running: list[float], expected: float) -> None:
    assert SlotForecast(running, 2, 10.0).wait_s(ahead) == expected


@over_rows("seed", range(50))
def test_the_wait_equals_the_sum_over_single_tasks(seed: int) -> None:
    dice = random.Random(seed)
    slots, mean_s, ahead = dice.randint(1, 8), dice.randint(1, 9), dice.randint(0, 60)
    running = [float(dice.randint(0, 100)) for _ in range(dice.randint(0, slots))]
    free_at = running + [0.0] * (slots - len(running))
    for _ in range(ahead):
        heapq.heapify(free_at)
        heapq.heapreplace(free_at, free_at[0] + mean_s)
    assert SlotForecast(running, slots, float(mean_s)).wait_s(ahead) == min(free_at)


def test_one_long_run_among_millions_does_not_slow_the_estimate() -> None:
    assert SlotForecast([10**6], 2, 1e-6).wait_s(10**12) == pytest.approx((10**12 * 1e-6 + 10**6) / 2, rel=1e-3)


def test_no_estimate_exists_before_the_first_run_of_a_kind() -> None:
    estimates = EtaEstimator(slots=1)
    estimates.waiting.add("5-0")
    place = estimates.position_of(task("a", entry_id="5-0"), now=0.0)
    assert (place.position, place.eta_s) == (1, None)


def test_the_estimate_is_the_median_of_past_runs() -> None:
    estimates = EtaEstimator(slots=1)
    for seconds in (8.0, 10.0, 30.0):
        estimates.started(task("x"), 0.0)
        estimates.ended(task("x"), seconds)
    estimates.started(task("a"), 100.0)
    running = task("a", state=State.PROCESSING, started_at=100.0)
    assert estimates.position_of(running, now=104.0).eta_s == 6.0
    assert estimates.position_of(running, now=150.0).eta_s == 1.0


def test_a_failed_run_does_not_change_the_estimate() -> None:
    estimates = EtaEstimator(slots=1)
    estimates.started(task("x"), 0.0)
    estimates.ended(task("x"), None)
    assert estimates.runs.mean is None


async def test_positions_are_exact_on_one_instance(make_instance: MakeInstance) -> None:
    instance = make_instance()
    held = asyncio.create_task(instance.worker_queue.claim())
    await instance.client_queue.submit(submission(0))
    await asyncio.wait_for(held, 20)
    tasks = [(await instance.client_queue.submit(submission(i))).task for i in range(1, 6)]
    assert [(await instance.client_queue.position(task)).position for task in tasks] == [1, 2, 3, 4, 5]
    await instance.client_queue.cancel(tasks[1].id)
    assert (await instance.client_queue.position(tasks[4])).position == 4
    await instance.claim()
    assert (await instance.client_queue.position(tasks[4])).position == 3


async def test_positions_are_available_after_a_restart(make_instance: MakeInstance) -> None:
    one = make_instance(start=False)
    await one.verbs.create_group()
    for i in range(3):
        await one.client_queue.submit(submission(i))
    two = make_instance()
    last = await two.task(submission(2).task_id)
    assert last is not None

    async def is_third() -> bool:
        return (await two.client_queue.position(last)).position == 3

    await eventually(is_third)


def test_later_positions_are_estimated_from_the_times_in_entry_ids() -> None:
    line = EtaEstimator(1).waiting
    line.replace([f"{1000 + i}-0" for i in range(100)], 0.0, behind=900, last="10000-0")
    assert len(line) == 1_000
    assert line.position("1050-0") == 51
    assert line.position("10000-0") == 1_000
    assert line.position("10001-0") == 1_001
    places = [line.position(f"{at}-0") for at in range(1_100, 10_000, 100)]
    assert places == sorted(places)
    assert places[len(places) // 2] == pytest.approx(550, abs=20)
    line.taken([f"{1000 + i}-0" for i in range(100)])
    assert (line.vague, len(line), line.position("10000-0")) == (True, 900, 900)
    line.taken(["1200-0"])
    assert len(line) == 899
