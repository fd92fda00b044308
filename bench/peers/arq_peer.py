# mypy: ignore-errors
"""The same work on arq: Worker.async_run and a pool of the client's own, in this process."""

from __future__ import annotations

import asyncio

from arq import Worker, create_pool
from arq.connections import RedisSettings
from arq.constants import result_key_prefix
from contract import Finished, given, measure, report


async def noop(_context: dict[str, object]) -> None:
    return None


async def main() -> None:
    wanted, finished = given(), Finished()
    settings = RedisSettings.from_dsn(wanted.url)

    async def after_job_end(_context: dict[str, object]) -> None:
        finished.one()

    worker = Worker(
        [noop], redis_settings=settings, max_jobs=wanted.concurrency, after_job_end=after_job_end, handle_signals=False
    )
    working = asyncio.create_task(worker.async_run())
    client = await create_pool(settings)

    async def submit() -> str:
        return (await client.enqueue_job("noop")).job_id

    seconds, ids = await measure(wanted, submit, finished.reach)
    stored = await client.exists(*(result_key_prefix + name for name in ids))
    report(wanted, seconds, min(stored, worker.jobs_complete), "arq", "redis")
    working.cancel()


asyncio.run(main())
