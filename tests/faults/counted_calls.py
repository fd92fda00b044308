"""Loops that count each paid call, and what they leave in Redis."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterable, Sequence

from imagegen.errors import QueueUnavailable
from imagegen.queue.claim import StartResult
from imagegen.tasks import transitions
from imagegen.tasks.image import StoredImage
from imagegen.tasks.task import State
from tests.conftest import Instance
from tests.support import eventually, submission

IMAGE = StoredImage(0, "image/png", 10, 8, 8, "a" * 64)


class Calls:
    """Loops that run tasks on instances; each paid call is counted, and the test ends it.

    paid: calls by task id; broken_off: tasks whose claim was lost while the call ran.
    """

    def __init__(self) -> None:
        self.paid: Counter[str] = Counter()
        self.broken_off: list[str] = []
        self.ended: set[str] = set()
        self.go_on = asyncio.Event()
        self._loops: list[asyncio.Task[None]] = []

    def run_on(self, instance: Instance, loops: int = 2) -> None:
        self._loops += [asyncio.create_task(self._loop(instance)) for _ in range(loops)]

    async def _loop(self, instance: Instance) -> None:
        while (claim := await instance.worker_queue.claim()) is not None:
            start = StartResult.INHERITED
            while start is StartResult.INHERITED:
                start = await instance.worker_queue.start(claim)
            if start is StartResult.LOST:
                instance.worker_queue.drop(claim)
                continue
            self.paid[claim.task.id] += 1
            await self.go_on.wait()
            if claim.lost:
                self.broken_off.append(claim.task.id)
                instance.worker_queue.drop(claim)
                continue
            final = transitions.completed(claim.task, [IMAGE], [], now=time.time(), ttl_s=60)
            final = await instance.worker_queue.finish(claim, final)
            if final.state is State.COMPLETED:
                self.ended.add(claim.task.id)

    async def stop(self) -> None:
        for loop in self._loops:
            loop.cancel()
        await asyncio.gather(*self._loops, return_exceptions=True)


async def submit_all(instances: Sequence[Instance], names: Iterable[str]) -> list[str]:
    """Submit to the instances in turn; return the ids."""
    ids = []
    for number, name in enumerate(names):
        task = (await instances[number % len(instances)].client_queue.submit(submission(name))).task
        ids.append(task.id)
    return ids


async def is_final(instance: Instance, task_id: str) -> bool:
    try:
        task = await instance.client_queue.get(task_id)
    except QueueUnavailable:
        return False
    return task is not None and task.state is State.COMPLETED


async def all_final(instances: Iterable[Instance], ids: Iterable[str]) -> bool:
    return all([await is_final(instance, task_id) for instance in instances for task_id in ids])


async def check_paid_once(calls: Calls, instances: Sequence[Instance], ids: Sequence[str]) -> None:
    """Check in Redis, not in memory, that each task is completed, was paid once and left nothing in the queue."""
    for instance in instances:
        for task_id in ids:
            instance.task_cache.forget(task_id)
    await eventually(lambda: all_final(instances, ids), within_s=30)
    assert calls.broken_off == []
    assert [task_id for task_id in ids if calls.paid[task_id] != 1] == []
    await eventually(lambda: at_rest(instances[0]))


async def at_rest(instance: Instance) -> bool:
    redis = instance.connection.commands
    pending = await redis.xpending(instance.keys.stream, "pool")
    return await redis.xlen(instance.keys.stream) == 0 and pending["pending"] == 0
