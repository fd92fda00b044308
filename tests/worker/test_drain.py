"""Tests of the drain of the pool: what it waits for, and what it releases."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from msgspec.structs import replace

from imagegen.providers.protocol import Call, Reply
from imagegen.tasks.task import State
from imagegen.worker.circuit_breaker import BreakerConfig
from tests.support import eventually
from tests.worker.conftest import MakeHarness, failure, fault, images
from tests.worker.pool_load import Switch, hang


def held_until(answered: asyncio.Event) -> Callable[[Call], Awaitable[Reply]]:
    async def held(call: Call) -> Reply:
        await answered.wait()
        return images(call.count)

    return held


async def test_drain_waits_for_running_attempts(make_harness: MakeHarness) -> None:
    harness = make_harness(default=Switch(call_s=0.1))
    task_id = await harness.submit()
    await eventually(lambda: harness.provider.running)
    await asyncio.wait_for(harness.drain(60.0), 20)
    assert harness.task(task_id).state is State.COMPLETED


async def test_a_drain_waits_for_a_running_call_and_leaves_the_next_one_of_its_task_to_another_instance(
    make_harness: MakeHarness,
) -> None:
    one, answered = make_harness(per_call=1), asyncio.Event()
    one.provider.default = held_until(answered)
    task_id = await one.submit(n=2)
    await eventually(lambda: one.provider.running)
    one.pool.quiet()
    answered.set()
    await one.drain(60.0)
    assert (len(one.provider.calls), one.task(task_id).state) == (1, State.PENDING)
    await one.instance.crash()
    await one.instance.parts.release_all()
    two = make_harness(per_call=1)
    await eventually(lambda: two.instance.task_cache.finished(task_id))
    (task,) = await two.finished(task_id)
    assert (task.state, len(task.images), task.attempts) == (State.COMPLETED, 2, 1)
    assert (len(two.provider.calls), task.possibly_billed_twice) == (1, 0)


async def test_a_task_makes_no_further_call_after_its_deadline(make_harness: MakeHarness) -> None:
    one, answered = make_harness(per_call=1), asyncio.Event()
    one.provider.default = held_until(answered)
    task_id = await one.submit(n=3)
    await eventually(lambda: one.provider.running)
    await one.pass_time(601.0)
    answered.set()
    (task,) = await one.finished(task_id)
    assert (task.state, len(task.images), len(task.warnings), len(one.provider.calls)) == (State.COMPLETED, 1, 1, 1)


async def test_drain_releases_running_attempts_at_its_deadline(make_harness: MakeHarness) -> None:
    one = make_harness(default=hang)
    task_id = await one.submit()
    await eventually(lambda: one.provider.running)
    await asyncio.wait_for(one.drain(0.05), 20)
    await one.instance.crash()
    await one.instance.parts.release_all()
    two = make_harness()
    await eventually(lambda: two.provider.calls)
    await eventually(lambda: task_id in two.instance.task_cache.live or two.instance.task_cache.finished(task_id))
    [task] = await two.finished(task_id)
    assert (task.state, task.possibly_billed_twice) == (State.COMPLETED, 1)


async def test_drain_ends_waits_and_another_instance_claims_them(make_harness: MakeHarness) -> None:
    one = make_harness(fault(429, retry_after_s=60.0), tempo=BreakerConfig())
    await one.submit("first")
    await eventually(lambda: one.pacing.blocked("m"))
    task_ids = [await one.submit(i) for i in range(8)]
    await eventually(lambda: len(one.pool.parking) >= 8)
    await asyncio.wait_for(one.drain(60.0), 20)
    await one.instance.crash()
    await one.instance.parts.release_all()
    two = make_harness()
    await eventually(lambda: all(two.instance.task_cache.finished(task_id) for task_id in task_ids))
    tasks = await two.finished(*task_ids)
    assert {(task.state, task.attempts, task.possibly_billed_twice) for task in tasks} == {(State.COMPLETED, 1, 0)}


async def test_an_interrupted_task_shows_the_attempts_that_were_made(make_harness: MakeHarness) -> None:
    harness = make_harness(pool=False)
    claim = await harness.claim()
    claim.checkpoint = replace(claim.checkpoint, starts=2, attempts=2, ambiguous_calls=2)
    dispatcher = harness.instance.parts.dispatcher
    dispatcher.leave_slot(claim)
    dispatcher.put(claim)
    harness.pool.start()
    (task,) = await harness.finished(claim.task.id)
    assert (failure(task).code, task.attempts, task.possibly_billed_twice) == ("interrupted", 2, 2)
