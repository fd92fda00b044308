"""Redis commands: a task in a trickle and under load, a status read, and an idle minute; inner calls of scripts too."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping

from bench.queue_alone import Work, submissions, submit_all, working
from bench.report import Options, Table, command
from bench.servers import RedisServer, Service, difference
from imagegen.queue.room import QueueRoom

CONCURRENCY = 10
MONTH_MIN = 30 * 24 * 60
TASKS_A_MONTH = 10_000
FREE_A_MONTH = 500_000
WHAT_FOR = (
    "submit: evalsha + xadd (the entry with the request) + set nx get (is it known? the record)",
    "claim: xreadgroup; start: one conditional set, or a script for several at once",
    "finish: evalsha + xdel (the fence) + set (the result) + xack, one for all of a batch",
)

Doing = Callable[[QueueRoom, Work], Awaitable[None]]


async def counted(server: RedisServer, doing: Doing) -> dict[str, int]:
    async with working(server.url, CONCURRENCY) as (room, work):
        before = server.calls()
        await doing(room, work)
        return difference(before, server.calls())


def trickle(count: int, every_s: float) -> Doing:
    async def doing(room: QueueRoom, work: Work) -> None:
        for submission in submissions(count):
            await room.queue.submit(submission)
            await asyncio.sleep(every_s)
        await work.until_finished(count)

    return doing


def burst(count: int) -> Doing:
    async def doing(room: QueueRoom, work: Work) -> None:
        await asyncio.gather(submit_all(room, submissions(count)), work.until_finished(count))

    return doing


def reads(count: int) -> Doing:
    async def doing(room: QueueRoom, work: Work) -> None:
        submission = submissions(1)[0]
        await room.queue.submit(submission)
        await work.until_finished(1)
        for _ in range(count):
            await room.queue.get(submission.task_id)

    return doing


def idle(server: RedisServer, warm_up_s: float, window_s: float) -> Mapping[str, float]:
    """By kind and minute, of a whole service that does nothing."""
    with Service(server.url):
        time.sleep(warm_up_s)
        before = server.calls()
        time.sleep(window_s)
        return {kind: count * 60 / window_s for kind, count in difference(before, server.calls()).items()}


def main(options: Options) -> None:
    count, every_s = options.count(5, 60), 0.02 if options.tiny else 1.0
    many, asked = options.count(50, 500), options.count(10, 1_000)
    warm_up_s, window_s = (options.count(1, 5, 130), options.count(2, 60, 360))
    table = Table("Redis commands, inner ones too", "what", "each", "by kind")
    with RedisServer() as server:
        unread = sum(asyncio.run(counted(server, reads(0))).values())
        per_task = []
        for what, divisor, doing in (
            (f"task, trickle ({count}, one every {every_s:g} s)", count, trickle(count, every_s)),
            (f"task, load ({many} at once)", many, burst(many)),
            (f"status read of a finished task ({asked}; its own task taken off)", asked, reads(asked)),
        ):
            kinds = asyncio.run(counted(server, doing))
            total = sum(kinds.values()) - (unread if "read" in what else 0)
            per_task.append(total / divisor)
            table.add(what, f"{total / divisor:.2f}", ", ".join(f"{k} {n / divisor:.2f}" for k, n in kinds.items()))
        server.empty()
        per_minute = idle(server, warm_up_s, window_s)
    minute = sum(per_minute.values())
    task = per_task[0]
    month = minute * MONTH_MIN + task * TASKS_A_MONTH
    table.add(
        f"idle minute (window {window_s} s after {warm_up_s} s)",
        f"{minute:.2f}",
        ", ".join(f"{k} {n:.2f}" for k, n in per_minute.items()),
    )
    table.add(
        f"month always on with {TASKS_A_MONTH:,} tasks of {task:.2f} commands (trickle)",
        f"{month:,.0f}",
        f"{month / FREE_A_MONTH:.0%} of Upstash's free {FREE_A_MONTH:,}",
    )
    table.show(command("commands", options), *WHAT_FOR, "AUTH, HELLO, CLIENT, INFO and PING are not counted.")
