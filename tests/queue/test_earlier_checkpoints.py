"""Running claims of which Redis has an earlier checkpoint, as after a failover that lost the later one."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from imagegen.queue.checkpoint import Checkpoint, decode_checkpoint
from imagegen.queue.claim import Claim, StartResult
from imagegen.tasks.provider_job import AcceptedJob, JobHandle
from imagegen.tasks.retry import Retry
from imagegen.tasks.task import WaitReason
from tests.conftest import Instance, MakeInstance
from tests.queue_budgets import TOTAL
from tests.support import eventually, submission

JOB = AcceptedJob(JobHandle("openai", "task_1", "0a1b", "https://relay.example/v1/tasks/task_1", 5.0), (0,), 7, "m")


async def with_earlier_checkpoint(instance: Instance) -> Claim:
    """Return a claim that has written a second checkpoint; Redis has the first one."""
    await instance.client_queue.submit(submission("a"))
    claim = await instance.claim()
    assert await instance.worker_queue.start(claim) is StartResult.STARTED
    first = claim.stored_bytes
    assert first
    claim.checkpoint = replace(claim.checkpoint, warnings=("second",))
    assert await instance.worker_queue.checkpoint(claim, claim.checkpoint)
    await instance.connection.commands.set(instance.keys.checkpoint(claim.task.id), first)
    return claim


async def stored(instance: Instance, claim: Claim) -> Checkpoint:
    return decode_checkpoint(await instance.stored(instance.keys.checkpoint(claim.task.id)))[1]


@pytest.mark.parametrize("is_confirmed", [True, False])
async def test_a_running_task_goes_on_from_what_its_instance_knows(
    make_instance: MakeInstance, is_confirmed: bool
) -> None:
    instance = make_instance()
    claim = await with_earlier_checkpoint(instance)
    claim.contested = not is_confirmed
    checkpoint = replace(claim.checkpoint, warnings=("second", "third"))
    assert await instance.worker_queue.checkpoint(claim, checkpoint)
    assert not claim.lost
    assert await stored(instance, claim) == checkpoint


async def test_a_job_that_was_accepted_is_kept(make_instance: MakeInstance) -> None:
    instance = make_instance()
    claim = await with_earlier_checkpoint(instance)
    assert await instance.worker_queue.record_job(claim, replace(claim.checkpoint, job=JOB))
    assert not claim.lost
    assert (await stored(instance, claim)).job == JOB


async def test_a_task_that_waits_for_another_try_keeps_its_claim(make_instance: MakeInstance) -> None:
    instance = make_instance()
    claim = await with_earlier_checkpoint(instance)
    await instance.worker_queue.retry(claim, Retry(60.0, WaitReason.RETRYING))
    assert not claim.lost
    assert (await stored(instance, claim)).warnings == ("second",)


async def test_a_further_call_is_reserved(make_instance: MakeInstance) -> None:
    instance = make_instance()
    claim = await with_earlier_checkpoint(instance)
    assert await instance.worker_queue.reserve_more(claim, 1, ((TOTAL, 9),)) is True
    assert not claim.lost


async def test_the_later_checkpoint_is_written_back_after_a_loss(make_instance: MakeInstance) -> None:
    instance = make_instance()
    claim = await with_earlier_checkpoint(instance)
    instance.parts.recovery.notice("another server answers")
    await eventually(instance.connection.recovered.is_set)
    assert (await stored(instance, claim)).warnings == ("second",)
    assert await instance.worker_queue.checkpoint(claim, claim.checkpoint)


async def test_a_checkpoint_that_is_written_while_claims_are_restored_is_kept(make_instance: MakeInstance) -> None:
    instance = make_instance()
    claim = await with_earlier_checkpoint(instance)
    restore, third = instance.verbs.restore_claims, replace(claim.checkpoint, warnings=("third",))
    writes = [third]

    async def write_and_restore(*args: object) -> object:
        reply = await restore(*args)  # type: ignore[arg-type]
        if writes:
            await instance.worker_queue.checkpoint(claim, writes.pop())
            await instance.connection.commands.set(instance.keys.checkpoint(claim.task.id), reply[0].checkpoint)
        return reply

    instance.verbs.restore_claims = write_and_restore  # type: ignore[assignment]
    await instance.parts.recovery.restore_claims([claim])
    assert await stored(instance, claim) == third
