"""Tests of what instances learn of each other's tasks, by messages or by reading."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator
from typing import Any

import orjson
import pytest
from redis.asyncio import Redis
from redis.asyncio.client import PubSub
from redis.exceptions import ConnectionError as RedisConnectionError

from imagegen.errors import QueueUnavailable
from imagegen.queue import change_relay as watching
from imagegen.queue.client_queue import CacheResult
from imagegen.queue.task_lookup import TaskLookup
from imagegen.queue.verbs.read import TaskRows
from imagegen.redis_client.multiplexer import MAX_ITEMS
from imagegen.supervisor import Supervisor
from imagegen.tasks import transitions
from imagegen.tasks.retry import Retry
from imagegen.tasks.task import State, Task, WaitReason
from tests.conftest import Instance, MakeInstance
from tests.queue.finishing import end, run_one, start_submitted
from tests.support import Turns, eventually, submission


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
    assert backlog.oldest_age_s == pytest.approx(0.0, abs=20.0)


async def test_results_of_other_instances_leave_memory(
    make_instance: MakeInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "REFRESH_S", 0.05)
    one, _two, _task = await finished_elsewhere(make_instance)
    await eventually(lambda: not one.task_cache.live)


async def test_a_change_wakes_waiters_on_another_instance(make_instance: MakeInstance) -> None:
    one, two = make_instance(), make_instance()
    await eventually(lambda: not two.notifier.alone and not one.notifier.alone)
    with two.feed.subscribe([submission("a").task_id]) as waiting:
        claim = await start_submitted(one)
        await end(one, claim)
        states = []
        async with asyncio.timeout(20):
            while State.COMPLETED not in states:
                states += [task.state for task in await waiting.changes(2.0)]
    assert (await two.task(claim.task.id)).state is State.COMPLETED


async def test_the_position_of_a_claimed_task_can_be_read_on_another_instance(make_instance: MakeInstance) -> None:
    one, two = make_instance(), make_instance()
    await eventually(lambda: not two.notifier.alone and not one.notifier.alone)
    task = (await one.client_queue.submit(submission("a"))).task
    await one.claim()
    with two.feed.subscribe([task.id]):  # the first instance publishes the task, which has not begun
        await eventually(lambda: two.task_cache.recent_remote(task.id)[1])
        seen = await two.task(task.id)
        assert (seen.state, seen.entry_id, seen.retry_at) == (State.PENDING, task.entry_id, None)
        assert (await two.client_queue.position(seen)).position == 1


async def test_a_task_resubmitted_elsewhere_is_not_served_from_memory(make_instance: MakeInstance) -> None:
    one, two = make_instance(), make_instance()
    await eventually(lambda: not two.notifier.alone and not one.notifier.alone)
    claim = await start_submitted(one)
    await end(one, claim, "failed")
    assert (await two.client_queue.submit(submission("a"))).cached is CacheResult.MISS

    async def seen_afresh() -> bool:
        return (await one.task(claim.task.id)).state is State.PENDING

    await eventually(seen_afresh)


async def knows(instance: Instance, first: Task) -> bool:
    """Return whether an instance returns a later generation of a finished task."""
    task = await instance.client_queue.get(first.id)
    return task is not None and task.epoch > first.epoch


async def two_with_a_finished_task(make_instance: MakeInstance) -> tuple[Instance, Instance, Task]:
    """Return two instances that both have the end of a task in memory."""
    one, two = make_instance(), make_instance()
    await eventually(lambda: one.notifier.peers and two.notifier.peers)
    first = await end(one, await start_submitted(one), "completed")
    assert await two.client_queue.get(first.id) == first
    return one, two, first


@pytest.mark.parametrize("is_submitted", [False, True])
async def test_a_lost_message_about_a_resubmitted_task_leaves_no_instance_behind(
    make_instance: MakeInstance, monkeypatch: pytest.MonkeyPatch, is_submitted: bool
) -> None:
    one, two, first = await two_with_a_finished_task(make_instance)
    monkeypatch.setattr(one.notifier, "publish", lambda *_, **__: None)
    await one.client_queue.replace(submission("a"), first, keep=True)
    assert not await knows(two, first)
    await one.connection.commands.execute_command("CLIENT", "KILL", "TYPE", "pubsub")

    async def is_seen() -> bool:
        if is_submitted:
            return (await two.client_queue.submit(submission("a"))).task.epoch > first.epoch
        return await knows(two, first)

    await eventually(is_seen)


async def test_a_message_about_a_resubmitted_task_that_fails_is_published_again(
    make_instance: MakeInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two, first = await two_with_a_finished_task(make_instance)
    publish, failures = one.connection.commands.publish, [RedisConnectionError("reset")]

    async def fail_once(channel: str, message: bytes) -> int:
        if b"fresh" in message and failures:
            raise failures.pop()
        return int(await publish(channel, message))

    monkeypatch.setattr(one.connection.commands, "publish", fail_once)
    await one.client_queue.replace(submission("a"), first, keep=True)
    await eventually(lambda: knows(two, first))
    assert not failures


@pytest.mark.parametrize("count", [40, 3_000])
async def test_messages_about_tasks_resubmitted_while_redis_is_away_are_repeated_as_one(
    make_instance: MakeInstance, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    monkeypatch.setattr("imagegen.queue.notifier.HELLO_AGAIN_S", 0.2)
    one, two, first = await two_with_a_finished_task(make_instance)
    publish, tried, is_away = one.connection.commands.publish, list[bytes](), True

    async def publish_if_there(channel: str, message: bytes) -> int:
        tried.append(message)
        if is_away:
            raise RedisConnectionError("reset")
        return int(await publish(channel, message))

    monkeypatch.setattr(one.connection.commands, "publish", publish_if_there)
    await one.client_queue.replace(submission("a"), first, keep=True)
    for number in range(count):
        one.notifier.publish("fresh", ids=[f"{number:032x}"])
    await eventually(lambda: len(tried) == count + 2)  # all, and their first repeat
    await eventually(lambda: len(tried) > count + 4)
    is_away = False
    await eventually(lambda: knows(two, first))
    repeated = tried[count + 1 :]
    assert len(repeated) < 20
    assert max(map(len, repeated)) < 40_000


async def test_a_peer_that_did_not_answer_for_a_while_learns_what_was_resubmitted_meanwhile(
    make_instance: MakeInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("imagegen.queue.notifier.SILENT_S", 0.1)
    one, two, first = await two_with_a_finished_task(make_instance)
    publish = two.notifier.publish
    monkeypatch.setattr(two.notifier, "publish", lambda *_, **__: None)
    one.notifier.ping_peers()
    await eventually(lambda: not one.notifier.peers)
    await one.client_queue.replace(submission("a"), first, keep=True)
    assert not await knows(two, first)
    monkeypatch.setattr(two.notifier, "publish", publish)
    two.notifier.publish("busy")
    await eventually(lambda: knows(two, first))


async def test_without_the_channel_a_resubmitted_task_is_seen_by_reading(
    make_instance: MakeInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("imagegen.queue.task_lookup.UNINFORMED_TRUST_S", 0.1)
    one, two, first = await two_with_a_finished_task(make_instance)
    monkeypatch.setattr(two.notifier, "silent", True)
    monkeypatch.setattr(one.notifier, "publish", lambda *_, **__: None)
    await one.client_queue.replace(submission("a"), first, keep=True)
    await eventually(lambda: knows(two, first))


async def test_a_finished_task_is_served_while_redis_lacks_it_or_is_away(
    make_instance: MakeInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("imagegen.queue.task_lookup.FINISHED_TRUST_S", -1.0)
    one, two = make_instance(), make_instance()
    await eventually(lambda: one.notifier.peers and two.notifier.peers)
    first = await end(one, await start_submitted(one), "completed")
    await one.connection.commands.delete(one.keys.record(first.id))
    assert await one.client_queue.get(first.id) == first

    async def refuse(_task_id: str) -> TaskRows:
        raise QueueUnavailable

    monkeypatch.setattr(one.verbs, "read", refuse)
    assert await one.client_queue.get(first.id) == first


async def test_a_result_is_not_replaced_by_that_of_another_instance_before_both_were_compared(
    make_instance: MakeInstance,
) -> None:
    one, two = make_instance(), make_instance()
    await eventually(lambda: one.notifier.peers and two.notifier.peers)
    first = await end(one, await start_submitted(one), "completed")
    record = await one.stored(one.keys.record(first.id))
    assert record.count(b'"attempts":1') == 1
    await one.connection.commands.set(one.keys.record(first.id), record.replace(b'"attempts":1', b'"attempts":2'))
    one.parts.task_lookup.doubt_finished()
    one.connection.unsettled_until = math.inf  # lost writes are written back
    assert await one.client_queue.get(first.id) == first
    assert await one.client_queue.fresh(first.id) != first
    assert await one.client_queue.get(first.id) == first
    one.connection.unsettled_until = -math.inf
    task = await one.client_queue.get(first.id)
    assert task is not None
    assert task.attempts == 2


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


async def test_awaited_tasks_are_read_again_a_batch_at_a_time(
    make_instance: MakeInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "REFRESH_S", 0.02)
    instance, read, lookup_read = make_instance(start=False), list[str](), TaskLookup.read

    async def counted(self: TaskLookup, task_id: str) -> Task | None:
        read.append(task_id)
        return await lookup_read(self, task_id)

    monkeypatch.setattr(TaskLookup, "read", counted)
    ids = {f"{number:032x}" for number in range(5 * MAX_ITEMS)}
    with instance.feed.subscribe(ids):
        turns = Turns(lambda: len(read))
        refreshing = asyncio.create_task(instance.parts.change_relay.refresh_forever())
        await eventually(lambda: len(read) >= len(ids))
        assert turns.most() == MAX_ITEMS
        assert ids <= set(read)
    await Supervisor().stop([refreshing])


async def test_without_a_channel_changes_are_polled_with_growing_intervals(
    make_instance: MakeInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "REFRESH_S", 30.0)
    monkeypatch.setattr(watching, "POLL_S", 0.02)
    one, two = make_instance(start=False), make_instance(start=False)
    two.notifier.silent = True
    await one.verbs.create_group()
    task = (await one.client_queue.submit(submission("a"))).task
    read, read_at = two.verbs.read, list[float]()

    async def recorded(task_id: str) -> TaskRows:
        read_at.append(time.monotonic())
        return await read(task_id)

    monkeypatch.setattr(two.verbs, "read", recorded)
    refreshing = asyncio.create_task(two.parts.change_relay.refresh_forever())
    with two.feed.subscribe([task.id]) as waiter:
        await eventually(lambda: len(read_at) >= 5)
        assert read_at[4] - read_at[2] > 6 * 0.02  # the intervals are 4 and 8 polls
        waiting = asyncio.create_task(one.claim())
        reader = asyncio.create_task(one.parts.consumer.read_forever())
        claim = await asyncio.wait_for(waiting, 20)
        await one.worker_queue.start(claim)
        await one.worker_queue.finish(claim, transitions.completed(claim.task, [], [], now=time.time(), ttl_s=60))
        async with asyncio.timeout(20):
            while not (await waiter.changes(5))[-1].state.is_final:
                pass
    await Supervisor().stop([refreshing, reader])
