"""Starts and ends of claims, as by a worker that makes images or fails."""

from __future__ import annotations

import asyncio
import time

from imagegen.queue.claim import Claim, StartResult
from imagegen.tasks import transitions
from imagegen.tasks.image import StoredImage
from imagegen.tasks.task import Task, TaskError
from tests.conftest import Instance
from tests.support import submission

IMAGE = StoredImage(0, "image/png", 10, 8, 8, "a" * 64)


async def start_submitted(instance: Instance) -> Claim:
    """Submit a task to an instance that waits for one, and start its claim there, not at a peer."""
    claiming = asyncio.create_task(instance.claim())
    await instance.client_queue.submit(submission("a"))
    claim = await asyncio.wait_for(claiming, 20)
    await instance.worker_queue.start(claim)
    return claim


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
