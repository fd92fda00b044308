# mypy: ignore-errors
"""The same work on streaq: Worker.run_async in this process, which submits through the same Worker."""

from __future__ import annotations

import asyncio

import anyio
from contract import Finished, given, measure, report
from streaq import Worker
from streaq.constants import REDIS_RESULTS_SET

POLL_S = 0.002


async def main() -> None:
    wanted, finished = given(), Finished()
    worker = Worker(redis_url=wanted.url, concurrency=wanted.concurrency, handle_signals=False)

    @worker.task
    async def noop() -> None:
        finished.one()

    async def submit() -> str:
        return (await noop.enqueue()).id

    async def until_stored(total: int) -> None:
        """No hook runs after a result is stored, so the index of results is polled once all have run."""
        await finished.reach(total)
        while await worker.redis.zcard(worker.prefix + REDIS_RESULTS_SET) < total:  # noqa: ASYNC110
            await asyncio.sleep(POLL_S)

    async with anyio.create_task_group() as working:
        await working.start(worker.run_async)
        seconds, ids = await measure(wanted, submit, until_stored)
        stored = await worker.redis.exists([worker.results_key + name for name in ids])
        report(wanted, seconds, min(stored, worker.counters["completed"]), "streaq", "coredis")
        working.cancel_scope.cancel()


asyncio.run(main())
