# mypy: ignore-errors
"""The same work on SAQ: Worker.start and a queue object of the client's own, in this process."""

from __future__ import annotations

import asyncio

from contract import Finished, given, measure, report
from saq import Queue, Status, Worker


async def noop(_context: dict[str, object]) -> None:
    return None


async def main() -> None:
    wanted, finished = given(), Finished()
    client, queue = Queue.from_url(wanted.url), Queue.from_url(wanted.url)
    await client.connect()
    await queue.connect()

    async def after_process(_context: dict[str, object]) -> None:
        finished.one()

    worker = Worker(queue, [noop], concurrency=wanted.concurrency, after_process=after_process)
    working = asyncio.create_task(worker.start())

    async def submit() -> str:
        return (await client.enqueue("noop")).key

    seconds, keys = await measure(wanted, submit, finished.reach)
    jobs = await client.jobs(keys)
    report(wanted, seconds, sum(job is not None and job.status is Status.COMPLETE for job in jobs), "saq", "redis")
    working.cancel()


asyncio.run(main())
