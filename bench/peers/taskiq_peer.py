# mypy: ignore-errors
"""The same work on taskiq-redis: the stream broker and result backend, with the receiver in this process."""

from __future__ import annotations

import asyncio

from contract import Finished, given, measure, report
from redis.asyncio import Redis
from taskiq import TaskiqMessage, TaskiqMiddleware, TaskiqResult
from taskiq.api import run_receiver_task
from taskiq_redis import RedisAsyncResultBackend, RedisStreamBroker


async def noop() -> None:
    return None


class Saved(TaskiqMiddleware):
    """Count each successful result that is saved."""

    def __init__(self, finished: Finished) -> None:
        super().__init__()
        self._finished = finished

    def post_save(self, _message: TaskiqMessage, result: TaskiqResult[None]) -> None:
        if not result.is_err:
            self._finished.one()


def broker(url: str) -> RedisStreamBroker:
    return RedisStreamBroker(url).with_result_backend(RedisAsyncResultBackend(url))


async def main() -> None:
    wanted, finished = given(), Finished()
    client, worker = broker(wanted.url), broker(wanted.url).with_middlewares(Saved(finished))
    task = client.register_task(noop, task_name="noop")
    worker.register_task(noop, task_name="noop")
    await client.startup()
    await worker.startup()
    working = asyncio.create_task(run_receiver_task(worker, max_async_tasks=wanted.concurrency))

    async def submit() -> str:
        return (await task.kiq()).task_id

    seconds, ids = await measure(wanted, submit, finished.reach)
    async with Redis.from_url(wanted.url) as redis:
        report(wanted, seconds, await redis.exists(*ids), "taskiq", "taskiq-redis", "redis")
    working.cancel()


asyncio.run(main())
