"""Ownership of tasks, and the record of calls that may have been paid twice."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from msgspec.structs import replace

from imagegen.queue.checkpoint import Checkpoint
from imagegen.queue.claim import Claim, StartResult
from imagegen.queue.codec import decode_record
from imagegen.tasks import transitions
from imagegen.tasks.image import StoredImage
from imagegen.tasks.retry import Retry
from imagegen.tasks.task import State, Task, TaskError, WaitReason
from tests.conftest import Instance, MakeInstance
from tests.queue.command_counts import started
from tests.support import submission

Pair = tuple[Instance, Instance]

IMAGE = StoredImage(0, "image/png", 10, 8, 8, "a" * 64)


async def end(instance: Instance, claim: Claim, outcome: str = "completed") -> Task:
    """Finish as the pool does: with the count of the claim's own checkpoint."""
    now = time.time()
    task = transitions.failed(claim.task, TaskError("upstream_error", "no", retryable=True), now=now, ttl_s=60)
    if outcome == "completed":
        task = transitions.completed(claim.task, [IMAGE], [], now=now, ttl_s=60)
    return await instance.worker_queue.finish(claim, task)


async def claimed(instance: Instance, name: object = "a") -> Claim:
    await instance.client_queue.submit(submission(name))
    return await instance.claim()


async def take_over(instance: Instance, claim: Claim) -> Claim:
    """Take over an entry as after an expired lease."""
    (taken,) = await instance.parts.takeover.take({claim.entry_id: 0.0}, min_idle_s=0.0)
    return taken


async def stored(instance: Instance, task_id: str) -> Task:
    """Return the task as stored in Redis."""
    return decode_record(await instance.stored(instance.keys.record(task_id)))[1]


@pytest.fixture
async def two(make_instance: MakeInstance) -> Pair:
    """Return two instances, of which only the first reads; the second takes over by command of the test."""
    one, other = make_instance(), make_instance(start=False)
    return one, other


@pytest.mark.parametrize("outcome", ["completed", "failed"])
async def test_a_stale_owner_that_finishes_first_records_the_call_of_the_new_owner(two: Pair, outcome: str) -> None:
    one, other = two
    stale = await claimed(one)
    assert await one.worker_queue.start(stale) is StartResult.STARTED
    taken = await take_over(other, stale)
    assert await other.worker_queue.start(taken) is StartResult.STARTED
    final = await end(one, stale, outcome)
    assert (final.state.value, final.possibly_billed_twice) == (outcome, 1)
    assert (await stored(one, final.id)).possibly_billed_twice == 1
    assert (await end(other, taken)).possibly_billed_twice == 1


async def test_a_stale_owner_adds_the_losses_that_the_new_owner_had(two: Pair) -> None:
    one, other = two
    stale = await claimed(one)
    await one.worker_queue.start(stale)
    taken = await take_over(other, stale)
    await other.worker_queue.start(taken)
    taken.checkpoint = replace(taken.checkpoint, ambiguous_calls=2)
    await other.worker_queue.retry(taken, Retry(60.0, WaitReason.RETRYING))
    assert (await end(one, stale)).possibly_billed_twice == 2


async def test_a_cancel_by_a_stale_owner_records_the_call_of_the_new_owner(two: Pair) -> None:
    one, other = two
    stale = await claimed(one)
    await one.worker_queue.start(stale)
    await other.worker_queue.start(await take_over(other, stale))
    cancelled = await one.cancel(stale.task.id)
    assert (cancelled.state, cancelled.possibly_billed_twice) == (State.CANCELLED, 1)
    assert (await stored(one, stale.task.id)).possibly_billed_twice == 1


async def test_a_new_owner_makes_no_call_if_the_stale_owner_finished(two: Pair) -> None:
    one, other = two
    stale = await claimed(one)
    await one.worker_queue.start(stale)
    taken = await take_over(other, stale)
    await end(one, stale)
    assert await other.worker_queue.start(taken) is StartResult.LOST


async def test_a_retry_makes_no_call_if_the_stale_owner_finished(two: Pair) -> None:
    one, other = two
    stale = await claimed(one)
    await one.worker_queue.start(stale)
    taken = await take_over(other, stale)
    await other.worker_queue.start(taken)
    await end(one, stale)
    assert not await other.worker_queue.checkpoint(taken, taken.checkpoint)
    assert taken.lost


async def test_a_claim_released_after_a_stale_finish_makes_no_call(two: Pair) -> None:
    one, other = two
    stale = await claimed(one)
    await one.worker_queue.start(stale)
    taken = await take_over(other, stale)
    await other.worker_queue.release([taken])
    third = await one.claim()
    assert await one.worker_queue.start(third) is StartResult.INHERITED
    assert (await end(one, stale)).state is State.COMPLETED
    assert await one.worker_queue.start(third) is StartResult.LOST


async def test_an_owner_verifies_a_doubtful_claim_before_it_pays(make_instance: MakeInstance) -> None:
    one, other = make_instance(lease_s=1.0), make_instance(start=False)
    stale = await claimed(one)
    await one.crash()
    stale.confirmed_at -= 1.0
    await take_over(other, stale)
    assert await one.worker_queue.start(stale) is StartResult.LOST


async def test_an_owner_with_a_valid_claim_continues_after_a_long_silence(make_instance: MakeInstance) -> None:
    one = make_instance(lease_s=1.0)
    claim = await claimed(one)
    claim.confirmed_at -= 1.0
    assert await one.worker_queue.start(claim) is StartResult.STARTED


async def test_a_start_just_before_a_takeover_counts_as_possibly_paid(two: Pair) -> None:
    one, other = two
    stale = await claimed(one)
    taken = await take_over(other, stale)
    assert await one.worker_queue.start(stale) is StartResult.STARTED  # it was on its way to Redis when the lease ended
    assert await other.worker_queue.start(taken) is StartResult.INHERITED
    assert await other.worker_queue.start(taken) is StartResult.STARTED
    assert taken.checkpoint.ambiguous_calls == 1
    assert (await end(one, stale)).possibly_billed_twice == 1


async def test_a_finish_without_a_merge_costs_no_extra_command(make_instance: MakeInstance) -> None:
    one = make_instance(start=False)
    await one.verbs.create_group()
    (claim,) = await started(one, "a")
    before = await calls_of(one, "get")
    await end(one, claim)
    assert await calls_of(one, "get") == before


async def calls_of(instance: Instance, name: str) -> int:
    stats = await instance.connection.commands.info("commandstats")
    return int(stats.get(f"cmdstat_{name}", {"calls": 0})["calls"])


@pytest.mark.parametrize("garbage", [b"", b"junk", b"\xff\xfe", b"1-0 {}", b"1-0 " + b"[" * 5_000, b'1-0 {"owner":3}'])
async def test_an_unreadable_checkpoint_counts_as_possibly_paid(two: Pair, garbage: bytes) -> None:
    one, other = two
    stale = await claimed(one)
    await one.worker_queue.start(stale)
    await one.connection.commands.set(one.keys.checkpoint(stale.task.id), garbage)
    taken = await take_over(other, stale)
    assert taken.checkpoint.ambiguous_calls == 1
    assert await other.worker_queue.start(taken) is StartResult.STARTED
    assert (await end(other, taken)).possibly_billed_twice == 1


@pytest.mark.parametrize("garbage", [b"junk", None])
async def test_an_owner_overwrites_an_unreadable_checkpoint(two: Pair, garbage: bytes | None) -> None:
    one, _ = two
    claim = await claimed(one)
    await spoil(one, one.keys.checkpoint(claim.task.id), garbage)
    while (came := await one.worker_queue.start(claim)) is StartResult.INHERITED:
        pass
    assert came is StartResult.STARTED
    await spoil(one, one.keys.checkpoint(claim.task.id), garbage)
    assert await one.worker_queue.checkpoint(claim, Checkpoint("me", starts=2))


async def spoil(instance: Instance, key: str, garbage: bytes | None) -> None:
    """Replace our value by other bytes or another type."""
    commands = instance.connection.commands
    await commands.delete(key)
    await (commands.set(key, garbage) if garbage is not None else commands.sadd(key, "x"))


@pytest.mark.parametrize("garbage", [b"junk", b"99 of something", None])
async def test_an_unreadable_record_affects_only_its_task(two: Pair, garbage: bytes | None) -> None:
    one, _ = two
    claims = [await claimed(one, name) for name in ("a", "b")]
    for claim in claims:
        await one.worker_queue.start(claim)
    await spoil(one, one.keys.record(claims[0].task.id), garbage)
    finals = await asyncio.gather(*(end(one, claim) for claim in claims))
    assert [final.state for final in finals] == [State.COMPLETED] * 2


@pytest.mark.parametrize("garbage", [b"junk", None])
async def test_a_submit_replaces_an_unreadable_record(two: Pair, garbage: bytes | None) -> None:
    _, other = two
    await other.verbs.create_group()
    await spoil(other, other.keys.record(submission("a").task_id), garbage)
    await other.client_queue.submit(submission("a"))
    assert (await stored(other, submission("a").task_id)).state is State.PENDING


async def test_an_interrupted_call_is_recorded_if_the_new_owner_dies(make_instance: MakeInstance) -> None:
    one, other, third = make_instance(lease_s=1.0), make_instance(start=False), make_instance(start=False)
    stale = await claimed(one)
    await one.worker_queue.start(stale)
    await one.crash()
    await take_over(other, stale)
    key = one.keys.checkpoint(stale.task.id)
    assert await one.connection.commands.pttl(key) > 7_000  # as if it were written just now
    taken = await take_over(third, stale)
    assert taken.checkpoint.ambiguous_calls == 1


async def test_an_expired_checkpoint_counts_as_a_call_after_each_takeover(make_instance: MakeInstance) -> None:
    one, other, third = make_instance(), make_instance(start=False), make_instance(start=False)
    stale = await claimed(one)
    await one.worker_queue.start(stale)
    await one.connection.commands.delete(one.keys.checkpoint(stale.task.id))
    await other.parts.takeover.take({stale.entry_id: 10_000.0}, min_idle_s=0.0)
    taken = await take_over(third, stale)
    assert taken.checkpoint.ambiguous_calls == 1


async def copied(instance: Instance, claim: Claim) -> Claim:
    """Return the claim of a second entry of the task, as after the restore of an old stream."""
    commands = instance.connection.commands
    entries: Any = await commands.xrange(instance.keys.stream, claim.entry_id, claim.entry_id)
    ((_, fields),) = entries
    await commands.xadd(instance.keys.stream, fields)
    return await instance.claim()


async def starts(instance: Instance, claim: Claim) -> list[StartResult]:
    """Return all replies until the decision whether a call may be made."""
    answers = [await instance.worker_queue.start(claim)]
    while answers[-1] is StartResult.INHERITED:
        answers.append(await instance.worker_queue.start(claim))
    return answers


@pytest.mark.parametrize("first", [0, 1])
async def test_a_task_with_two_entries_is_run_once(make_instance: MakeInstance, first: int) -> None:
    one = make_instance(slots=4)
    claim = await claimed(one)
    claims = [claim, await copied(one, claim)]
    runs, idles = claims[first], claims[1 - first]
    assert await starts(one, runs) == [StartResult.STARTED]
    assert await starts(one, idles) == [StartResult.INHERITED, StartResult.LOST]
    assert await one.connection.commands.xlen(one.keys.stream) == 1
    assert (await end(one, runs)).state is State.COMPLETED
    assert await one.connection.commands.xlen(one.keys.stream) == 0


async def test_an_entry_restored_after_the_finish_is_not_run(make_instance: MakeInstance) -> None:
    one = make_instance(slots=4)
    claim = await claimed(one)
    second = await copied(one, claim)
    await one.worker_queue.start(claim)
    await end(one, claim)
    assert await starts(one, second) == [StartResult.INHERITED, StartResult.LOST]
    assert await one.connection.commands.xlen(one.keys.stream) == 0
