"""What instances do when Redis has lost writes that they know of: a failover, a flush, a deleted stream."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from faults.proxy import FaultProxy
from faults.servers import RedisServer, primary_and_replica, promote
from support import eventually, submission

from imagegen.errors import QueueUnavailable
from imagegen.queue.claim import Start
from imagegen.tasks import task as edges
from imagegen.tasks.image import StoredImage
from imagegen.tasks.task import State

IMAGE = StoredImage(0, "image/png", 10, 8, 8, "a" * 64)


class Calls:
    """Loops that run tasks on instances: each paid call is counted, and ends when the test lets it.

    paid: calls by task id; broken_off: tasks whose claim was lost while the call ran.
    """

    def __init__(self) -> None:
        self.paid: Counter[str] = Counter()
        self.broken_off: list[str] = []
        self.ended: set[str] = set()
        self.go_on = asyncio.Event()
        self._loops: list[asyncio.Task[None]] = []

    def run_on(self, instance, loops: int = 2) -> None:
        self._loops += [asyncio.create_task(self._loop(instance)) for _ in range(loops)]

    async def _loop(self, instance) -> None:
        while True:
            claim = await instance.claims.claim()
            start = Start.ADOPTED
            while start is Start.ADOPTED:
                start = await instance.claims.start(claim)
            if start is Start.LOST:
                instance.claims.drop(claim)
                continue
            self.paid[claim.task.id] += 1
            await self.go_on.wait()
            if claim.lost:
                self.broken_off.append(claim.task.id)
                instance.claims.drop(claim)
                continue
            final = edges.completed(claim.task, [IMAGE], [], now=time.time(), ttl_s=60)
            final = await instance.claims.finish(claim, final)
            if final.state is State.COMPLETED:
                self.ended.add(claim.task.id)

    async def stop(self) -> None:
        for loop in self._loops:
            loop.cancel()
        await asyncio.gather(*self._loops, return_exceptions=True)


@pytest.fixture
async def calls() -> AsyncIterator[Calls]:
    calls = Calls()
    yield calls
    await calls.stop()


@pytest.fixture
async def servers(tmp_path: Path) -> AsyncIterator[tuple[RedisServer, RedisServer]]:
    async with primary_and_replica(tmp_path) as pair:
        yield pair


async def put_in(instances, names) -> list[str]:
    """Submits to the instances in turn; returns the ids."""
    ids = []
    for number, name in enumerate(names):
        task = (await instances[number % len(instances)].queue.submit(submission(name))).task
        ids.append(task.id)
    return ids


async def is_final(instance, task_id: str) -> bool:
    try:
        task = await instance.queue.get(task_id)
    except QueueUnavailable:
        return False
    return task is not None and task.state is State.COMPLETED


async def all_final(instances, ids) -> bool:
    return all([await is_final(instance, task_id) for instance in instances for task_id in ids])


async def has_all(server: RedisServer, keys) -> bool:
    return await server.redis.exists(*keys) == len(keys)


async def at_rest(instance) -> bool:
    redis = instance.connection.commands
    pending = await redis.xpending(instance.keys.stream, "pool")
    return await redis.xlen(instance.keys.stream) == 0 and pending["pending"] == 0


@pytest.mark.parametrize("count", [1, 2])
async def test_a_failover_that_loses_the_last_writes_loses_no_task_and_pays_for_none_again(
    make_instance, servers, calls, count: int
) -> None:
    primary, replica = servers
    async with FaultProxy(primary.path) as proxy:
        instances = [make_instance(url=proxy.url, slots=4 // count) for _ in range(count)]
        await eventually(lambda: all(len(i.control.peers) == count - 1 for i in instances))
        await promote(primary, replica)
        calls.go_on.set()
        for instance in instances:
            calls.run_on(instance, 4 // count)
        finished = await put_in(instances, [f"finished {i}" for i in range(20)])
        await eventually(lambda: calls.ended.issuperset(finished))
        calls.go_on.clear()
        running = await put_in(instances, [f"running {i}" for i in range(4)])
        await eventually(lambda: all(calls.paid[one] for one in running))
        waiting = await put_in(instances, [f"waiting {i}" for i in range(20)])
        assert await replica.redis.dbsize() <= 1
        proxy.to(replica.path)
        proxy.cut()
        await primary.kill()
        everything = [*finished, *running, *waiting]
        records = [instances[0].keys.record(task_id) for task_id in everything]
        await eventually(lambda: has_all(replica, records), within_s=10)
        calls.go_on.set()
        await eventually(lambda: calls.ended.issuperset(everything), within_s=20)
        for instance in instances:
            for task_id in everything:
                instance.memory.forget(task_id)
        await eventually(lambda: all_final(instances, everything), within_s=10)
        assert calls.broken_off == []
        assert [one for one in everything if calls.paid[one] != 1] == []
        await eventually(lambda: at_rest(instances[0]))


LOSSES = {
    "flushall": lambda redis, keys: redis.flushall(),
    "stream": lambda redis, keys: redis.delete(keys.stream),
    "group": lambda redis, keys: redis.xgroup_destroy(keys.stream, "pool"),
    "entries": lambda redis, keys: redis.xtrim(keys.stream, maxlen=0, approximate=False),
}


@pytest.fixture
def quick_checks(monkeypatch) -> None:
    """What is done every few seconds is done more often."""
    monkeypatch.setattr("imagegen.queue.watching.REFRESH_S", 0.2)
    monkeypatch.setattr("imagegen.queue.watching.TRUST_S", 0.25)
    monkeypatch.setattr("imagegen.queue.recovery.CHECK_AGAIN_S", 0.3)


def all_ended(calls: Calls, ids) -> bool:
    return calls.ended.issuperset(ids)


@pytest.mark.usefixtures("quick_checks")
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("loss", LOSSES)
async def test_what_is_deleted_in_redis_is_written_back_and_nothing_is_paid_twice(
    make_instance, own_redis, calls, loss: str, count: int
) -> None:
    instances = [make_instance(url=own_redis.url, slots=4 // count, lease_s=1.5) for _ in range(count)]
    await eventually(lambda: all(len(i.control.peers) == count - 1 for i in instances))
    for instance in instances:
        calls.run_on(instance, 4 // count)
    calls.go_on.set()
    finished = await put_in(instances, [f"finished {i}" for i in range(4)])
    await eventually(lambda: calls.ended.issuperset(finished))
    calls.go_on.clear()
    running = await put_in(instances, [f"running {i}" for i in range(4)])
    await eventually(lambda: all(calls.paid[one] for one in running))
    waiting = await put_in(instances, [f"waiting {i}" for i in range(20)])
    redis = instances[0].connection.commands
    await LOSSES[loss](redis, instances[0].keys)

    async def pending_again() -> bool:
        if not await redis.exists(instances[0].keys.stream):
            return False
        groups = await redis.xinfo_groups(instances[0].keys.stream)
        return [group["pending"] for group in groups] == [len(running)]

    await eventually(pending_again, within_s=10)
    calls.go_on.set()
    everything = [*finished, *running, *waiting]
    await eventually(lambda: all_ended(calls, everything), within_s=20)
    for instance in instances:
        for task_id in everything:
            instance.memory.forget(task_id)
    await eventually(lambda: all_final(instances, everything), within_s=10)
    assert calls.broken_off == []
    assert [one for one in everything if calls.paid[one] != 1] == []
    await eventually(lambda: at_rest(instances[0]))
