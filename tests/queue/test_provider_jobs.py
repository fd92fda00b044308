"""Handles of provider jobs in checkpoints: their cost, who resumes them, and what versions without jobs do."""

from __future__ import annotations

import asyncio
import time

import msgspec
import pytest
from msgspec.structs import replace

from imagegen.errors import QueueUnavailable
from imagegen.queue import takeover
from imagegen.queue.checkpoint import Checkpoint, calls_under_way, decode_checkpoint
from imagegen.queue.claim import Claim, StartResult
from imagegen.queue.verbs import take_found_job
from imagegen.queue.verbs.take_found_job import SCAN_COUNT
from imagegen.redis_client.server_info import ServerInfo
from imagegen.tasks.image import PaidImage, StoredImage
from imagegen.tasks.provider_job import AcceptedJob, JobHandle, SentCall
from imagegen.tasks.retry import MAX_AMBIGUOUS, Retry
from imagegen.tasks.task import TaskError, WaitReason
from imagegen.tasks.transitions import completed, failed
from tests.conftest import Instance, MakeInstance
from tests.support import eventually, over_rows, submission

JOB = AcceptedJob(JobHandle("openai", "task_1", "0a1b", "https://relay.example/v1/tasks/task_1", 5.0), (0,), 7, "m")


class _OldCheckpoint(msgspec.Struct, rename={"ambiguous_calls": "ambiguous"}):
    """Part of a checkpoint that versions without jobs read."""

    owner: str
    phase: str = "calling"
    attempts: int = 0
    ambiguous_calls: int = 0
    links: tuple[PaidImage, ...] = ()
    images: tuple[StoredImage, ...] = ()


async def started(instance: Instance) -> Claim:
    await instance.client_queue.submit(submission("a"))
    claim = await instance.claim()
    assert await instance.worker_queue.start(claim) is StartResult.STARTED
    return claim


async def record_job(instance: Instance, claim: Claim) -> bool:
    claim.checkpoint = replace(claim.checkpoint, job=JOB)
    return await instance.worker_queue.record_job(claim, claim.checkpoint)


async def stored(instance: Instance, claim: Claim) -> Checkpoint:
    return decode_checkpoint(await instance.stored(instance.keys.checkpoint(claim.task.id)))[1]


async def test_a_handle_costs_one_command(make_instance: MakeInstance) -> None:
    instance = make_instance()
    claim = await started(instance)
    before = instance.connection.meter.commands["start"]
    assert await record_job(instance, claim)
    assert instance.connection.meter.commands["start"] == before + 1
    assert (await stored(instance, claim)).job == JOB


async def test_a_handle_of_a_cancelled_task_is_refused(make_instance: MakeInstance) -> None:
    instance = make_instance()
    claim = await started(instance)
    await instance.client_queue.cancel(claim.task.id)
    assert not await record_job(instance, claim)
    assert claim.lost


async def test_a_handle_of_a_claim_that_was_taken_over_is_refused(make_instance: MakeInstance) -> None:
    one, other = make_instance(), make_instance(start=False)
    stale = await started(one)
    (taken,) = await other.parts.takeover.take({stale.entry_id: 0.0}, min_idle_s=0.0)
    stale.confirmed_at = 0.0  # it was not renewed for long
    assert not await record_job(one, stale)
    assert (await stored(one, taken)).job is None


async def test_a_takeover_has_the_job_and_counts_no_ambiguous_call(make_instance: MakeInstance) -> None:
    one, other = make_instance(), make_instance(start=False)
    claim = await started(one)
    assert await record_job(one, claim)
    (taken,) = await other.parts.takeover.take({claim.entry_id: 0.0}, min_idle_s=0.0)
    run = taken.checkpoint
    assert (run.job, run.ambiguous_calls, run.attempts) == (JOB, 0, 0)
    assert other.connection.meter.ambiguous == 0
    assert await other.worker_queue.start(taken) is StartResult.STARTED
    assert (taken.checkpoint.attempts, taken.checkpoint.job) == (1, JOB)


async def test_a_released_claim_keeps_its_job(make_instance: MakeInstance) -> None:
    one = make_instance()
    claim = await started(one)
    assert await record_job(one, claim)
    await one.worker_queue.release([claim])
    again = await one.claim()
    assert await one.worker_queue.start(again) is StartResult.INHERITED
    run = again.checkpoint
    assert (run.job, run.ambiguous_calls, run.attempts) == (JOB, 0, 0)


@pytest.mark.parametrize("has_job", [False, True])
async def test_a_released_task_whose_checkpoint_redis_evicts_counts_its_call_as_lost(
    make_instance: MakeInstance, has_job: bool
) -> None:
    one = make_instance()
    claim = await started(one)
    if has_job:
        assert await record_job(one, claim)
    await one.worker_queue.release([claim])
    await one.connection.commands.delete(one.keys.checkpoint(claim.task.id), one.keys.record(claim.task.id))
    again = await one.claim()
    assert await one.worker_queue.start(again) is StartResult.INHERITED
    assert await one.worker_queue.start(again) is StartResult.STARTED
    assert (await stored(one, again)).ambiguous_calls == 1
    assert again.task.possibly_billed_twice == 1
    assert one.connection.meter.ambiguous >= 1


async def test_a_released_task_counts_its_call_also_if_its_next_owner_dies_before_the_start(
    make_instance: MakeInstance,
) -> None:
    one, other = make_instance(), make_instance(start=False)
    claim = await started(one)
    await one.worker_queue.release([claim])
    await one.connection.commands.delete(one.keys.checkpoint(claim.task.id))
    unstarted = await one.claim()
    (taken,) = await other.parts.takeover.take({unstarted.entry_id: 0.0}, min_idle_s=0.0)
    assert await other.worker_queue.start(taken) is StartResult.STARTED
    assert (await stored(other, taken)).ambiguous_calls == 1


@pytest.mark.parametrize("is_taken_over", [False, True])
async def test_a_task_that_is_released_again_before_its_start_still_counts_its_lost_call(
    make_instance: MakeInstance, is_taken_over: bool
) -> None:
    one, other = make_instance(), make_instance(start=False)
    claim = await started(one)
    await one.worker_queue.release([claim])
    await one.connection.commands.delete(one.keys.checkpoint(claim.task.id))
    unstarted, holder = await one.claim(), one
    if is_taken_over:
        (unstarted,), holder = await other.parts.takeover.take({unstarted.entry_id: 0.0}, min_idle_s=0.0), other
    else:
        assert await one.worker_queue.start(unstarted) is StartResult.INHERITED
    await holder.worker_queue.release([unstarted])
    again = await one.claim()
    assert await one.worker_queue.start(again) is StartResult.INHERITED
    assert await one.worker_queue.start(again) is StartResult.STARTED
    assert (await stored(one, again)).ambiguous_calls == 1


async def test_a_job_that_redis_evicted_is_written_back_with_the_next_renewal(make_instance: MakeInstance) -> None:
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


async def test_a_renewal_that_finds_an_evicted_checkpoint_starts_no_recovery(make_instance: MakeInstance) -> None:
    owner, losses = make_instance(lease_s=0.6), []
    owner.parts.leases.on_loss = lambda: losses.append("loss")
    claim = await started(owner)
    assert await record_job(owner, claim)
    await owner.connection.commands.delete(owner.keys.checkpoint(claim.task.id))
    await eventually(lambda: owner.connection.meter.written_back["running"] == 1)
    await eventually(lambda: owner.connection.meter.commands["renew"] > 12)
    assert (losses, owner.connection.recovered.is_set()) == ([], True)


async def test_a_begun_task_without_a_checkpoint_counts_as_ambiguous_when_it_is_taken_over(
    make_instance: MakeInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(takeover, "CONFIRM_S", 0.2)
    owner = make_instance(lease_s=0.6)
    begun = await started(owner)
    await owner.client_queue.submit(submission("b"))
    untouched = await owner.claim()

    async def is_renewed() -> bool:
        return {row.entry_id for row in await owner.verbs.pending_entries() if row.begun} == {begun.entry_id}

    await eventually(is_renewed)
    await owner.crash()
    await owner.connection.commands.delete(owner.keys.checkpoint(begun.task.id))
    other = make_instance(lease_s=0.6)
    taken = [await other.claim() for _ in range(2)]
    counts = {claim.entry_id: claim.checkpoint.ambiguous_calls for claim in taken}
    assert counts == {begun.entry_id: 1, untouched.entry_id: 0}
    assert other.connection.meter.ambiguous == 1


@pytest.mark.parametrize(("policy", "is_marked"), [("allkeys-lru", True), ("noeviction", False)])
async def test_a_start_marks_its_entry_at_once_only_where_redis_evicts(
    make_instance: MakeInstance, policy: str, is_marked: bool
) -> None:
    owner = make_instance()
    await owner.client_queue.submit(submission("a"))
    claim = await owner.claim()
    owner.connection.server = ServerInfo(eviction_policy=policy)
    assert await owner.worker_queue.start(claim) is StartResult.STARTED
    (row,) = await owner.verbs.pending_entries()
    assert row.begun is is_marked


async def test_the_mark_of_a_start_never_takes_a_claim_back_after_an_outage(
    make_instance: MakeInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, other = make_instance(), make_instance(start=False)
    await owner.client_queue.submit(submission("a"))
    claim = await owner.claim()
    owner.connection.server = ServerInfo(eviction_policy="allkeys-lru")
    mark_begun, outages = owner.verbs.mark_begun, [1]

    async def mark_after_outage(consumer: str, entry_id: str) -> None:
        if outages:
            outages.clear()
            assert await other.verbs.claim_expired("other", [entry_id], 0.0)
            raise QueueUnavailable
        await mark_begun(consumer, entry_id)

    monkeypatch.setattr(owner.verbs, "mark_begun", mark_after_outage)
    await owner.worker_queue.start(claim)
    (row,) = await owner.verbs.pending_entries()
    assert row.consumer == "other"


@pytest.mark.parametrize("is_read", [False, True])
async def test_a_job_stays_with_a_task_that_several_instances_release_before_they_start_it(
    make_instance: MakeInstance, is_read: bool
) -> None:
    one = make_instance()
    claim = await started(one)
    assert await record_job(one, claim)
    for _ in range(3):
        await one.worker_queue.release([claim])
        claim = await one.claim()
        if is_read:
            await one.worker_queue.read_released(claim)
            assert claim.checkpoint.job == JOB
    expected = StartResult.STARTED if is_read else StartResult.INHERITED
    assert await one.worker_queue.start(claim) is expected
    run = claim.checkpoint
    assert (run.job, run.ambiguous_calls, run.attempts) == (JOB, 0, int(is_read))


async def test_a_retry_keeps_the_job_and_counts_no_attempt(make_instance: MakeInstance) -> None:
    one = make_instance()
    claim = await started(one)
    assert await record_job(one, claim)
    await one.worker_queue.retry(claim, Retry(60.0, WaitReason.RETRYING, counts_as_attempt=False))
    run = await stored(one, claim)
    assert (run.job, run.phase, run.attempts) == (JOB, "waiting", 0)


@over_rows("phase", ["calling", "waiting", "released"])
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


async def test_a_job_is_not_taken_if_redis_does_not_allow_a_search_for_its_owner(
    make_instance: MakeInstance, redis_url: str
) -> None:
    claim = await started(make_instance())
    await make_instance(start=False).connection.commands.acl_setuser(
        "scanless", enabled=True, passwords=["+word"], keys=["*"], channels=["*"], commands=["+@all", "-scan"]
    )
    scanless = make_instance(start=False, url=redis_url.replace("://", "://scanless:word@", 1))
    assert await scanless.worker_queue.take_found_job(claim, FOUND, 20) is False
    assert not scanless.connection.health.refused


FOUND = JobHandle("replicate", "found", "key", channel="replicate")


def found(ago_s: float = 0.0) -> JobHandle:
    """Return a job that the provider lists, and that began some seconds ago."""
    return replace(FOUND, accepted_at=time.time() - ago_s)


async def calling(instance: Instance, name: str, channel: str = "replicate") -> Claim:
    """Return a claim with a call that has no response yet."""
    await instance.client_queue.submit(submission(name))
    claim = await instance.claim()
    sent = SentCall((0,), sent_at=time.time())
    claim.checkpoint = replace(claim.checkpoint, sent=sent, channel=channel, account="another key")
    assert await instance.worker_queue.start(claim) is StartResult.STARTED
    return claim


async def test_a_job_is_not_taken_while_a_call_of_another_task_has_no_response(make_instance: MakeInstance) -> None:
    one, other = make_instance(), make_instance(start=False)
    theirs, ours = await calling(one, "theirs"), await calling(one, "ours")
    take = other.worker_queue.take_found_job
    assert await take(ours, found(), 0.5) is None
    waiting = asyncio.ensure_future(take(ours, found(), 30))
    theirs.checkpoint = theirs.checkpoint.with_job(AcceptedJob(found(), (0,)))
    assert await one.worker_queue.record_job(theirs, theirs.checkpoint)
    assert await waiting is False


async def test_a_job_is_taken_beside_a_key_with_a_foreign_name(make_instance: MakeInstance) -> None:
    instance = make_instance()
    claim = await calling(instance, "ours")
    await instance.connection.commands.set(instance.keys.checkpoint("").encode() + b"\xff", b"junk")
    assert await instance.worker_queue.take_found_job(claim, found(), 20) is True


async def test_a_job_is_taken_once_the_other_calls_have_another_job_or_were_lost(make_instance: MakeInstance) -> None:
    one, other = make_instance(), make_instance(start=False)
    accepted, lost, ours = [await calling(one, name) for name in ("accepted", "lost", "ours")]
    await calling(one, "elsewhere", channel="fal")
    waiting = asyncio.ensure_future(other.worker_queue.take_found_job(ours, found(), 30))
    accepted.checkpoint = accepted.checkpoint.with_job(AcceptedJob(JobHandle("replicate", "theirs"), (0,)))
    assert await one.worker_queue.record_job(accepted, accepted.checkpoint)
    await one.worker_queue.retry(lost, Retry(60.0, WaitReason.RETRYING))
    assert await waiting is True


@pytest.mark.parametrize("ago_s", [0.0, 900.0])
async def test_a_job_of_a_finished_task_is_not_taken(make_instance: MakeInstance, ago_s: float) -> None:
    instance = make_instance()
    theirs = await started(instance)
    theirs.checkpoint = theirs.checkpoint.with_job(AcceptedJob(found(ago_s), (0,)))
    assert await instance.worker_queue.record_job(theirs, theirs.checkpoint)
    task = replace(theirs.task, jobs=theirs.checkpoint.begun_jobs)
    await instance.worker_queue.finish(theirs, completed(task, (), (), now=time.time(), ttl_s=60.0))
    if ago_s:
        await instance.connection.commands.delete(instance.keys.checkpoint(task.id))  # it has expired
    assert await instance.worker_queue.take_found_job(await calling(instance, "ours"), found(ago_s)) is False


async def test_many_searches_cost_one_scan(make_instance: MakeInstance) -> None:
    instance = make_instance(slots=30)
    claims = [await calling(instance, str(number), channel=str(number)) for number in range(20)]
    await instance.connection.commands.mset(
        {f"{{{instance.keys.prefix}}}:task:{number}": b"x" for number in range(5_000)}
    )
    jobs = [replace(found(20.0), id=f"job-{number}") for number in range(20)]
    seen = instance.connection.meter.commands["read"]
    takes = [instance.worker_queue.take_found_job(claim, job) for claim, job in zip(claims[:10], jobs, strict=False)]
    assert await asyncio.gather(*takes) == [True] * 10
    later = [
        instance.worker_queue.take_found_job(claim, job) for claim, job in zip(claims[10:], jobs[10:], strict=True)
    ]
    assert await asyncio.gather(*later) == [True] * 10
    scan = instance.connection.meter.commands["read"] - seen - 20
    pages = (await instance.connection.commands.dbsize()) // SCAN_COUNT + 2
    assert scan <= 2 * pages


async def test_a_database_with_too_many_keys_is_not_read_and_its_job_not_taken(
    make_instance: MakeInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(take_found_job, "MAX_SCANS", 1)
    monkeypatch.setattr(take_found_job, "SCAN_COUNT", 1)
    instance = make_instance()
    claim = await calling(instance, "ours")
    await instance.connection.commands.mset({f"{{{instance.keys.prefix}}}:task:{number}": b"x" for number in range(50)})
    assert await instance.worker_queue.take_found_job(claim, found()) is False


@pytest.mark.parametrize("is_old", [False, True])
async def test_a_job_of_a_cancelled_task_is_not_taken(make_instance: MakeInstance, is_old: bool) -> None:
    instance = make_instance()
    theirs, ago_s = await started(instance), 900.0 if is_old else 0.0
    theirs.checkpoint = theirs.checkpoint.with_job(AcceptedJob(found(ago_s), (0,)))
    assert await instance.worker_queue.record_job(theirs, theirs.checkpoint)
    await instance.client_queue.cancel(theirs.task.id)
    if is_old:
        await instance.connection.commands.delete(instance.keys.checkpoint(theirs.task.id))  # it has expired
    assert await instance.worker_queue.take_found_job(await calling(instance, "ours"), found(ago_s)) is False


async def test_a_call_of_a_finished_task_is_not_waited_for(make_instance: MakeInstance) -> None:
    instance = make_instance()
    ours, refused = await calling(instance, "ours"), await calling(instance, "refused")
    error = TaskError("upstream_invalid_request", "no", retryable=False)
    await instance.worker_queue.finish(refused, failed(refused.task, error, now=time.time(), ttl_s=60.0))
    assert await instance.worker_queue.take_found_job(ours, found(), 20) is True
