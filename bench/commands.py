"""Redis commands: a task in a trickle and under load, what comes on top, a status read, an idle minute."""

from __future__ import annotations

import asyncio
import http.client
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from bench.queue_alone import Work, no_images, submissions, submit_all, working
from bench.report import Options, Table, command
from bench.servers import (
    ADMIN,
    RedisServer,
    Service,
    asked,
    calling,
    difference,
    emulator,
    job_emulator,
    quick_upstream,
    submit,
    until,
    url_of,
)
from imagegen.queue.instance import QueueInstance

CONCURRENCY = 10
MONTH_MIN = 30 * 24 * 60
TASKS_A_MONTH = 10_000
FREE_A_MONTH = 500_000
EVERY_S = 0.1
"""Between the submits over HTTP."""

SETTLE_S = 0.5
"""After the last submit: all tasks are finished by then, and no query of Redis is needed to see it."""

JOB_SETTLE_S = 2.5
"""The same for jobs, which are polled after a second."""

WATCHED_S = 2.0
"""The upstream's time for a task that is watched, so that all are watched before the first is finished."""

WHAT_FOR = (
    "submit: evalsha + xadd (the entry with the request) + set nx get (the record, unless there is one)",
    "claim: xreadgroup; start: one conditional set, or a script for several at once",
    "finish: evalsha + xdel (the fence) + set (the result) + xack, one for all of a batch",
)

Doing = Callable[[QueueInstance, Work], Awaitable[None]]
Kinds = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Row:
    """Commands by kind for each unit; goal: the most that each may cost."""

    what: str
    kinds: Kinds
    goal: float | None = None

    @property
    def total(self) -> float:
        return sum(self.kinds.values())

    @property
    def cells(self) -> tuple[str, ...]:
        return self.what, "" if self.goal is None else f"<= {self.goal:g}", f"{self.total:.2f}", shown(self.kinds)


async def counted(server: RedisServer, doing: Doing) -> dict[str, int]:
    async with working(server.url, CONCURRENCY) as (room, work):
        before = server.calls()
        await doing(room, work)
        return difference(before, server.calls())


def trickle(count: int, every_s: float) -> Doing:
    async def doing(room: QueueInstance, work: Work) -> None:
        for submission in submissions(count):
            await room.client_queue.submit(submission, no_images)
            await asyncio.sleep(every_s)
        await work.until_finished(count)

    return doing


def nothing(for_s: float) -> Doing:
    async def doing(_room: QueueInstance, _work: Work) -> None:
        await asyncio.sleep(for_s)

    return doing


def burst(count: int) -> Doing:
    async def doing(room: QueueInstance, work: Work) -> None:
        await asyncio.gather(submit_all(room, submissions(count)), work.until_finished(count))

    return doing


def under_budgets(doing: Doing) -> Doing:
    """Return the work with a budget of all clients and one of their key, which never end."""

    async def limited(room: QueueInstance, work: Work) -> None:
        room.client_queue.limits.of_others = ((0, 10**12), (1, 10**12))
        await doing(room, work)

    return limited


def reads(count: int) -> Doing:
    async def doing(room: QueueInstance, work: Work) -> None:
        submission = submissions(1)[0]
        await room.client_queue.submit(submission)
        await work.until_finished(1)
        for _ in range(count):
            await room.client_queue.get(submission.task_id)

    return doing


def less(kinds: Kinds, other: Kinds, each: float = 1.0) -> dict[str, float]:
    """Return the difference to `other` by kind, divided by `each`; the largest first."""
    found = {kind: (kinds.get(kind, 0) - other.get(kind, 0)) / each for kind in {**kinds, **other}}
    return dict(sorted(found.items(), key=lambda pair: -pair[1]))


def shown(kinds: Kinds) -> str:
    return ", ".join(f"{kind} {count:.2f}" for kind, count in kinds.items() if abs(count) >= 0.005)


async def trickled(count: int, every_s: float) -> tuple[dict[str, int], dict[str, int]]:
    """Count the commands of a trickle, and at the same time those of an idle queue."""
    with RedisServer() as server, RedisServer() as beside:
        return await asyncio.gather(counted(server, trickle(count, every_s)), counted(beside, nothing(count * every_s)))


def in_process(options: Options) -> list[Row]:
    """Measure the queue alone; the first row is a task in a trickle."""
    count, every_s = options.count(5, 60), 0.02 if options.tiny else 1.0
    many, many_reads = options.count(50, 500), options.count(10, 1_000)
    one = less(*asyncio.run(trickled(count, every_s)), count)
    with RedisServer() as server:
        load = less(asyncio.run(counted(server, burst(many))), {}, many)
        budgeted = less(asyncio.run(counted(server, under_budgets(burst(many)))), {}, many)
        own = asyncio.run(counted(server, reads(0)))
        read = less(asyncio.run(counted(server, reads(many_reads))), own, many_reads)
    return [
        Row(f"task, trickle ({count}, one every {every_s:g} s; idling taken off)", one),
        Row(f"task, load ({many} at once)", load),
        Row(f"on top: two budgets, load ({many})", less(budgeted, load), 1.1),
        Row(f"status read of a finished task ({many_reads}; its own task taken off)", read),
    ]


@contextmanager
def instances(count: int, settings: Mapping[str, str]) -> Iterator[tuple[RedisServer, list[Service]]]:
    """Run `count` services on one Redis; they have found each other."""
    with RedisServer() as server, ExitStack() as ends:
        services = [ends.enter_context(Service(server.url, **settings)) for _ in range(count)]
        until(lambda: all(known(service.port) == count for service in services), 10.0)
        submit(services[0].port, "warm up", "?wait=30")
        time.sleep(SETTLE_S)
        yield server, services


def known(port: int) -> int:
    return int(asked(port, "GET", "/api/stats", **ADMIN)["instance"]["instances"])


def over_http(
    server: RedisServer, port: int, count: int, what: str, *, settle_s: float = SETTLE_S, **more: str
) -> Kinds:
    """Return the commands of each task. more: headers or `webhook`; `{}` in a value becomes the task's number."""
    before = server.calls()
    for number in range(count):
        filled = {name: value.replace("{}", str(number)) for name, value in more.items()}
        submit(port, f"{what} {number}", **filled)
        time.sleep(EVERY_S)
    time.sleep(settle_s)
    after = server.calls()
    if server.unfinished():
        raise RuntimeError("not all tasks were finished in time")
    return less(after, before, count)


def on_top(options: Options) -> list[Row]:
    """Measure the commands beyond those of a plain task; all submits go to the first instance."""
    count = options.count(5, 100)
    with quick_upstream() as upstream:
        url = url_of(upstream)
        settings = calling(url) | {"WEBHOOK_ALLOW_PRIVATE": "true", "WORKER_CONCURRENCY": str(CONCURRENCY)}
        with instances(1, settings) as (server, (one,)):
            plain = over_http(server, one.port, count, "plain")
            hooked = over_http(server, one.port, count, "hooked", webhook=f"{url}/hook")
            keyed = over_http(server, one.port, count, "keyed", Idempotency_Key="key-{}")
        with instances(1, settings | {"BUDGET_DAILY_USD": "1000"}) as (server, (one,)):
            budgeted = over_http(server, one.port, count, "budgeted")
        with instances(2, settings) as (server, (first, _)):
            shared = over_http(server, first.port, count, "shared")
    return [
        Row(f"on top: webhook ({count})", less(hooked, plain), 3),
        Row(f"on top: Idempotency-Key ({count})", less(keyed, plain), 1),
        Row(f"on top: a budget, trickle ({count})", less(budgeted, plain), 1.5),
        Row(f"on top: a second instance, each task ({count})", less(shared, plain), 2),
    ]


def jobs(options: Options) -> list[Row]:
    """Compare tasks with a provider job with those of a provider that answers at once."""
    count = options.count(5, 100)
    with quick_upstream() as upstream, instances(1, calling(url_of(upstream))) as (server, (one,)):
        plain = over_http(server, one.port, count, "plain")
    with job_emulator("fal", "--job", "0.2") as upstream:
        settings = {"PROVIDER": "fal", "FAL_KEY": "k", "FAL_API_URL": url_of(upstream), "IMAGE_STORE": "upstream"}
        settings |= {"WORKER_CONCURRENCY": str(count)}
        with instances(1, settings) as (server, (one,)):
            job = over_http(server, one.port, count, "job", settle_s=JOB_SETTLE_S)
    return [
        Row(f"on top: a provider job of a second: its handle, and renewals meanwhile ({count})", less(job, plain), 1.25)
    ]


def open_events(port: int, task_id: str) -> http.client.HTTPResponse:
    """Open an event stream and read its first event."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60.0)
    connection.request("GET", f"/api/images/{task_id}/events")
    stream = connection.getresponse()
    while stream.readline().strip():
        pass
    return stream


def finishing(server: RedisServer, owner: int, watcher: int | None, count: int) -> tuple[dict[str, int], int]:
    """Return the commands while tasks of `owner` run to their end, and the number of changes that `watcher` sent.

    An image's event belongs to the same change as the event after it.
    """
    task_ids = []
    for number in range(count):
        task_ids.append(submit(owner, f"{watcher} {number} {{{{fault:ok delay_s={WATCHED_S:g}}}}}"))
        time.sleep(WATCHED_S / 4 / count)
    time.sleep(WATCHED_S / 4)
    streams = [open_events(watcher, task_id) for task_id in task_ids] if watcher else []
    before = server.calls()
    time.sleep(WATCHED_S)
    kinds = difference(before, server.calls())
    events = [stream.read() for stream in streams]
    if not all(b"event: completed" in text for text in events):
        raise RuntimeError("an event stream lacks its last event")
    return kinds, sum(text.count(b"event: ") - text.count(b"event: image") for text in events)


def watched_change(options: Options) -> list[Row]:
    """Compare with tasks that no client watches. A hanging call occupies the watching instance's only slot."""
    count = options.count(3, 20)
    with emulator() as upstream, RedisServer() as server, ExitStack() as ends:
        settings = calling(url_of(upstream)) | {"LEASE_SECONDS": "300"}
        watcher = ends.enter_context(Service(server.url, WORKER_CONCURRENCY="1", **settings))
        submit(watcher.port, "{{fault:hang}}")
        until(lambda: asked(watcher.port, "GET", "/api/stats", **ADMIN)["queue"]["inFlight"] == 1, 10.0)
        owner = ends.enter_context(Service(server.url, WORKER_CONCURRENCY=str(count), **settings))
        until(lambda: known(owner.port) == known(watcher.port) == 2, 10.0)
        unwatched, _ = finishing(server, owner.port, None, count)
        watched, changes = finishing(server, owner.port, watcher.port, count)
    what = f"on top: a change that is watched on another instance ({changes} changes of {count} tasks)"
    return [Row(what, less(watched, unwatched, changes), 1)]


def idle(options: Options) -> list[Row]:
    """Measure an idle minute of a whole service."""
    warm_up_s, window_s = options.count(1, 5, 130), options.count(2, 60, 360)
    with RedisServer() as server, Service(server.url):
        time.sleep(warm_up_s)
        before = server.calls()
        time.sleep(window_s)
        kinds = less(server.calls(), before, window_s / 60)
    return [Row(f"idle minute (window {window_s} s after {warm_up_s} s)", kinds)]


def main(options: Options) -> None:
    """Measure the parts in parallel; each has its own Redis server."""
    table = Table("Redis commands, inner ones too", "what", "goal", "each", "by kind")
    parts = (in_process, on_top, jobs, watched_change, idle)
    with ThreadPoolExecutor(len(parts)) as pool:
        rows = [row for found in pool.map(lambda part: part(options), parts) for row in found]
    for row in rows:
        table.add(*row.cells)
    task, minute = rows[0].total, rows[-1].total
    month = minute * MONTH_MIN + task * TASKS_A_MONTH
    what = f"month always on with {TASKS_A_MONTH:,} tasks of {task:.2f} commands (trickle)"
    table.add(what, "", f"{month:,.0f}", f"{month / FREE_A_MONTH:.0%} of Upstash's free {FREE_A_MONTH:,}")
    table.show(command("commands", options), *WHAT_FOR, "AUTH, HELLO, CLIENT, INFO and PING are not counted.")
