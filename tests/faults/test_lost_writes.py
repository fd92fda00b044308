"""Instances after Redis lost acknowledged writes: deleted keys, evicted records, and a flush."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import pytest
from msgspec.structs import replace

from imagegen.queue.claim import Claim, StartResult
from imagegen.queue.client_queue import CacheResult
from imagegen.redis_client.embedded import EmbeddedRedis
from imagegen.tasks import transitions
from imagegen.tasks.task import State, Task
from imagegen.tasks.webhook import Webhook
from tests.conftest import Instance, MakeInstance
from tests.faults.counted_calls import IMAGE, Calls, all_final, at_rest, check_paid_once, is_final, submit_all
from tests.faults.proxy import FaultProxy
from tests.faults.servers import RedisServer, primary_and_replica, promote
from tests.support import counts, eventually, logged, submission

LOSSES = {
    "flushall": lambda redis, keys: redis.flushall(),
    "stream": lambda redis, keys: redis.delete(keys.stream),
    "group": lambda redis, keys: redis.xgroup_destroy(keys.stream, "pool"),
    "entries": lambda redis, keys: redis.xtrim(keys.stream, maxlen=0, approximate=False),
}


@pytest.fixture
def quick_checks(late_refresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the intervals of periodic checks."""
    monkeypatch.setattr("imagegen.queue.change_relay.REFRESH_S", 0.2)
    monkeypatch.setattr("imagegen.queue.change_relay.TRUST_S", 0.25)
    monkeypatch.setattr("imagegen.queue.recovery.CHECK_AGAIN_S", 0.3)


def all_ended(calls: Calls, ids: Iterable[str]) -> bool:
    return calls.ended.issuperset(ids)


@pytest.mark.usefixtures("quick_checks")
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("loss", LOSSES)
async def test_deleted_keys_are_restored_and_nothing_is_paid_twice(
    make_instance: MakeInstance, own_redis: EmbeddedRedis, calls: Calls, loss: str, count: int
) -> None:
    instances = [make_instance(url=own_redis.url, slots=4 // count, lease_s=1.5) for _ in range(count)]
    await eventually(lambda: all(len(i.notifier.peers) == count - 1 for i in instances))
    for instance in instances:
        calls.run_on(instance, 4 // count)
    calls.go_on.set()
    finished = await submit_all(instances, [f"finished {i}" for i in range(4)])
    await eventually(lambda: calls.ended.issuperset(finished))
    calls.go_on.clear()
    running = await submit_all(instances, [f"running {i}" for i in range(4)])
    await eventually(lambda: all(calls.paid[task_id] for task_id in running))
    waiting = await submit_all(instances, [f"waiting {i}" for i in range(20)])
    redis = instances[0].connection.commands
    await LOSSES[loss](redis, instances[0].keys)

    async def pending_again() -> bool:
        if not await redis.exists(instances[0].keys.stream):
            return False
        groups = await redis.xinfo_groups(instances[0].keys.stream)
        return [group["pending"] for group in groups] == [len(running)]

    await eventually(pending_again, within_s=30)
    calls.go_on.set()
    everything = [*finished, *running, *waiting]
    await eventually(lambda: all_ended(calls, everything), within_s=20)
    await check_paid_once(calls, instances, everything)


async def test_a_restored_claim_is_taken_over_when_its_owner_dies(
    make_instance: MakeInstance, own_redis: EmbeddedRedis, calls: Calls
) -> None:
    owner, other = (make_instance(url=own_redis.url, slots=1, lease_s=1.5) for _ in range(2))
    await eventually(lambda: owner.notifier.peers and other.notifier.peers)
    waiting = asyncio.create_task(owner.claim())
    await owner.client_queue.submit(submission("a"))
    claim = await asyncio.wait_for(waiting, 20)
    assert await owner.worker_queue.start(claim) is StartResult.STARTED
    await owner.connection.commands.flushall()
    await eventually(lambda: owner.connection.meter.written_back["running"] == 1)
    await owner.crash()

    async def taken() -> Claim:
        while True:
            mine = await other.claim()
            while (start := await other.worker_queue.start(mine)) is StartResult.INHERITED:
                pass
            if start is StartResult.STARTED:
                return mine
            other.worker_queue.drop(mine)

    mine = await asyncio.wait_for(taken(), 40)
    assert (mine.task.id, mine.task.epoch) == (claim.task.id, claim.task.epoch)
    assert mine.checkpoint.ambiguous_calls == 1


async def test_a_submit_joins_a_running_task_without_an_entry(
    make_instance: MakeInstance, own_redis: EmbeddedRedis
) -> None:
    owner = make_instance(url=own_redis.url, slots=1)
    waiting = asyncio.create_task(owner.claim())
    await owner.client_queue.submit(submission("a"))
    claim = await asyncio.wait_for(waiting, 20)
    assert await owner.worker_queue.start(claim) is StartResult.STARTED
    other = make_instance(url=own_redis.url)
    await eventually(lambda: owner.notifier.peers)
    await owner.connection.commands.xtrim(owner.keys.stream, maxlen=0, approximate=False)
    submitted = await other.client_queue.submit(submission("a"))
    assert submitted.cached is CacheResult.COALESCED
    assert submitted.task.epoch == claim.task.epoch
    assert not claim.lost


async def test_a_submit_after_a_full_loss_joins_the_task_that_another_instance_runs(
    make_instance: MakeInstance, own_redis: EmbeddedRedis, calls: Calls
) -> None:
    owner, other = (make_instance(url=own_redis.url, slots=1) for _ in range(2))
    await eventually(lambda: owner.notifier.peers and other.notifier.peers)
    calls.run_on(owner, 1)
    (task_id,) = await submit_all([owner], ["a"])
    await eventually(lambda: calls.paid[task_id])
    calls.run_on(other, 1)
    (other_id,) = await submit_all([other], ["b"])
    await eventually(lambda: calls.paid[other_id])  # with both slots held, no instance notices the loss
    await owner.connection.commands.flushall()
    submitted = await other.client_queue.submit(submission("a"))
    assert submitted.cached is CacheResult.COALESCED
    calls.go_on.set()
    await eventually(lambda: all_ended(calls, [task_id, other_id]), within_s=20)
    await check_paid_once(calls, [owner, other], [task_id, other_id])


async def test_a_task_without_an_owner_fails_at_its_deadline(
    make_instance: MakeInstance, own_redis: EmbeddedRedis
) -> None:
    before = make_instance(url=own_redis.url, start=False, deadline_s=0.5)
    await before.verbs.create_group()
    task = (await before.client_queue.submit(submission("a"))).task
    await before.connection.commands.delete(before.keys.stream)
    after = make_instance(url=own_redis.url, deadline_s=0.5)
    assert (await after.task(task.id)).state is State.PENDING

    async def failed() -> bool:
        return (await after.task(task.id)).state is State.FAILED

    await eventually(failed, within_s=30)
    error = (await after.task(task.id)).error
    assert error
    assert (error.code, error.retryable) == ("interrupted", True)
    assert (await after.client_queue.submit(submission("a"))).cached is CacheResult.MISS


async def test_reading_a_waiting_task_past_its_deadline_does_not_fail_it(
    make_instance: MakeInstance, own_redis: EmbeddedRedis
) -> None:
    instance = make_instance(url=own_redis.url, start=False, deadline_s=-60.0)
    await instance.verbs.create_group()
    task = (await instance.client_queue.submit(submission("a"))).task
    instance.task_cache.forget(task.id)
    assert (await instance.task(task.id)).state is State.PENDING


async def test_pending_webhooks_are_delivered_after_a_flush(
    make_instance: MakeInstance, own_redis: EmbeddedRedis
) -> None:
    instance = make_instance(url=own_redis.url)
    webhook = Webhook("https://hooks.example.com/a", "http://here")
    waiting = asyncio.create_task(instance.claim())
    await instance.client_queue.submit(replace(submission("a"), webhooks=(webhook,)))
    claim = await asyncio.wait_for(waiting, 20)
    assert await instance.worker_queue.start(claim) is StartResult.STARTED
    await instance.worker_queue.finish(claim, transitions.completed(claim.task, [IMAGE], [], now=time.time(), ttl_s=60))
    redis = instance.connection.commands
    assert await redis.zcard(instance.keys.outbox) == 1
    waiting = asyncio.create_task(instance.claim())
    await eventually(lambda: instance.parts.dispatcher.free_slots)
    await redis.flushall()

    async def due() -> bool:
        return bool(await redis.zcard(instance.keys.outbox)) and bool(
            await redis.exists(instance.keys.record(claim.task.id))
        )

    await eventually(due)
    waiting.cancel()


async def test_evicted_records_are_counted_and_restored(
    make_instance: MakeInstance, own_redis: EmbeddedRedis, quick_checks: None
) -> None:
    instance = make_instance(url=own_redis.url)
    instance.worker_queue.quiet()
    tasks = [(await instance.client_queue.submit(submission(i))).task for i in range(3)]
    await instance.connection.commands.delete(*(instance.keys.record(task.id) for task in tasks[:2]))
    for task in tasks:
        assert (await instance.read(task.id)).state is State.PENDING

    async def written_back() -> bool:
        return await instance.connection.commands.exists(*(instance.keys.record(task.id) for task in tasks)) == 3

    await eventually(written_back)
    await eventually(lambda: instance.connection.meter.vanished == 2)
    assert await instance.connection.commands.xlen(instance.keys.stream) == 3


async def test_an_instance_that_missed_every_greeting_detects_its_peers(
    make_instance: MakeInstance,
    own_redis: EmbeddedRedis,
    calls: Calls,
    quick_checks: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("imagegen.queue.notifier.Notifier.publish", lambda *_args, **_content: None)
    first, second = (make_instance(url=own_redis.url, slots=1) for _ in range(2))
    calls.run_on(first, 1)
    await submit_all([first], ["runs"])
    await eventually(lambda: len(calls.paid) == 1)
    task_id, other_id = await submit_all([first], ["taken by the other", "taken by the other later"])
    assert first.notifier.alone
    assert second.notifier.alone
    claim = await second.claim()
    assert claim.task.id == task_id
    assert await second.worker_queue.start(claim) is StartResult.STARTED
    await second.worker_queue.finish(claim, transitions.completed(claim.task, [IMAGE], [], now=time.time(), ttl_s=60))
    await eventually(lambda: is_final(first, task_id))
    assert (await first.task(other_id)).state is State.PENDING


async def test_waiting_tasks_cost_one_command_a_check(
    make_instance: MakeInstance, own_redis: EmbeddedRedis, quick_checks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    instance = make_instance(url=own_redis.url, slots=1)
    instance.worker_queue.quiet()
    await eventually(lambda: instance.notifier.subscribed)
    for number in range(20):
        await instance.client_queue.submit(submission(number))
    checks, asked = 0, instance.parts.change_relay.check_alone

    async def counted() -> None:
        nonlocal checks
        await asked()
        checks += 1

    monkeypatch.setattr(instance.parts.change_relay, "check_alone", counted)
    await eventually(lambda: checks == 1)
    before = instance.connection.meter.commands["read"]  # others belong to loops that run meanwhile

    async def all_read_until_the_fifth_check() -> bool:
        for number in range(20):
            assert (await instance.task(submission(number).task_id)).state is State.PENDING
        return checks >= 5

    await eventually(all_read_until_the_fifth_check)
    assert instance.connection.meter.commands["read"] - before <= checks


async def test_a_running_task_is_possibly_billed_twice_after_a_full_loss(
    make_instance: MakeInstance, own_redis: EmbeddedRedis
) -> None:
    before = make_instance(url=own_redis.url)
    waiting = asyncio.create_task(before.claim())
    await before.client_queue.submit(submission("a"))
    claim = await asyncio.wait_for(waiting, 20)
    assert await before.worker_queue.start(claim) is StartResult.STARTED
    await before.crash()
    await before.connection.commands.delete(before.keys.stream)
    after = make_instance(url=own_redis.url)
    waiting = asyncio.create_task(after.claim())
    assert (await after.client_queue.submit(submission("a"))).cached is CacheResult.MISS
    again = await asyncio.wait_for(waiting, 20)
    while (start := await after.worker_queue.start(again)) is StartResult.INHERITED:
        pass
    assert start is StartResult.STARTED
    final = transitions.completed(again.task, [IMAGE], [], now=time.time(), ttl_s=60)
    assert (await after.worker_queue.finish(again, final)).possibly_billed_twice == 1


async def test_a_finished_task_that_an_older_stream_would_run_again_is_not_paid_again(
    make_instance: MakeInstance, own_redis: EmbeddedRedis, calls: Calls
) -> None:
    one, other = make_instance(url=own_redis.url, slots=1), make_instance(url=own_redis.url, start=False)
    calls.run_on(one, loops=1)
    ids = await submit_all([one], ["runs", "waits"])
    await eventually(lambda: calls.paid.total() == 1)
    redis = one.connection.commands
    older = await redis.dump(one.keys.stream)
    assert older
    calls.go_on.set()
    await eventually(lambda: calls.ended == set(ids))
    await redis.delete(*map(one.keys.record, ids))
    await redis.restore(one.keys.stream, 0, older, replace=True)
    await eventually(lambda: at_rest(one))
    await eventually(lambda: all_final([other], ids))
    assert calls.paid == Counter(ids)


async def completed(instance: Instance) -> Task:
    """Run the next task of an instance."""
    claim = await instance.claim()
    assert await instance.worker_queue.start(claim) is StartResult.STARTED
    final = transitions.completed(claim.task, [IMAGE], [], now=time.time(), ttl_s=60)
    return await instance.worker_queue.finish(claim, final)


async def lost_end(make_instance: MakeInstance, redis: EmbeddedRedis) -> tuple[Instance, Task, Instance, Claim]:
    """Return an instance and a task that ended there, and another one with the claim that Redis gave once more."""
    one, other = make_instance(url=redis.url, slots=1), make_instance(url=redis.url, slots=1)
    await eventually(lambda: one.notifier.peers and other.notifier.peers)
    (task_id,) = await submit_all([one], ["a"])
    commands, names = one.connection.commands, (one.keys.stream, one.keys.record(task_id))
    older = [await commands.dump(name) for name in names]
    final = await completed(one)
    await commands.delete(one.keys.checkpoint(task_id))
    for name, value in zip(names, older, strict=True):
        assert value
        await commands.restore(name, 0, value, replace=True)
    claim = await other.claim()
    assert (claim.task.id, claim.task.epoch) == (final.id, final.epoch)
    return one, final, other, claim


async def test_a_task_whose_lost_end_a_peer_writes_back_is_not_started_again(
    make_instance: MakeInstance, own_redis: EmbeddedRedis
) -> None:
    one, final, other, claim = await lost_end(make_instance, own_redis)
    other.parts.recovery.notice("a test")
    start = asyncio.create_task(other.worker_queue.start(claim))
    one.parts.recovery.notice("a test", publish=True)
    await eventually(lambda: one.connection.meter.written_back["finished"] == 1, within_s=30)
    assert await asyncio.wait_for(start, 30) is StartResult.LOST
    assert (await one.read(final.id)).counted_in == final.counted_in


async def test_a_claim_without_a_call_counts_nothing_if_a_peer_has_ended_its_task(
    make_instance: MakeInstance, own_redis: EmbeddedRedis
) -> None:
    one, final, other, claim = await lost_end(make_instance, own_redis)
    one.parts.recovery.notice("a test", publish=True)
    await eventually(lambda: one.connection.meter.written_back["finished"] == 1, within_s=30)
    other.parts.recovery.notice("a test", publish=True)
    await eventually(lambda: claim.lost, within_s=30)
    await other.connection.recovered.wait()
    assert (await other.read(final.id)).possibly_billed_twice == 0


async def test_a_second_loss_that_only_a_peer_notices_is_restored_at_once(
    make_instance: MakeInstance, own_redis: EmbeddedRedis, calls: Calls
) -> None:
    one, other = make_instance(url=own_redis.url), make_instance(url=own_redis.url)
    await eventually(lambda: one.notifier.peers and other.notifier.peers)
    calls.go_on.set()
    calls.run_on(one)
    (task_id,) = await submit_all([one], ["a"])
    await eventually(lambda: task_id in calls.ended)
    redis = one.connection.commands
    written_back = one.connection.meter.written_back
    for number in (1, 2):
        await redis.delete(one.keys.record(task_id))
        other.parts.recovery.notice("a test", publish=True)
        await eventually(partial(counts, written_back, "finished", number), within_s=30)
        await other.connection.recovered.wait()


async def test_an_instance_shows_a_later_count_of_a_task_whose_result_it_has(
    make_instance: MakeInstance, own_redis: EmbeddedRedis, calls: Calls
) -> None:
    one = make_instance(url=own_redis.url)
    calls.go_on.set()
    calls.run_on(one)
    (task_id,) = await submit_all([one], ["a"])
    await eventually(lambda: task_id in calls.ended)
    one.parts.leases.lost_claims.keep(await one.task(task_id), 2)
    assert (await one.task(task_id)).possibly_billed_twice == 2


async def has_entries(server: RedisServer, instance: Instance, count: int) -> bool:
    return bool(await server.redis.xlen(instance.keys.stream) == count)


async def test_an_instance_that_starts_after_a_failover_pays_no_task_that_another_one_has_yet_to_write_back(
    make_instance: MakeInstance, calls: Calls, tmp_path: Path
) -> None:
    async with primary_and_replica(tmp_path) as (primary, replica), FaultProxy(primary.path) as proxy:
        one = make_instance(url=proxy.url, slots=1)
        await eventually(lambda: one.connection.commands.exists(one.keys.server), within_s=5)
        calls.run_on(one, 1)
        first, second = await submit_all([one], ["holds the slot", "ends in the lost window"])
        await eventually(lambda: calls.paid[first])
        await eventually(partial(has_entries, replica, one, 2))
        await promote(primary, replica)
        calls.go_on.set()
        await eventually(lambda: second in calls.ended)
        other = make_instance(url=f"unix://{replica.path}", slots=1)
        calls.run_on(other, 1)
        await eventually(lambda: second in other.parts.dispatcher.claimed or calls.paid[second] > 1)
        proxy.to(replica.path)
        proxy.cut()
        await eventually(lambda: at_rest(other), within_s=30)
        await other.connection.recovered.wait()
        assert calls.paid == Counter([first, second])


async def test_a_submit_outlasts_a_start_that_waits_for_an_instance_that_is_gone(
    make_instance: MakeInstance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("imagegen.queue.recovery.MAX_SETTLE_S", 1.5)
    async with primary_and_replica(tmp_path) as (primary, replica):
        gone = make_instance(url=f"unix://{primary.path}")
        await eventually(lambda: primary.redis.exists(gone.keys.server))
        await gone.client_queue.submit(submission("before"))
        await gone.claim()
        await promote(primary, replica)
        other = make_instance(url=f"unix://{replica.path}")
        assert (await other.client_queue.submit(submission("meanwhile"))).cached is CacheResult.MISS


async def test_waiting_tasks_that_a_recovery_has_yet_to_write_back_begin_no_second_one(
    make_instance: MakeInstance,
) -> None:
    instance = make_instance(slots=1)
    await instance.client_queue.submit(submission("runs"))
    await instance.claim()
    waiting = (await instance.client_queue.submit(submission("waits"))).task
    with logged() as lines:
        await instance.connection.commands.delete(instance.keys.stream)
        instance.parts.recovery.notice("a test lost writes")
        await instance.parts.recovery.check_waiting([waiting])
        await instance.connection.recovered.wait()
    assert not [line for line in lines if "waiting tasks have no entry" in line]
    assert await instance.connection.commands.xlen(instance.keys.stream) == 2
