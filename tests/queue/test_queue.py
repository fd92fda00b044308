from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import orjson
import pytest
from msgspec.structs import replace
from redis.asyncio import Redis
from redis.asyncio.client import PubSub

from imagegen.errors import InternalError, QueueFull
from imagegen.queue import change_relay as watching
from imagegen.queue.claim import Claim, StartResult
from imagegen.queue.client_queue import CacheResult
from imagegen.queue.codec import VERSION
from imagegen.supervisor import Supervisor
from imagegen.tasks import transitions
from imagegen.tasks.image import StoredImage
from imagegen.tasks.retry import Retry
from imagegen.tasks.task import State, Task, TaskError, WaitReason
from tests.conftest import Instance, MakeInstance
from tests.support import eventually, submission

IMAGE = StoredImage(0, "image/png", 10, 8, 8, "a" * 64)


async def run_one(instance: Instance, outcome: str = "completed") -> Task:
    claim = await instance.claim()
    assert await instance.worker_queue.start(claim) is StartResult.STARTED
    return await end(instance, claim, outcome)


async def end(instance: Instance, claim: Claim, outcome: str = "completed") -> Task:
    now = time.time()
    if outcome == "completed":
        final = transitions.completed(claim.task, [IMAGE], [], now=now, ttl_s=60)
    else:
        final = transitions.failed(claim.task, TaskError("upstream_error", "no", retryable=True), now=now, ttl_s=60)
    return await instance.worker_queue.finish(claim, final)


async def at_rest(instance: Instance) -> bool:
    stream = instance.keys.stream
    redis = instance.connection.commands
    return await redis.xlen(stream) == 0 and (await redis.xpending(stream, "pool"))["pending"] == 0


async def test_a_submitted_task_is_claimed_started_and_finished(make_instance: MakeInstance) -> None:
    instance = make_instance()
    submitted = await instance.client_queue.submit(submission("a"))
    assert submitted.cached is CacheResult.MISS
    assert submitted.task.state is State.PENDING
    final = await run_one(instance)
    assert final.state is State.COMPLETED
    assert (await instance.task(final.id)).images == (IMAGE,)
    assert await at_rest(instance)


async def test_fifty_concurrent_identical_submits_are_one_entry(make_instance: MakeInstance) -> None:
    instance = make_instance()
    answers = await asyncio.gather(*(instance.client_queue.submit(submission("a")) for _ in range(50)))
    assert [answer.cached for answer in answers].count(CacheResult.MISS) == 1
    assert {answer.cached for answer in answers} == {CacheResult.MISS, CacheResult.COALESCED}
    assert await instance.connection.commands.xlen(instance.keys.stream) == 1


async def test_identical_submits_on_two_instances_are_one_entry(make_instance: MakeInstance) -> None:
    one, two = make_instance(), make_instance()
    answers = await asyncio.gather(*(i.client_queue.submit(submission("a")) for i in (one, two) for _ in range(25)))
    assert [answer.cached for answer in answers].count(CacheResult.MISS) == 1
    assert await one.connection.commands.xlen(one.keys.stream) == 1


async def test_a_finished_task_is_a_hit_on_every_instance(make_instance: MakeInstance) -> None:
    one, two = make_instance(), make_instance(start=False)
    await one.client_queue.submit(submission("a"))
    await run_one(one)
    for instance in (one, two, two):
        answer = await instance.client_queue.submit(submission("a"))
        assert answer.cached is CacheResult.HIT
        assert answer.task.images == (IMAGE,)
    assert await at_rest(one)


async def test_a_resubmitted_task_has_a_higher_sequence_and_no_attempts(make_instance: MakeInstance) -> None:
    instance = make_instance()
    await instance.client_queue.submit(submission("a"))
    failed = await run_one(instance, "failed")
    again = await instance.client_queue.submit(submission("a"))
    assert again.cached is CacheResult.MISS
    assert again.task.sequence > failed.sequence
    claim = await instance.claim()
    assert await instance.worker_queue.start(claim) is StartResult.INHERITED
    assert await instance.worker_queue.start(claim) is StartResult.STARTED
    assert claim.checkpoint.attempts == 1


async def test_another_request_under_the_same_id_is_never_served(make_instance: MakeInstance) -> None:
    one, two = make_instance(), make_instance(start=False)
    await one.client_queue.submit(submission("a"))
    for instance in (one, two):
        with pytest.raises(InternalError):
            await instance.client_queue.submit(replace(submission("a"), digest="b" * 32))
    assert await one.connection.commands.xlen(one.keys.stream) == 1


async def test_the_queue_takes_no_more_than_max_queue_waiting_tasks(make_instance: MakeInstance) -> None:
    instance = make_instance(max_queue=3, start=False)
    await instance.verbs.create_group()
    for i in range(3):
        await instance.client_queue.submit(submission(i))
    with pytest.raises(QueueFull):
        await instance.client_queue.submit(submission("one too many"))
    assert (await instance.client_queue.submit(submission(0))).cached is CacheResult.COALESCED
    assert await instance.client_queue.get(submission("one too many").task_id) is None


async def test_a_full_queue_takes_tasks_again_when_some_are_claimed(make_instance: MakeInstance) -> None:
    instance = make_instance(max_queue=2, start=False)
    await instance.verbs.create_group()
    for i in range(2):
        await instance.client_queue.submit(submission(i))
    instance.start()
    await run_one(instance)
    assert (await instance.client_queue.submit(submission("next"))).cached is CacheResult.MISS


async def test_an_unknown_or_malformed_id_has_no_task(make_instance: MakeInstance) -> None:
    instance = make_instance(start=False)
    for odd in ("0" * 32, "a1b2c3d4e5f6g7h8i9j0", "", "../x", "A" * 32):
        assert await instance.client_queue.get(odd) is None


async def test_another_instance_sees_a_task_wait_and_run(make_instance: MakeInstance) -> None:
    one, two = make_instance(), make_instance(start=False)
    task = (await one.client_queue.submit(submission("a"))).task
    claim = await one.claim()
    await one.worker_queue.start(claim)
    seen = await two.task(task.id)
    assert (seen.state, seen.attempts) == (State.PROCESSING, 1)
    await one.worker_queue.retry(claim, Retry(60.0, WaitReason.UPSTREAM_OVERLOADED))
    two.task_cache.forget(task.id)
    seen = await two.task(task.id)
    assert (seen.state, seen.reason) == (State.PENDING, WaitReason.UPSTREAM_OVERLOADED)
    assert seen.retry_at is not None


async def test_a_retry_keeps_its_claim_and_is_offered_again(make_instance: MakeInstance) -> None:
    instance = make_instance()
    await instance.client_queue.submit(submission("a"))
    claim = await instance.claim()
    await instance.worker_queue.start(claim)
    before = claim.task.sequence
    await instance.worker_queue.retry(claim, Retry(0.01, WaitReason.RETRYING))
    assert await instance.claim() is claim
    assert await instance.worker_queue.start(claim) is StartResult.STARTED
    assert claim.checkpoint.attempts == 2
    assert claim.task.sequence > before


async def test_waiting_for_a_rate_limit_counts_no_attempt(make_instance: MakeInstance) -> None:
    instance = make_instance()
    await instance.client_queue.submit(submission("a"))
    claim = await instance.claim()
    await instance.worker_queue.start(claim)
    await instance.worker_queue.retry(claim, Retry(0.01, WaitReason.UPSTREAM_RATE_LIMITED, counts_as_attempt=False))
    assert claim.task.attempts == 0
    await instance.claim()
    await instance.worker_queue.start(claim)
    assert claim.task.attempts == 1


async def test_an_expired_lease_is_taken_over_by_another_instance(make_instance: MakeInstance) -> None:
    one = make_instance(lease_s=1.0)
    await one.client_queue.submit(submission("a"))
    claim = await one.claim()
    await one.worker_queue.start(claim)
    await one.crash()
    two = make_instance(lease_s=1.0)
    taken = await two.claim()
    assert taken.task.id == claim.task.id
    assert (taken.checkpoint.attempts, taken.checkpoint.ambiguous_calls) == (1, 1)
    assert await two.worker_queue.start(taken) is StartResult.STARTED
    assert taken.task.sequence > claim.task.sequence
    assert (await end(two, taken)).possibly_billed_twice == 1
    assert await at_rest(two)


async def test_a_renewed_lease_is_not_taken_over(make_instance: MakeInstance) -> None:
    one, two = make_instance(lease_s=0.6), make_instance(lease_s=0.6)
    await one.client_queue.submit(submission("a"))
    claims = [asyncio.create_task(i.worker_queue.claim()) for i in (one, two)]
    done, waiting = await asyncio.wait(claims, timeout=2.0)
    assert (len(done), len(waiting)) == (1, 1)


async def taken_over(make_instance: MakeInstance) -> tuple[Instance, Claim, Instance, Claim]:
    """Return a stale claim and the claim that replaced it, each after its instance; both are started."""
    one = make_instance(lease_s=0.5)
    await one.client_queue.submit(submission("a"))
    stale = await one.claim()
    await one.worker_queue.start(stale)
    await one.crash()
    two = make_instance(lease_s=0.5)
    taken = await two.claim()
    await two.worker_queue.start(taken)
    return one, stale, two, taken


async def test_a_late_result_of_a_stale_owner_never_replaces_a_final_one(make_instance: MakeInstance) -> None:
    one, stale, two, taken = await taken_over(make_instance)
    await end(two, taken)
    stored = await end(one, stale, "failed")
    assert stored.state is State.COMPLETED
    assert (await one.task(stale.task.id)).state is State.COMPLETED


async def test_a_late_result_is_accepted_if_no_other_exists(make_instance: MakeInstance) -> None:
    one, stale, two, taken = await taken_over(make_instance)
    assert (await end(one, stale)).state is State.COMPLETED
    stored = await end(two, taken, "failed")
    assert stored.state is State.COMPLETED
    assert await at_rest(two)


async def test_a_stale_owner_does_not_release_a_claim_taken_over(make_instance: MakeInstance) -> None:
    one, stale, two, taken = await taken_over(make_instance)
    await one.worker_queue.release([stale], leaving=True)
    (row,) = await two.verbs.pending_entries()
    assert (row.entry_id, row.consumer) == (taken.entry_id, two.parts.dispatcher.instance)
    assert (await end(two, taken)).state is State.COMPLETED
    assert await at_rest(two)


async def test_claims_released_at_shutdown_wake_another_instance(make_instance: MakeInstance) -> None:
    one = make_instance()
    await one.client_queue.submit(submission("a"))
    claim = await one.claim()
    await one.worker_queue.start(claim)
    two = make_instance()
    waiting = asyncio.create_task(two.claim())
    one.worker_queue.quiet()
    await one.crash()
    await one.parts.release_all()
    taken = await asyncio.wait_for(waiting, 10)
    assert await two.worker_queue.start(taken) is StartResult.INHERITED
    assert taken.checkpoint.ambiguous_calls == 1
    assert await two.worker_queue.start(taken) is StartResult.STARTED
    assert taken.task.attempts == 1
    assert (await end(two, taken)).state is State.COMPLETED
    assert await at_rest(two)
    consumers = await two.connection.commands.xinfo_consumers(two.keys.stream, "pool")
    assert len(consumers) == 1


@pytest.mark.parametrize(
    "json",
    ["junk", '{"id":"x","digest":"d","model":"m","created":1,"request":' + "[" * 2_000 + "]" * 2_000 + "}"],
    ids=["junk", "nested too deep"],
)
async def test_an_unreadable_entry_goes_to_the_dead_letter_list(make_instance: MakeInstance, json: str) -> None:
    instance = make_instance()
    redis = instance.connection.commands
    waiting = asyncio.create_task(instance.claim())
    await redis.xadd(instance.keys.stream, {"v": "1", "g": "5", "d": json})
    await eventually(lambda: redis.llen(instance.keys.dead_letters))
    await instance.client_queue.submit(submission("a"))
    assert (await asyncio.wait_for(waiting, 20)).task.id == submission("a").task_id
    assert await redis.xlen(instance.keys.stream) == 1


async def test_an_entry_of_a_newer_version_is_left_alone(make_instance: MakeInstance) -> None:
    instance = make_instance()
    redis = instance.connection.commands
    waiting = asyncio.create_task(instance.claim())
    await redis.xadd(instance.keys.stream, {"v": str(VERSION + 1), "new": "things"})
    await instance.client_queue.submit(submission("a"))
    assert (await asyncio.wait_for(waiting, 20)).task.id == submission("a").task_id
    assert await redis.xlen(instance.keys.stream) == 2


async def test_a_result_is_written_after_the_store_was_emptied(make_instance: MakeInstance) -> None:
    instance = make_instance()
    await instance.client_queue.submit(submission("a"))
    claim = await instance.claim()
    await instance.worker_queue.start(claim)
    redis = instance.connection.commands
    await redis.delete(*await redis.keys(f"{{{instance.keys.prefix}}}:*"))
    await end(instance, claim)
    instance.task_cache.forget(claim.task.id)
    assert (await instance.task(claim.task.id)).state is State.COMPLETED


async def test_waiting_tasks_are_restored_after_the_store_was_emptied(make_instance: MakeInstance) -> None:
    instance = make_instance()
    redis = instance.connection.commands
    first = asyncio.create_task(instance.worker_queue.claim())
    await instance.client_queue.submit(submission("first"))
    await first
    await instance.client_queue.submit(submission("second"))
    await redis.delete(*await redis.keys(f"{{{instance.keys.prefix}}}:*"))
    second = await instance.claim()
    assert second.task.id == submission("second").task_id


async def test_every_key_but_the_stream_expires(make_instance: MakeInstance) -> None:
    instance = make_instance()
    for name in ("a", "b"):
        await instance.client_queue.submit(submission(name))
    await run_one(instance)
    claim = await instance.claim()
    await instance.worker_queue.start(claim)
    redis = instance.connection.commands
    for key in await redis.keys(f"{{{instance.keys.prefix}}}:*"):
        if key != instance.keys.stream.encode():
            assert await redis.pttl(key) > 0


async def test_reads_of_own_and_finished_tasks_cost_no_command(make_instance: MakeInstance) -> None:
    instance = make_instance()
    redis = instance.connection.commands
    await eventually(lambda: instance.connection.meter.commands["control"])  # it has detected that it is alone
    await instance.client_queue.submit(submission("finished"))
    await instance.client_queue.submit(submission("waits"))
    await run_one(instance)

    async def reads() -> int:
        stats = await redis.info("commandstats")
        return sum(stats.get(f"cmdstat_{name}", {"calls": 0})["calls"] for name in ("mget", "get", "evalsha"))

    before = await reads()
    for _ in range(10):
        for name in ("finished", "waits"):
            assert await instance.client_queue.get(submission(name).task_id)
    assert await reads() == before


async def test_a_submit_restores_a_task_without_its_entry(make_instance: MakeInstance) -> None:
    one, two = make_instance(start=False), make_instance(start=False)
    await one.client_queue.submit(submission("a"))
    await one.connection.commands.delete(one.keys.stream)
    assert (await two.client_queue.submit(submission("a"))).cached is CacheResult.MISS
    assert await one.connection.commands.xlen(one.keys.stream) == 1


async def test_a_cancelled_task_is_never_started(make_instance: MakeInstance) -> None:
    one, two = make_instance(), make_instance(start=False)
    await one.client_queue.submit(submission("a"))
    claim = await one.claim()
    assert (await two.cancel(claim.task.id)).state is State.CANCELLED
    assert await one.worker_queue.start(claim) is StartResult.LOST
    one.worker_queue.drop(claim)
    assert (await one.task(claim.task.id)).state is State.CANCELLED
    assert await at_rest(one)


async def test_a_late_result_never_revives_a_cancelled_task(make_instance: MakeInstance) -> None:
    one, two = make_instance(), make_instance(start=False)
    await one.client_queue.submit(submission("a"))
    claim = await one.claim()
    await one.worker_queue.start(claim)
    cancelled = await two.cancel(claim.task.id)
    assert cancelled.sequence > claim.task.sequence
    assert (await end(one, claim)).state is State.CANCELLED
    assert cancelled.request_json == submission("a").request_json


async def test_an_unwritable_result_affects_no_other_task(make_instance: MakeInstance) -> None:
    instance = make_instance()
    for name in ("good", "bad"):
        await instance.client_queue.submit(submission(name))
    good, bad = [await instance.claim() for _ in range(2)]
    now = time.time()
    no_text = transitions.completed(bad.task, [IMAGE], ["\ud800"], now=now, ttl_s=60)
    fine = transitions.completed(good.task, [IMAGE], [], now=now, ttl_s=60)
    ends = [instance.worker_queue.finish(bad, no_text), instance.worker_queue.finish(good, fine)]
    failed, stored = await asyncio.gather(*ends, return_exceptions=True)
    assert isinstance(failed, UnicodeEncodeError)
    assert isinstance(stored, Task)
    assert stored.state is State.COMPLETED


async def test_a_late_result_does_not_affect_the_next_epoch(make_instance: MakeInstance) -> None:
    instance = make_instance()
    await instance.client_queue.submit(submission("a"))
    late = await instance.claim()
    await instance.worker_queue.start(late)
    await instance.client_queue.cancel(late.task.id)
    assert (await instance.client_queue.submit(submission("a"))).cached is CacheResult.MISS
    assert (await end(instance, late)).state is State.PENDING
    claim = await instance.claim()
    assert claim.task.request_json == submission("a").request_json


async def test_a_cancel_on_another_instance_stops_the_attempt(make_instance: MakeInstance) -> None:
    one, two = make_instance(), make_instance()
    await eventually(lambda: not two.notifier.alone and not one.notifier.alone)
    runs = asyncio.create_task(one.claim())
    await one.client_queue.submit(submission("a"))
    claim = await asyncio.wait_for(runs, 20)
    await one.worker_queue.start(claim)
    stopped = asyncio.Event()
    claim.on_lost = stopped.set
    await two.client_queue.cancel(claim.task.id)
    await asyncio.wait_for(stopped.wait(), 6)
    assert claim.lost


async def finished_elsewhere(make_instance: MakeInstance) -> tuple[Instance, Instance, Task]:
    """Return two instances and a task that the first accepted and the second finished."""
    one, two = make_instance(), make_instance()
    await eventually(lambda: not two.notifier.alone and not one.notifier.alone)
    runs = asyncio.create_task(run_one(two))
    await eventually(lambda: two.parts.dispatcher.free_slots)
    task = (await one.client_queue.submit(submission("a"))).task
    await asyncio.wait_for(runs, 20)
    return one, two, task


async def test_results_remain_readable_after_their_instance_stopped(make_instance: MakeInstance) -> None:
    one, two, task = await finished_elsewhere(make_instance)
    await Supervisor().stop(two.loops)
    await two.parts.release_all()
    await eventually(lambda: one.notifier.alone)
    assert (await one.task(task.id)).state is State.COMPLETED
    waits = (await one.client_queue.submit(submission("b"))).task
    await one.client_queue.refresh_positions()
    assert (await one.client_queue.position(waits)).position == 1
    backlog = await one.parts.monitor.waiting()
    assert backlog.depth == 1
    assert backlog.oldest_age_s == pytest.approx(0.0, abs=2.0)


async def test_results_of_other_instances_leave_memory(
    make_instance: MakeInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "REFRESH_S", 0.05)
    one, _two, _task = await finished_elsewhere(make_instance)
    await eventually(lambda: not one.task_cache.live)


async def test_cancel_of_a_finished_task_changes_nothing(make_instance: MakeInstance) -> None:
    instance = make_instance()
    await instance.client_queue.submit(submission("a"))
    final = await run_one(instance)
    assert await instance.client_queue.cancel(final.id) == final
    assert await instance.client_queue.cancel("0" * 32) is None


async def test_a_cancelled_waiting_task_leaves_the_stream_empty(make_instance: MakeInstance) -> None:
    instance = make_instance(start=False)
    await instance.verbs.create_group()
    await instance.client_queue.submit(submission("a"))
    await instance.client_queue.cancel(submission("a").task_id)
    assert await at_rest(instance)


async def test_a_change_wakes_waiters_on_another_instance(make_instance: MakeInstance) -> None:
    one, two = make_instance(), make_instance()
    await eventually(lambda: not two.notifier.alone and not one.notifier.alone)
    with two.feed.subscribe([submission("a").task_id]) as waiting:
        runs = asyncio.create_task(one.claim())
        await one.client_queue.submit(submission("a"))
        claim = await asyncio.wait_for(runs, 20)
        await one.worker_queue.start(claim)
        await end(one, claim)
        states = []
        async with asyncio.timeout(6):
            while State.COMPLETED not in states:
                states += [task.state for task in await waiting.changes(2.0)]
    assert (await two.task(claim.task.id)).state is State.COMPLETED


async def test_a_task_resubmitted_elsewhere_is_not_served_from_memory(make_instance: MakeInstance) -> None:
    one, two = make_instance(), make_instance()
    await eventually(lambda: not two.notifier.alone and not one.notifier.alone)
    runs = asyncio.create_task(one.claim())
    await one.client_queue.submit(submission("a"))
    claim = await asyncio.wait_for(runs, 20)
    await one.worker_queue.start(claim)
    await end(one, claim, "failed")
    assert (await two.client_queue.submit(submission("a"))).cached is CacheResult.MISS

    async def seen_afresh() -> bool:
        return (await one.task(claim.task.id)).state is State.PENDING

    await eventually(seen_afresh)


async def test_an_idle_instance_takes_over_from_a_busy_one_that_died(make_instance: MakeInstance) -> None:
    idle, busy = make_instance(lease_s=1.0), make_instance(lease_s=1.0)
    await eventually(lambda: not idle.notifier.alone and not busy.notifier.alone)
    runs = asyncio.create_task(busy.worker_queue.claim())
    await busy.client_queue.submit(submission("a"))
    await asyncio.wait_for(runs, 20)
    await busy.crash()
    taken = await idle.claim()
    assert taken.task.id == submission("a").task_id


def word(kind: str) -> bytes:
    return orjson.dumps({"from": "another", "kind": kind})


@pytest.fixture
async def listener(redis_url: str) -> AsyncIterator[PubSub]:
    async with Redis.from_url(redis_url) as client, client.pubsub() as subscription:
        yield subscription


async def test_a_new_peer_receives_a_held_task(make_instance: MakeInstance, listener: PubSub) -> None:
    instance = make_instance()
    redis = instance.connection.commands
    await instance.client_queue.submit(submission("a"))
    await instance.claim()
    await listener.subscribe(instance.keys.notifications)
    await redis.publish(instance.keys.notifications, word("hello"))

    async def busy_was_published() -> bool:
        return any(
            b'"busy"' in message["data"]
            for message in [m async for m in drained(listener)]
            if message["type"] == "message"
        )

    await eventually(busy_was_published)


async def test_each_message_of_a_busy_peer_schedules_a_takeover_check(make_instance: MakeInstance) -> None:
    instance = make_instance(lease_s=0.6)
    commands = instance.connection.meter.commands
    await eventually(lambda: commands["takeover"] == 1 and commands["control"])  # it has looked, and listens
    await instance.connection.commands.publish(instance.keys.notifications, word("busy"))
    await eventually(lambda: commands["takeover"] == 2)
    await instance.connection.commands.publish(instance.keys.notifications, word("busy"))
    await eventually(lambda: commands["takeover"] == 3)


async def test_a_single_instance_publishes_only_its_greeting(make_instance: MakeInstance, listener: PubSub) -> None:
    instance = make_instance()
    await listener.subscribe(instance.keys.notifications)
    await instance.client_queue.submit(submission("a"))
    await run_one(instance)
    await instance.notifier.flush()
    messages = [message async for message in drained(listener)]
    assert not any(b"busy" in message["data"] for message in messages if message["type"] == "message")


async def drained(pubsub: PubSub) -> AsyncIterator[dict[str, Any]]:
    while (message := await pubsub.get_message(timeout=0.05)) is not None:
        yield message


async def test_without_a_channel_changes_are_polled_with_growing_intervals(
    make_instance: MakeInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "REFRESH_S", 30.0)
    monkeypatch.setattr(watching, "POLL_S", 0.02)
    one, two = make_instance(start=False), make_instance(start=False)
    two.notifier.silent = True
    await one.verbs.create_group()
    task = (await one.client_queue.submit(submission("a"))).task
    refreshing = asyncio.create_task(two.parts.change_relay.refresh_forever())
    with two.feed.subscribe([task.id]) as waiter:
        reads = two.connection.meter.commands
        await eventually(lambda: reads["read"] >= 3)
        third_at = time.monotonic()
        await eventually(lambda: reads["read"] >= 5)
        assert time.monotonic() - third_at > 6 * 0.02  # the intervals are 4 and 8 polls
        waiting = asyncio.create_task(one.claim())
        reader = asyncio.create_task(one.parts.consumer.read_forever())
        claim = await asyncio.wait_for(waiting, 20)
        await one.worker_queue.start(claim)
        await one.worker_queue.finish(claim, transitions.completed(claim.task, [], [], now=time.time(), ttl_s=60))
        async with asyncio.timeout(15):
            while not (await waiter.changes(5))[-1].state.is_final:
                pass
    await Supervisor().stop([refreshing, reader])


async def test_only_the_first_entries_of_a_long_queue_are_read(make_instance: MakeInstance) -> None:
    one, two = make_instance(start=False, max_queue=5_000), make_instance(start=False, max_queue=5_000)
    await one.verbs.create_group()
    submissions = [submission(number) for number in range(1_500)]
    for first in range(0, 1_500, 100):
        await asyncio.gather(*map(one.client_queue.submit, submissions[first : first + 100]))
    last = await one.task(submissions[-1].task_id)
    waiting = await two.verbs.list_waiting()
    assert (len(waiting.ids), waiting.behind, waiting.last) == (200, 1_300, last.entry_id)
    await two.client_queue.refresh_positions()
    assert len(two.parts.dispatcher.estimates.waiting) == 1_500
    assert (await two.client_queue.position(last)).position == 1_500
