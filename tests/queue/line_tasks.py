"""Tasks of clients with lines, and loops that run them."""

from __future__ import annotations

import asyncio
import time

from msgspec.structs import replace

from imagegen.queue.claim import Claim, StartResult
from imagegen.tasks import transitions
from imagegen.tasks.image import StoredImage
from imagegen.tasks.submission import Submission
from imagegen.tasks.task import Task
from tests.conftest import Instance
from tests.support import submission

IMAGE = StoredImage(0, "image/png", 10, 8, 8, "a" * 64)


def submission_of(client: str, name: object) -> Submission:
    return replace(submission(f"{client}{name}"), client=client)


async def put(instance: Instance, client: str, count: int, first: int = 0) -> list[Task]:
    submissions = [submission_of(client, number) for number in range(first, first + count)]
    return [each.task for each in await asyncio.gather(*map(instance.client_queue.submit, submissions))]


async def in_stream(instance: Instance) -> int:
    return await instance.connection.commands.xlen(instance.keys.stream)


async def in_line(instance: Instance, client: str = "a") -> int:
    return await instance.connection.commands.llen(instance.keys.line(client))


async def start_one(instance: Instance) -> Claim | None:
    """Start the next task; None if the queue has none left."""
    while (claim := await start_soon(instance, 0.5)) is None:
        if await is_at_rest(instance):
            return None
    return claim


async def start_soon(instance: Instance, within_s: float) -> Claim | None:
    """Start the next task; None if none comes in some seconds. A claim that comes later is the next one."""
    waiting: list[asyncio.Task[Claim | None]] = vars(instance).setdefault("claiming", [])
    claiming = waiting.pop() if waiting else asyncio.create_task(instance.worker_queue.claim())
    done, _ = await asyncio.wait([claiming], timeout=within_s)
    if not done:
        waiting.append(claiming)
        return None
    claim = claiming.result()
    assert claim is not None
    while (result := await instance.worker_queue.start(claim)) is StartResult.INHERITED:
        pass
    if result is StartResult.LOST:
        instance.worker_queue.drop(claim)
        return await start_soon(instance, within_s)
    return claim


async def finish(instance: Instance, claim: Claim) -> Task:
    final = transitions.completed(claim.task, [IMAGE], [], now=time.time(), ttl_s=60)
    return await instance.worker_queue.finish(claim, final)


async def run(instance: Instance, started: list[str], until: int) -> None:
    """Run tasks, one at once, until a number of them has been started."""
    while len(started) < until and (claim := await start_one(instance)) is not None:
        started.append(claim.task.id)
        await finish(instance, claim)


async def run_all(*instances: Instance) -> list[str]:
    """Run tasks on every slot until no task comes, and return them in order."""
    started: list[str] = []
    slots = [run(instance, started, 10**6) for instance in instances for _ in range(instance.worker_queue.slots)]
    await asyncio.gather(*slots)
    return started


async def is_at_rest(instance: Instance) -> bool:
    redis, keys = instance.connection.commands, instance.keys
    pending = await redis.xpending(keys.stream, "pool")
    return (await redis.xlen(keys.stream), pending["pending"], await redis.exists(keys.lines)) == (0, 0, 0)


async def drained(instance: Instance, started: list[str], count: int) -> None:
    while len(started) < count:
        await run(instance, started, count)
