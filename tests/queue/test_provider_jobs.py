"""Handles of provider jobs in checkpoints: their cost, who resumes them, and what versions without jobs do."""

from __future__ import annotations

import asyncio

import msgspec
import pytest
from msgspec.structs import replace
from support import eventually, submission

from imagegen.queue.checkpoint import Checkpoint, calls_under_way, decode_checkpoint
from imagegen.queue.claim import StartResult
from imagegen.tasks.image import PaidImage, StoredImage
from imagegen.tasks.provider_job import AcceptedJob, JobHandle
from imagegen.tasks.retry import MAX_AMBIGUOUS, Retry
from imagegen.tasks.task import WaitReason

JOB = AcceptedJob(JobHandle("openai", "task_1", "0a1b", "https://relay.example/v1/tasks/task_1", 5.0), (0,), 7, "m")


class _OldCheckpoint(msgspec.Struct, rename={"ambiguous_calls": "ambiguous"}):
    """Part of a checkpoint that versions without jobs read."""

    owner: str
    phase: str = "calling"
    attempts: int = 0
    ambiguous_calls: int = 0
    links: tuple[PaidImage, ...] = ()
    images: tuple[StoredImage, ...] = ()


async def started(instance):
    await instance.client_queue.submit(submission("a"))
    claim = await asyncio.wait_for(instance.worker_queue.claim(), 20)
    assert await instance.worker_queue.start(claim) is StartResult.STARTED
    return claim


async def record_job(instance, claim) -> bool:
    claim.checkpoint = replace(claim.checkpoint, job=JOB)
    return await instance.worker_queue.record_job(claim, claim.checkpoint)


async def stored(instance, claim) -> Checkpoint:
    return decode_checkpoint(await instance.connection.commands.get(instance.keys.checkpoint(claim.task.id)))[1]


async def test_a_handle_costs_one_command(make_instance) -> None:
    instance = make_instance()
    claim = await started(instance)
    before = instance.connection.meter.commands["start"]
    assert await record_job(instance, claim)
    assert instance.connection.meter.commands["start"] == before + 1
    assert (await stored(instance, claim)).job == JOB


async def test_a_handle_of_a_cancelled_task_is_refused(make_instance) -> None:
    instance = make_instance()
    claim = await started(instance)
    await instance.client_queue.cancel(claim.task.id)
    assert not await record_job(instance, claim)
    assert claim.lost


async def test_a_handle_of_a_claim_that_was_taken_over_is_refused(make_instance) -> None:
    one, other = make_instance(), make_instance(start=False)
    stale = await started(one)
    (taken,) = await other.parts.takeover.take({stale.entry_id: 0.0}, min_idle_s=0.0)
    stale.confirmed_at = 0.0  # it was not renewed for long
    assert not await record_job(one, stale)
    assert (await stored(one, taken)).job is None


async def test_a_takeover_has_the_job_and_counts_no_ambiguous_call(make_instance) -> None:
    one, other = make_instance(), make_instance(start=False)
    claim = await started(one)
    assert await record_job(one, claim)
    (taken,) = await other.parts.takeover.take({claim.entry_id: 0.0}, min_idle_s=0.0)
    run = taken.checkpoint
    assert (run.job, run.ambiguous_calls, run.attempts) == (JOB, 0, 0)
    assert other.connection.meter.ambiguous == 0
    assert await other.worker_queue.start(taken) is StartResult.STARTED
    assert (taken.checkpoint.attempts, taken.checkpoint.job) == (1, JOB)


async def test_a_released_claim_keeps_its_job(make_instance) -> None:
    one = make_instance()
    claim = await started(one)
    assert await record_job(one, claim)
    await one.worker_queue.release([claim])
    again = await asyncio.wait_for(one.worker_queue.claim(), 20)
    assert await one.worker_queue.start(again) is StartResult.INHERITED
    run = again.checkpoint
    assert (run.job, run.ambiguous_calls, run.attempts) == (JOB, 0, 0)


async def test_a_job_that_redis_evicted_is_written_back_with_the_next_renewal(make_instance) -> None:
    owner, other = make_instance(lease_s=0.6), make_instance(start=False)
    claim = await started(owner)
    assert await record_job(owner, claim)
    redis, key = owner.connection.commands, owner.keys.checkpoint(claim.task.id)
    await redis.delete(key, owner.keys.record(claim.task.id))
    await eventually(lambda: owner.connection.meter.written_back["running"] == 1)
    assert (await stored(owner, claim)).job == JOB
    assert await owner.worker_queue.checkpoint(claim, claim.checkpoint)  # the owner goes on
    (taken,) = await other.parts.takeover.take({claim.entry_id: 0.0}, min_idle_s=0.0)
    assert (taken.checkpoint.job, other.connection.meter.ambiguous) == (JOB, 0)


@pytest.mark.parametrize("is_read", [False, True])
async def test_a_job_stays_with_a_task_that_several_instances_release_before_they_start_it(
    make_instance, is_read: bool
) -> None:
    one = make_instance()
    claim = await started(one)
    assert await record_job(one, claim)
    for _ in range(3):
        await one.worker_queue.release([claim])
        claim = await asyncio.wait_for(one.worker_queue.claim(), 20)
        if is_read:
            await one.worker_queue.read_released(claim)
            assert claim.checkpoint.job == JOB
    expected = StartResult.STARTED if is_read else StartResult.INHERITED
    assert await one.worker_queue.start(claim) is expected
    run = claim.checkpoint
    assert (run.job, run.ambiguous_calls, run.attempts) == (JOB, 0, int(is_read))


async def test_a_retry_keeps_the_job_and_counts_no_attempt(make_instance) -> None:
    one = make_instance()
    claim = await started(one)
    assert await record_job(one, claim)
    await one.worker_queue.retry(claim, Retry(60.0, WaitReason.RETRYING, counts_as_attempt=False))
    run = await stored(one, claim)
    assert (run.job, run.phase, run.attempts) == (JOB, "waiting", 0)


@pytest.mark.parametrize("phase", ["calling", "waiting", "released"])
def test_a_version_without_jobs_does_not_pay_for_a_job_again(phase: str) -> None:
    value = Checkpoint("i", phase, starts=1, attempts=1, job=JOB).encode("1-0")
    old = msgspec.json.decode(value.partition(b" ")[2], type=_OldCheckpoint)
    assert old.ambiguous_calls >= MAX_AMBIGUOUS  # it ends the task as interrupted
    assert decode_checkpoint(value)[1].ambiguous_calls == 0


def test_a_checkpoint_without_a_job_is_read_as_before() -> None:
    value = b'1-0 {"owner":"i","phase":"calling","attempts":1,"ambiguous":1}'
    run = decode_checkpoint(value)[1]
    assert (run.job, run.details, run.ambiguous_calls, run.calling) == (None, None, 1, True)


def test_a_job_of_a_cancelled_task_may_have_been_paid() -> None:
    assert calls_under_way(Checkpoint("i", "waiting", job=JOB).encode("1-0")) == 1
    assert calls_under_way(Checkpoint("i", "calling", job=JOB).encode("1-0")) == 1


async def test_a_job_is_not_taken_if_redis_does_not_allow_a_search_for_its_owner(make_instance, redis_url: str) -> None:
    claim = await started(make_instance())
    await make_instance(start=False).connection.commands.acl_setuser(
        "scanless", enabled=True, passwords=["+word"], keys=["*"], channels=["*"], commands=["+@all", "-scan"]
    )
    scanless = make_instance(start=False, url=redis_url.replace("://", "://scanless:word@", 1))
    assert not await asyncio.wait_for(scanless.worker_queue.take_found_job(claim, "task_1"), 20)
    assert not scanless.connection.health.refused
