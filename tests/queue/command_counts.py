"""Commands that the server counts and our meters count, and claims without background loops."""

from __future__ import annotations

import asyncio
import time
from typing import Self

from imagegen.queue.claim import Claim, StartResult
from imagegen.tasks import transitions
from imagegen.tasks.image import StoredImage
from imagegen.tasks.task import Task
from tests.conftest import Instance
from tests.support import submission

IMAGE = StoredImage(0, "image/png", 10, 8, 8, "a" * 64)
NOT_COUNTED = {"info", "ping", "hello", "auth", "select", "config", "client", "script"}


async def server_count(instance: Instance) -> int:
    """Return the number of commands that the server ran, without NOSCRIPT replies and those Upstash does not bill."""
    stats = await instance.connection.commands.info("commandstats")
    return sum(
        row["calls"] - (row["failed_calls"] if name == "cmdstat_evalsha" else 0)
        for name, row in stats.items()
        if name.removeprefix("cmdstat_").split("|")[0] not in NOT_COUNTED
    )


class CommandCount:
    """Commands within a block; metered: by our meters, counted: by the server."""

    def __init__(self, *instances: Instance) -> None:
        self._instances = instances

    def _meters(self) -> int:
        return sum(instance.connection.meter.commands.total() for instance in self._instances)

    async def __aenter__(self) -> Self:
        self._before = self._meters(), await server_count(self._instances[0])
        return self

    async def __aexit__(self, *_: object) -> None:
        self.metered = self._meters() - self._before[0]
        self.counted = await server_count(self._instances[0]) - self._before[1]


async def put(instance: Instance, *names: object) -> list[Task]:
    return [
        answer.task for answer in await asyncio.gather(*(instance.client_queue.submit(submission(n)) for n in names))
    ]


async def claim(instance: Instance) -> list[Claim]:
    entries = await instance.verbs.read_entries("i", 10, 0.01)
    return await instance.parts.leases.hold(entries)


async def started(instance: Instance, *names: object) -> list[Claim]:
    await put(instance, *names)
    claims = await claim(instance)
    for each in claims:
        assert await instance.worker_queue.start(each) is StartResult.STARTED
    return claims


def completed(task: Task) -> Task:
    return transitions.completed(task, [IMAGE], [], now=time.time(), ttl_s=60)


async def finished(instance: Instance, *claims: Claim) -> None:
    await asyncio.gather(*(instance.worker_queue.finish(each, completed(each.task)) for each in claims))
