"""Tasks and upstreams for the tests of the pool."""

from __future__ import annotations

import asyncio

from imagegen.providers.protocol import Call, Reply
from imagegen.tasks.task import State
from tests.worker.conftest import WorkerHarness, images


class Switch:
    """An upstream that fails until it is repaired."""

    def __init__(self, error: Exception | None = None, call_s: float = 0.005) -> None:
        self.error, self.call_s = error, call_s

    async def __call__(self, call: Call) -> Reply:
        await asyncio.sleep(self.call_s)
        if self.error:
            raise self.error
        return images(call.count)


async def hang(_call: Call) -> Reply:
    await asyncio.Event().wait()
    raise AssertionError


async def submit_many(harness: WorkerHarness, count: int) -> list[str]:
    return list(await asyncio.gather(*(harness.submit(i) for i in range(count))))


async def states(harness: WorkerHarness, task_ids: list[str], within_s: float = 30.0) -> set[State]:
    return {task.state for task in await harness.finished(*task_ids, within_s=within_s)}
