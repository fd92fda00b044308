"""No-op tasks end to end, submitted in process: XADD, XREADGROUP, the start write and a stored record with TTL each."""

from __future__ import annotations

import asyncio
import time

from bench.queue_alone import submissions, submit_all, working
from bench.report import Options, Table, command, spread
from bench.servers import RedisServer, difference

CONCURRENCY = 10


async def tasks_per_s(url: str, count: int, takes_s: float = 0.0) -> float:
    async with working(url, CONCURRENCY, takes_s) as (room, work):
        wanted = submissions(count)
        began = time.perf_counter()
        await asyncio.gather(submit_all(room, wanted), work.until_finished(count))
        return count / (time.perf_counter() - began)


def main(options: Options) -> None:
    count = options.count(100, 5_000)
    with RedisServer() as server:
        rates, kinds = [], {}
        for _ in range(options.runs):
            server.empty()
            before = server.calls()
            rates.append(asyncio.run(tasks_per_s(server.url, count)))
            kinds = difference(before, server.calls())
    table = Table(f"No-op tasks end to end ({count:,}, 50 submits in flight, concurrency {CONCURRENCY}; {server.name})",
                  "queue", "tasks/s min / median / max", "Redis commands a task")
    per_task = ", ".join(f"{kind} {calls / count:.2f}" for kind, calls in kinds.items())
    table.add("imagegen", spread(rates), f"{sum(kinds.values()) / count:.2f}: {per_task}")
    table.show(command("throughput", options))
