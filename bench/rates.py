"""Rates of the queue without HTTP: no-op tasks a second, tasks of 100 ms, time until an attempt starts."""

from __future__ import annotations

import asyncio
import time

from bench.queue_alone import IN_FLIGHT, WARM_UP, no_images, submissions, submit_all, working
from bench.report import Options, Table, command, percentile, spread
from bench.servers import RedisServer, by_kind, difference

CONCURRENCY = 10


async def tasks_per_s(url: str, count: int, takes_s: float = 0.0) -> float:
    """Measure from the first submit until the last result is stored."""
    async with working(url, CONCURRENCY, takes_s) as (room, work):
        wanted = submissions(count)
        began = time.perf_counter()
        await asyncio.gather(submit_all(room, wanted), work.until_finished(count))
        return count / (time.perf_counter() - began)


def measured(server: RedisServer, count: int, runs: int) -> tuple[list[float], dict[str, int]]:
    """Return the rates of `runs` runs, and the Redis commands of the last."""
    found: list[float] = []
    kinds: dict[str, int] = {}
    for _ in range(runs):
        server.empty()
        before = server.calls()
        found.append(asyncio.run(tasks_per_s(server.url, count)))
        kinds = difference(before, server.calls())
    return found, kinds


def queue(options: Options) -> None:
    """Measure no-op tasks: XADD, XREADGROUP, the start's write and a stored record with TTL."""
    count = options.count(100, 5_000)
    with RedisServer() as server:
        found, kinds = measured(server, count, options.runs)
    table = Table(
        f"No-op tasks submitted in process: {count:,}, {IN_FLIGHT} submits in flight, concurrency {CONCURRENCY}, "
        f"{server.name}",
        "tasks/s min / median / max",
        "Redis commands a task (commandstats)",
    )
    table.add(spread(found), by_kind(kinds, WARM_UP + count))
    table.show(command("queue", options))


def pace(options: Options) -> None:
    """Measure how long free slots wait."""
    count = options.count(20, 500)
    ideal_s = count * 0.1 / CONCURRENCY
    with RedisServer() as server:
        took_s = [count / asyncio.run(tasks_per_s(server.url, count, 0.1)) for _ in range(options.runs)]
    table = Table(f"{count} tasks of 100 ms, concurrency {CONCURRENCY}", "ideal s", "s min / median / max", "% over")
    over = [(taken / ideal_s - 1) * 100 for taken in took_s]
    table.add(f"{ideal_s:g}", spread(took_s, ".3f"), spread(over, ".1f"))
    table.show(command("pace", options))


async def _waits_ms(url: str, count: int, every_s: float) -> list[float]:
    submitted: dict[str, float] = {}
    async with working(url, CONCURRENCY) as (room, work):
        for submission in submissions(count):
            submitted[submission.task_id] = time.perf_counter()
            await room.client_queue.submit(submission, no_images)
            await asyncio.sleep(every_s)
        await work.until_finished(count)
        return [(work.started_at[name] - at) * 1000 for name, at in submitted.items()]


def latency(options: Options) -> None:
    """Measure from before the submit until the start is written, when the attempt may call its provider."""
    count, every_s = options.count(20, 300, 1_000), 0.02
    with RedisServer() as server:
        waits = [asyncio.run(_waits_ms(server.url, count, every_s)) for _ in range(1 if options.tiny else options.runs)]
    table = Table(
        f"Submit to start of the attempt: {count} tasks, one each {every_s * 1000:g} ms, queue idle between",
        "p50 ms min / median / max",
        "p99 ms min / median / max",
    )
    table.add(*(spread([percentile(run, share) for run in waits], ".2f") for share in (0.5, 0.99)))
    table.show(command("latency", options))
