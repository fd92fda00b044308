"""HTTP: submits, cache hits and status reads a second, as a share of bare aiohttp; tasks a second end to end."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from bench.report import Options, Table, command, spread
from bench.servers import (
    ROOT,
    Child,
    RedisServer,
    Service,
    answers,
    calling,
    free_port,
    quick_upstream,
    submit,
    until,
    url_of,
)

CONNECTIONS = 32
GENERATE = "/api/images/generate"
MOST_A_SECOND = 15_000
"""Bodies that are prepared for each second: more than bare aiohttp takes."""


@dataclass(frozen=True, slots=True)
class Requests:
    """Requests of a load; again: whether the bodies are repeated; keys: API keys that are sent in turn."""

    method: str
    path: str
    bodies: Sequence[str] = ()
    again: bool = False
    keys: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Load:
    """Result of a load. Times are those of time.monotonic()."""

    count: int
    per_s: float
    cpu_s: float
    began_at: float
    ended_at: float


def start_load(port: int, seconds: float, wanted: Requests) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.loader", str(port), str(CONNECTIONS), str(seconds)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdin is not None
    process.stdin.write(json.dumps(asdict(wanted)))
    process.stdin.close()
    return process


def end_load(process: subprocess.Popen[str]) -> Load:
    """Return the result of a load. Raises RuntimeError if an answer is no success."""
    with process:
        assert process.stdout is not None
        found = json.loads(process.stdout.read())
    statuses = found.pop("statuses")
    if any(not status.startswith("2") for status in statuses):
        raise RuntimeError(f"not all answers are good: {statuses}")
    return Load(sum(statuses.values()), **found)


def load(port: int, seconds: float, wanted: Requests) -> Load:
    return end_load(start_load(port, seconds, wanted))


def bodies(count: int, mark: str) -> list[str]:
    return [json.dumps({"prompt": f"a lighthouse {mark} {number}"}) for number in range(count)]


@dataclass(frozen=True, slots=True)
class Compared:
    """Row of the table: requests to our service and to the bare handler; `ours` makes those of a run."""

    what: str
    goal: float
    service: Service
    ours: Callable[[str], Requests]
    bare: Requests


def compare(row: Compared, bare_port: int, seconds: float, runs: int) -> tuple[str, ...]:
    """Measure the bare handler and ours in turn; the ratio is the median over the rounds."""
    beside, ours, cpu_ms = [], [], []
    for run in range(runs):
        beside.append(load(bare_port, seconds, row.bare).per_s)
        used_s = row.service.cpu_s
        done = load(row.service.port, seconds, row.ours(f"{row.what} {run}"))
        ours.append(done.per_s)
        cpu_ms.append((row.service.cpu_s - used_s) * 1000 / max(done.count, 1))
    ratio = statistics.median(mine / bare for mine, bare in zip(ours, beside, strict=True))
    return row.what, f"{row.goal:.2f}", f"{ratio:.2f}", spread(ours), spread(beside), spread(cpu_ms, ".3f")


def rows(level: str, queued: Service, finished: Service, seconds: float) -> list[Compared]:
    """Return the rows. queued: a service that finishes no task; finished: a service with the task `seen before`."""
    task_id = submit(finished.port, "seen before", "?wait=30")
    seen = [json.dumps({"prompt": "seen before"})]
    bare_post = Requests("POST", "/", bodies(100, "bare"), again=True)

    def distinct(mark: str) -> Requests:
        return Requests("POST", GENERATE, bodies(int(MOST_A_SECOND * seconds), f"{level} {mark}"))

    def hits(_mark: str) -> Requests:
        return Requests("POST", GENERATE, seen, again=True)

    def reads(_mark: str) -> Requests:
        return Requests("GET", f"/api/images/{task_id}")

    return [
        Compared(f"distinct submits, {level}", 0.45, queued, distinct, bare_post),
        Compared(f"cache-hit submits, {level}", 0.55, finished, hits, bare_post),
        Compared(f"status reads, {level}", 0.6, finished, reads, Requests("GET", "/")),
    ]


def beside_bare(options: Options) -> None:
    seconds = 0.2 if options.tiny else float(options.count(1, 2, 5))
    table = Table(
        f"HTTP, {CONNECTIONS} connections, limits off, {seconds:g} s a run, bare aiohttp + orjson and ours in turn",
        "what, LOG_LEVEL",
        "goal x bare",
        "x bare",
        "a second min / median / max",
        "bare a second",
        "CPU ms a request",
    )
    port = free_port()
    with Child([sys.executable, "-m", "bench.bare", str(port)]):
        until(lambda: answers(port, "/"), 10.0)
        for level in options.some("WARNING", "INFO"):
            one = {"LOG_LEVEL": level, "WORKER_CONCURRENCY": "1"}
            with (
                RedisServer() as server,
                Service(server.url, SANDBOX_DELAY="3600", REDIS_PREFIX="queued", **one) as queued,
                Service(server.url, SANDBOX_DELAY="0", REDIS_PREFIX="finished", **one) as finished,
            ):
                for row in rows(level, queued, finished, seconds):
                    table.add(*compare(row, port, seconds, options.runs))
    table.show(command("http", options), "x bare: the median of the rounds' ratios.")


@dataclass(frozen=True, slots=True)
class End:
    """Result of a run from the first submit to the last task's end.

    cpu_ms: of the service for a task; system_ms: the part of it in system calls. cores: of service, Redis, loader and
    upstream.
    """

    per_s: float
    cpu_ms: float
    system_ms: float
    cores: tuple[float, ...]


def end(server: RedisServer, service: Service, upstream: Child, wanted: Requests) -> End:
    """Measure a run; its end is observed in Redis, which costs the service nothing."""
    parts: tuple[Child | RedisServer, ...] = (service, server, upstream)
    used_s, system_s = [part.cpu_s for part in parts], service.cpu_times_s[1]
    process = start_load(service.port, 600.0, wanted)
    empty_at: float | None = None
    while process.poll() is None or empty_at is None:
        if server.unfinished():
            empty_at = None
        elif empty_at is None:
            empty_at = time.monotonic()
        time.sleep(0.02)
    done = end_load(process)
    took_s = max(empty_at, done.ended_at) - done.began_at
    of_service, of_redis, of_upstream = (part.cpu_s - used for part, used in zip(parts, used_s, strict=True))
    cores = tuple(spent_s / took_s for spent_s in (of_service, of_redis, done.cpu_s, of_upstream))
    of_system = service.cpu_times_s[1] - system_s
    return End(done.count / took_s, of_service * 1000 / done.count, of_system * 1000 / done.count, cores)


def end_to_end(options: Options) -> None:
    count = options.count(100, 6_000, 20_000)
    table = Table(
        f"HTTP end to end, {count:,} tasks, upstream on loopback that answers at once, IMAGE_STORE=upstream",
        "concurrency",
        "goal tasks/s",
        "tasks/s min / median / max",
        "goal CPU ms",
        "CPU ms a task",
        "cores of service / Redis / loader / upstream",
    )
    for concurrency, goal in options.some((5, 1_900), (50, 2_900)):
        with (
            RedisServer() as server,
            quick_upstream() as upstream,
            Service(server.url, WORKER_CONCURRENCY=str(concurrency), **calling(url_of(upstream))) as service,
        ):
            submit(service.port, "warm up", "?wait=30")
            ends = [
                end(server, service, upstream, Requests("POST", GENERATE, bodies(count, str(run))))
                for run in range(options.runs)
            ]
        cores = [statistics.median(shares) for shares in zip(*(one.cores for one in ends), strict=True)]
        per_s, cpu_ms = spread([one.per_s for one in ends]), spread([one.cpu_ms for one in ends], ".2f")
        table.add(concurrency, f"{goal:,}", per_s, "0.40", cpu_ms, " / ".join(f"{share:.2f}" for share in cores))
    table.show(command("http", options))


def main(options: Options) -> None:
    beside_bare(options)
    end_to_end(options)
