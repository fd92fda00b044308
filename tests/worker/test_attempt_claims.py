"""Tests of attempts that lose their claim, or resume one that was released."""

from __future__ import annotations

import asyncio
import time

import pytest
from msgspec.structs import replace

from imagegen.providers.protocol import Call, Reply
from imagegen.queue.checkpoint import Checkpoint
from imagegen.queue.claim import Claim
from imagegen.tasks import transitions
from imagegen.tasks.image import StoredImage
from imagegen.tasks.retry import ClaimLost, Outcome, Succeeded
from tests.conftest import MakeInstance
from tests.support import eventually
from tests.worker.conftest import MakeHarness, Step, fault, images, submission


async def test_a_lost_claim_cancels_its_call_but_not_the_loop(make_harness: MakeHarness) -> None:
    async def hang(_call: Call) -> Reply:
        try:
            await asyncio.Event().wait()
        finally:
            dropped.set()
        raise AssertionError

    dropped = asyncio.Event()
    harness = make_harness(hang, pool=False)
    claim = await harness.claim()
    running = asyncio.create_task(harness.attempts.run(claim))
    await eventually(lambda: harness.provider.calls)
    claim.mark_lost()
    assert isinstance(await asyncio.wait_for(running, 20), ClaimLost)
    assert dropped.is_set()
    assert running.cancelling() == 0


async def test_a_claim_is_lost_even_if_its_call_ignores_cancellation(
    make_harness: MakeHarness,
) -> None:
    async def stubborn(call: Call) -> Reply:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return images(call.count)
        raise AssertionError

    harness = make_harness(stubborn, pool=False)
    claim = await harness.claim()
    running = asyncio.create_task(harness.attempts.run(claim))
    await eventually(lambda: harness.provider.calls)
    claim.mark_lost()
    assert isinstance(await asyncio.wait_for(running, 20), ClaimLost)
    assert running.cancelling() == 0


async def test_a_loop_cancelled_during_a_lost_claim_is_cancelled(make_harness: MakeHarness) -> None:
    async def hang(_call: Call) -> Reply:
        await asyncio.Event().wait()
        raise AssertionError

    harness = make_harness(hang, pool=False)
    claim = await harness.claim()
    running = asyncio.create_task(harness.attempts.run(claim))
    await eventually(lambda: harness.provider.calls)
    claim.mark_lost()
    running.cancel()
    await asyncio.wait([running])
    assert running.cancelled()


async def test_a_checkpoint_of_a_lost_claim_ends_only_the_attempt(
    make_harness: MakeHarness,
) -> None:
    async def stolen(call: Call) -> Reply:
        key = harness.instance.keys.checkpoint(claim.task.id)
        await harness.instance.connection.commands.set(key, Checkpoint("another").encode("9-0"))
        return images(call.count)

    async def and_then() -> None:
        outcomes.append(await harness.attempts.run(claim))
        await asyncio.sleep(0)
        outcomes.append("and goes on")

    outcomes: list[Outcome | str] = []
    harness = make_harness(stolen, per_call=1, pool=False)
    claim = await harness.claim(n=2)
    await asyncio.wait_for(asyncio.create_task(and_then()), 20)
    assert outcomes == [ClaimLost(), "and goes on"]
    assert len(harness.provider.calls) == 1


async def test_a_call_before_a_checkpoint_that_finds_another_owner_is_recorded(make_harness: MakeHarness) -> None:
    async def stolen(call: Call) -> Reply:
        key = harness.instance.keys.checkpoint(ids[0])
        await harness.instance.connection.commands.set(key, Checkpoint("another", starts=1).encode(entries[0]))
        return images(call.count)

    harness = make_harness(stolen, per_call=1)
    task = (await harness.instance.client_queue.submit(submission(n=2))).task
    ids, entries = [task.id], [task.entry_id]

    async def is_recorded() -> bool:
        return (await harness.instance.read(task.id)).possibly_billed_twice == 1

    await eventually(is_recorded)
    assert len(harness.provider.calls) == 1


@pytest.mark.parametrize("state", ["runs", "waits"])
async def test_a_call_of_a_task_that_another_instance_completes_meanwhile_is_recorded(
    make_harness: MakeHarness, make_instance: MakeInstance, state: str
) -> None:
    async def hang(_call: Call) -> Reply:
        await asyncio.Event().wait()
        raise AssertionError

    steps: list[Step] = [hang] if state == "runs" else [images(), fault(500)]
    harness, other = make_harness(*steps, per_call=1, base_s=60.0), make_instance(start=False)
    task = (await harness.instance.client_queue.submit(submission(n=2))).task
    await eventually(lambda: len(harness.provider.calls) == len(steps))
    if state == "waits":
        await eventually(lambda: harness.instance.parts.dispatcher.claimed[task.id].timer)
    theirs = Claim(task.entry_id, task, Checkpoint("another"))
    final = transitions.completed(task, [StoredImage(0), StoredImage(1)], [], now=time.time(), ttl_s=60)
    harness.instance.notifier.add_peer("another")
    await other.worker_queue.finish(theirs, final)
    record = await other.stored(other.keys.record(task.id))
    other.notifier.add_peer("the first")
    other.notifier.publish("change", record=record.decode())

    async def is_recorded() -> bool:
        return (await other.read(task.id)).possibly_billed_twice == 1

    await eventually(is_recorded)
    await eventually(lambda: not harness.instance.parts.dispatcher.held)


async def test_a_claim_lost_earlier_makes_no_call(make_harness: MakeHarness) -> None:
    harness = make_harness(pool=False)
    claim = await harness.claim()
    claim.mark_lost()
    assert isinstance(await harness.attempts.run(claim), ClaimLost)
    assert harness.provider.calls == []


async def test_a_released_task_resumes_with_its_images(make_harness: MakeHarness) -> None:
    one = make_harness(images(1), fault(500), per_call=1, pool=False, base_s=60.0)
    claim = await one.claim(n=2, seed=10)
    await one.pool._report(claim, await one.attempts.run(claim))
    one.instance.worker_queue.quiet()
    await one.instance.crash()
    await one.instance.parts.release_all()
    two = make_harness(per_call=1, pool=False)
    taken = await two.instance.claim()
    outcome = await two.run(taken, Succeeded)
    assert [(image.index, image.seed) for image in outcome.images] == [(0, 10), (1, 11)]
    assert two.provider.seeds == [11]
    assert (taken.checkpoint.attempts, taken.checkpoint.ambiguous_calls) == (2, 0)


async def test_no_call_is_made_if_all_images_exist(make_harness: MakeHarness) -> None:
    harness = make_harness(pool=False)
    claim = await harness.claim()
    claim.checkpoint = replace(claim.checkpoint, images=(StoredImage(0),))
    assert await harness.attempts.run(claim) == Succeeded((StoredImage(0),))
    assert harness.provider.calls == []
