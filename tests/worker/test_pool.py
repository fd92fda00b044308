"""Tests of the pool: its slots, its loops, its parked claims, and how each outcome ends."""

from __future__ import annotations

import asyncio
from functools import partial

import pytest
from msgspec.structs import replace

from imagegen.providers.protocol import Call, Reply
from imagegen.queue.verbs.finish import FinishItem, FinishReply
from imagegen.tasks.provider_job import AcceptedJob, JobHandle
from imagegen.tasks.retry import Failed
from imagegen.tasks.task import State, TaskError, WaitReason
from imagegen.worker import parking, pool
from imagegen.worker.circuit_breaker import BreakerConfig
from tests.support import eventually
from tests.worker.conftest import MakeHarness, WorkerHarness, failure, fault, images, links, loss, refused
from tests.worker.pool_load import Switch, hang, states, submit_many


async def pause(harness: WorkerHarness) -> None:
    """Let the first call be refused for a minute and cancel its task."""
    first = await harness.submit("first")
    await eventually(lambda: harness.pacing.blocked("m"))
    await harness.instance.client_queue.cancel(first)


async def healthy(harness: WorkerHarness) -> None:
    """Check that all loops are alive: as many tasks run at once and complete."""
    provider = harness.provider
    ends = asyncio.Event()

    async def held(call: Call) -> Reply:
        await ends.wait()
        return images(call.count)

    provider.most, provider.default = 0, held
    task_ids = [await harness.submit(f"healthy {i}") for i in range(10)]
    await eventually(lambda: provider.running == 5)
    ends.set()
    assert await states(harness, task_ids) == {State.COMPLETED}
    assert provider.most == 5


async def test_no_more_tasks_run_than_there_are_slots(make_harness: MakeHarness) -> None:
    harness = make_harness(default=Switch(call_s=0.01), slots=3)
    assert await states(harness, await submit_many(harness, 20)) == {State.COMPLETED}
    assert (len(harness.provider.calls), harness.provider.most) == (20, 3)


async def test_one_further_task_runs_while_a_result_is_written(
    make_harness: MakeHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = make_harness(slots=1, pool=False)
    verbs, writes = harness.instance.verbs, asyncio.Event()
    finish = verbs.finish

    async def late(item: FinishItem) -> FinishReply:
        await writes.wait()
        return await finish(item)

    monkeypatch.setattr(verbs, "finish", late)
    task_ids = await submit_many(harness, 4)
    harness.pool.start()
    await eventually(lambda: len(harness.provider.calls) == 2)
    await harness.instance.connection.ping()
    assert len(harness.provider.calls) == len(harness.instance.parts.dispatcher.held) == 2
    here = harness.instance.parts.monitor.local_status()
    assert (here.in_flight, here.retrying) == (0, 0)
    writes.set()
    assert await states(harness, task_ids) == {State.COMPLETED}


async def test_a_task_that_always_fails_fails_after_its_attempts(make_harness: MakeHarness) -> None:
    harness = make_harness(default=fault(500))
    [task] = await harness.finished(await harness.submit())
    assert (task.state, failure(task).code, task.attempts) == (State.FAILED, "upstream_error", 3)
    assert len(harness.provider.calls) == 3


async def test_faulty_tasks_one_after_the_other_each_fail_after_their_attempts(make_harness: MakeHarness) -> None:
    harness = make_harness(default=fault(500), base_s=0.001)
    for i in range(8):
        await harness.finished(await harness.submit(i))
    assert len(harness.provider.calls) == 24
    assert harness.pacing.blocked("m") is None


async def test_images_that_are_paid_for_complete_a_task_at_its_deadline(make_harness: MakeHarness) -> None:
    async def limit_until_the_deadline(_call: Call) -> Reply:
        await harness.pass_time(15)
        raise fault(429, retry_after_s=0.05)

    harness = make_harness(images(1), default=limit_until_the_deadline, per_call=1, deadline_s=15.0)
    [task] = await harness.finished(await harness.submit(n=2))
    assert (task.state, len(task.images)) == (State.COMPLETED, 1)
    assert harness.task(task.id).warnings


async def test_a_second_loss_ends_the_task(make_harness: MakeHarness) -> None:
    harness = make_harness(default=loss(), max_attempts=10)
    [task] = await harness.finished(await harness.submit())
    assert (failure(task).code, task.possibly_billed_twice) == ("upstream_timeout", 2)
    assert len(harness.provider.calls) == 2


async def test_a_task_between_its_attempts_holds_no_slot(make_harness: MakeHarness) -> None:
    harness = make_harness(fault(500), slots=1, base_s=60.0)
    waiting = await harness.submit("waits")
    await eventually(lambda: harness.task(waiting).reason is WaitReason.RETRYING)
    assert await states(harness, [await harness.submit("goes on")]) == {State.COMPLETED}


async def test_an_unforeseen_error_fails_its_task_and_no_loop(make_harness: MakeHarness) -> None:
    harness = make_harness(*[ZeroDivisionError()] * 10)
    assert await states(harness, await submit_many(harness, 10)) == {State.FAILED}
    await healthy(harness)


async def test_an_unforeseen_error_loses_no_paid_images(
    make_harness: MakeHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "UNFORESEEN_RETRY_S", 0.01)
    harness = make_harness(default=links(), max_attempts=3)
    harness.image_saver.faults[:] = [OSError(24, "Too many open files")]
    assert await states(harness, [await harness.submit("once")]) == {State.COMPLETED}
    assert len(harness.provider.calls) == 1
    harness.image_saver.faults[:] = [ZeroDivisionError()] * 3
    assert await states(harness, [await harness.submit("always")]) == {State.FAILED}
    assert len(harness.provider.calls) == 2


async def test_an_unwritable_outcome_ends_no_loop(make_harness: MakeHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(*_: object) -> None:
        raised.append(1)
        raise ZeroDivisionError

    raised: list[int] = []
    harness = make_harness()
    with monkeypatch.context() as patch:
        patch.setattr(harness.instance.worker_queue, "finish", broken)
        for i in range(6):
            await harness.submit(i)
        await eventually(lambda: len(raised) >= 6)
    await healthy(harness)


async def test_cancelled_tasks_drop_their_calls_and_no_loop(make_harness: MakeHarness) -> None:
    harness = make_harness(default=hang)
    for i in range(6):
        task_id = await harness.submit(i)
        await eventually(lambda: harness.provider.running)
        cancelled = await harness.instance.cancel(task_id)
        assert cancelled.state is State.CANCELLED
        await eventually(lambda: not harness.provider.running)
        assert harness.task(task_id).state is State.CANCELLED
    await healthy(harness)


def has_called(harness: WorkerHarness, times: int) -> bool:
    return len(harness.provider.calls) == times and not harness.provider.running


async def test_claims_lost_at_a_checkpoint_end_no_loop(make_harness: MakeHarness) -> None:
    async def stolen(call: Call) -> Reply:
        for claim in list(harness.instance.parts.leases.dispatcher.held.values()):
            key = harness.instance.keys.checkpoint(claim.task.id)
            await harness.instance.connection.commands.set(key, b'9-0 {"owner":"other"}')
        return images(call.count)

    harness = make_harness(*[stolen] * 6, per_call=1)
    for i in range(6):
        await harness.submit(i, n=2)
        await eventually(partial(has_called, harness, i + 1))
    await healthy(harness)


async def test_a_parked_task_resumes(make_harness: MakeHarness) -> None:
    tempo = BreakerConfig(probe_s=0.1, longest_s=60.0, step_s=0.01)
    harness = make_harness(fault(429, retry_after_s=15.0), tempo=tempo)
    first = await harness.submit("first")
    await eventually(lambda: harness.pacing.blocked("m"))
    task_ids = [first, *await submit_many(harness, 8)]
    await eventually(lambda: len(harness.pool.parking) == 8)
    await harness.pass_time(15)
    assert await states(harness, task_ids) == {State.COMPLETED}
    assert harness.provider.calls[1:]


async def test_a_cancelled_retry_keeps_its_slot_until_its_call_is_closed(make_harness: MakeHarness) -> None:
    closing, closed = asyncio.Event(), asyncio.Event()

    async def slow_to_close(_call: Call) -> Reply:
        try:
            return await hang(_call)
        finally:
            closing.set()
            await closed.wait()

    harness = make_harness(fault(500), slow_to_close, slots=1)
    cancelled = await harness.submit("cancelled")
    await eventually(lambda: len(harness.provider.calls) == 2)
    after = await harness.submit("after")
    await harness.instance.client_queue.cancel(cancelled)
    await closing.wait()
    await harness.instance.connection.ping()
    assert len(harness.provider.calls) == 2
    closed.set()
    assert await states(harness, [after]) == {State.COMPLETED}


async def test_a_cancelled_parked_task_frees_its_place(
    make_harness: MakeHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parking, "MAX_PARKED", 1)
    harness = make_harness(fault(429, retry_after_s=60.0), tempo=BreakerConfig(), slots=2)
    await pause(harness)
    parked = await harness.submit("parked")
    await eventually(lambda: len(harness.pool.parking) == 1)
    in_slot = await harness.submit("in its slot")
    await eventually(lambda: harness.pacing.waiters)
    assert len(harness.pool.parking) == 1
    await harness.instance.client_queue.cancel(parked)
    await harness.submit("next")
    await eventually(lambda: {claim.task.id for claim in harness.pool.parking._parked} not in ({parked}, set()))
    assert harness.task(in_slot).reason is WaitReason.UPSTREAM_RATE_LIMITED


async def test_a_task_that_waits_is_ended_by_its_deadline_alone(make_harness: MakeHarness) -> None:
    harness = make_harness(default=refused(), deadline_s=0.8)
    tasks = await harness.finished(*await submit_many(harness, 20))
    assert {(task.state, failure(task).code) for task in tasks} <= {
        (State.FAILED, "upstream_overloaded"), (State.FAILED, "upstream_error"), (State.FAILED, "upstream_timeout")
    }  # fmt: skip
    assert all(task.finished_at and task.finished_at - task.created_at >= 0.7 for task in tasks)


def is_next_spaced(harness: WorkerHarness, count: int) -> bool:
    """Return whether so many calls were made, and the next one waits for its turn."""
    return len(harness.provider.calls) == count and bool(harness.pacing.waiters)


async def test_a_rate_spaces_the_calls_of_the_pool(make_harness: MakeHarness) -> None:
    harness = make_harness(rate_per_min=60 / 15)
    task_ids = await submit_many(harness, 8)
    await eventually(lambda: any(harness.task(i).reason is WaitReason.UPSTREAM_RATE_LIMITED for i in task_ids))
    for count in range(1, 8):
        await eventually(partial(is_next_spaced, harness, count))
        await harness.pass_time(15)
    assert await states(harness, task_ids) == {State.COMPLETED}
    times = harness.provider.times
    assert times[-1] - times[0] >= 7 * 15 - 5


async def test_a_deadline_ends_a_parked_task(make_harness: MakeHarness) -> None:
    harness = make_harness(fault(429, retry_after_s=60.0), tempo=BreakerConfig(), deadline_s=15.0)
    await pause(harness)
    task_id = await harness.submit("parked")
    await eventually(lambda: len(harness.pool.parking))
    await harness.pass_time(15)
    [task] = await harness.finished(task_id)
    assert (task.state, failure(task).code) == (State.FAILED, "upstream_rate_limited")
    assert len(harness.pool.parking) == 0


async def test_excess_parked_claims_are_released_to_other_instances(
    make_harness: MakeHarness,
) -> None:
    tempo = BreakerConfig(0.05, 0.1, longest_s=60.0, step_s=0.01)
    one = make_harness(fault(429, retry_after_s=15.0), default=Switch(call_s=0.1), slots=2, tempo=tempo)
    first = await one.submit("first")
    await eventually(lambda: one.pacing.blocked("m"))
    task_ids = [first, *await submit_many(one, 40)]
    await eventually(lambda: len(one.pool.parking) == 40)
    two = make_harness(slots=5)
    await eventually(lambda: not one.instance.notifier.alone)
    await one.pass_time(15)
    await eventually(lambda: len(two.provider.calls) >= 20)
    await eventually(
        lambda: all(two.instance.task_cache.finished(i) or one.instance.task_cache.finished(i) for i in task_ids)
    )
    assert len(one.provider.calls) + len(two.provider.calls) == 42


@pytest.mark.parametrize(("renewals", "cancelled"), [(0, ["job"]), (1, [])])
async def test_a_job_that_runs_at_the_end_of_its_task_is_cancelled_unless_it_ended_and_is_polled_for_a_fresh_link(
    make_harness: MakeHarness, renewals: int, cancelled: list[str]
) -> None:
    harness, dropped = make_harness(pool=False), list[str]()
    harness.instance.worker_queue.on_job_dropped = lambda _claim, handle, _price: dropped.append(handle.id)
    claim = await harness.claim()
    job = AcceptedJob(JobHandle("scripted", "job"), (0,), renewals=renewals)
    claim.checkpoint = replace(claim.checkpoint, job=job)
    await harness.pool._report(claim, Failed(TaskError("upstream_timeout", "the deadline", retryable=True)))
    assert dropped == cancelled
