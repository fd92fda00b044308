"""Tests of the pool during outages: upstreams that fail, hang or limit the rate of all calls."""

from __future__ import annotations

import asyncio

import pytest
from redis.exceptions import ResponseError

from imagegen import line_limit
from imagegen.tasks.task import State, Task, WaitReason
from imagegen.worker.circuit_breaker import BreakerConfig
from tests.support import eventually, logged
from tests.worker.conftest import MakeHarness, WorkerHarness, failure, fault, loss, refused
from tests.worker.pool_load import Switch, states, submit_many


async def check_trouble(harness: WorkerHarness, task_ids: list[str], at_most: int) -> None:
    """Simulate a minute of trouble fifty times faster; allow `at_most` calls."""
    began = asyncio.get_running_loop().time()
    await asyncio.sleep(1.2)
    minutes = (asyncio.get_running_loop().time() - began) / 1.2
    assert len(harness.provider.calls) <= at_most * minutes
    assert not any(harness.task(task_id).state is State.COMPLETED for task_id in task_ids)


async def test_a_storm_of_rate_limits_fails_nothing_and_full_speed_is_back_soon(make_harness: MakeHarness) -> None:
    upstream = Switch(fault(429, retry_after_s=0.02))
    harness = make_harness(default=upstream)
    task_ids = await submit_many(harness, 100)
    await check_trouble(harness, task_ids, at_most=5 + 12)
    upstream.error, harness.provider.most = None, 0
    await eventually(lambda: harness.provider.most == 5, within_s=15.0)
    tasks = await harness.finished(*task_ids)
    assert {(task.state, task.attempts) for task in tasks} == {(State.COMPLETED, 1)}


@pytest.mark.parametrize("error", [fault(500), fault(503), refused()], ids=["500", "503", "refused"])
async def test_a_dead_upstream_is_called_rarely_and_fails_nothing(make_harness: MakeHarness, error: Exception) -> None:
    upstream = Switch(error)
    harness = make_harness(default=upstream, base_s=0.1)
    task_ids = await submit_many(harness, 100)
    await check_trouble(harness, task_ids, at_most=30)

    def held() -> list[Task]:
        waiting = [harness.task(task_id) for task_id in task_ids]
        assert {task.state for task in waiting} <= {State.PENDING, State.PROCESSING}
        return [task for task in waiting if task.reason is WaitReason.UPSTREAM_OVERLOADED]

    await eventually(held)
    assert all(task.retry_at for task in held())
    await eventually(lambda: (wait := harness.pacing.blocked("m")) and wait.reason is WaitReason.UPSTREAM_OVERLOADED)
    upstream.error = None
    assert await states(harness, task_ids) == {State.COMPLETED}


async def test_a_hanging_upstream_is_called_rarely_and_a_second_loss_ends(
    make_harness: MakeHarness,
) -> None:
    upstream = Switch(loss(), call_s=0.04)
    harness = make_harness(default=upstream, base_s=0.1)
    task_ids = await submit_many(harness, 30)
    await check_trouble(harness, task_ids, at_most=30)
    upstream.error = None
    for task in await harness.finished(*task_ids):
        assert task.possibly_billed_twice == (2 if task.state is State.FAILED else task.possibly_billed_twice)
        assert task.possibly_billed_twice <= 2


async def test_a_dead_upstream_costs_no_task_more_than_one_attempt(make_harness: MakeHarness) -> None:
    upstream = Switch(fault(500))
    harness = make_harness(default=upstream, base_s=0.02, tempo=BreakerConfig(0.01, 0.02, longest_s=0.4, step_s=0.02))
    task_ids = await submit_many(harness, 8)
    await eventually(lambda: len(harness.provider.calls) > 40)
    upstream.error = None
    tasks = await harness.finished(*task_ids)
    assert {task.state for task in tasks} == {State.COMPLETED}
    assert max(task.attempts for task in tasks) <= 2


@pytest.mark.parametrize("tasks", [5, 10])
async def test_lone_failing_tasks_end_after_the_excused_outage_time(make_harness: MakeHarness, tasks: int) -> None:
    tempo = BreakerConfig(0.01, 0.02, longest_s=0.4, step_s=0.02, excused_s=0.5)
    harness = make_harness(default=Switch(fault(500)), base_s=0.02, tempo=tempo)
    ended = await harness.finished(*await submit_many(harness, tasks))
    assert {(task.state, failure(task).code, task.attempts) for task in ended} == {(State.FAILED, "upstream_error", 3)}


async def test_an_overloaded_upstream_is_excused_for_as_long_as_it_lasts(make_harness: MakeHarness) -> None:
    upstream = Switch(fault(503))
    tempo = BreakerConfig(0.01, 0.02, longest_s=0.4, step_s=0.02, excused_s=0.0)
    harness = make_harness(default=upstream, base_s=0.02, tempo=tempo)
    task_ids = await submit_many(harness, 8)
    await eventually(lambda: len(harness.provider.calls) > 40)
    upstream.error = None
    assert await states(harness, task_ids) == {State.COMPLETED}


async def test_ends_that_redis_refuses_are_a_few_lines_without_a_traceback(
    make_harness: MakeHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(line_limit, "COUNTED_S", 1.0)
    harness = make_harness()
    finish = harness.instance.verbs.finish

    async def refuse(*_: object) -> None:
        raise ResponseError("script tried accessing undeclared key")

    monkeypatch.setattr(harness.instance.verbs, "finish", refuse)
    with logged("ERROR", "{message}\n{exception}") as lines:
        await submit_many(harness, 9)
        await eventually(lambda: "Redis refused the end of 4 more attempts\n\n" in lines, within_s=20)
    monkeypatch.setattr(harness.instance.verbs, "finish", finish)
    assert len(lines) == 6
    assert not any("Traceback" in line for line in lines)
