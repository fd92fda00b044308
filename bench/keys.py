"""Cost of API keys: HTTP with 1,000 keys, a budget and signed links, as a share of the same service without them."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from bench.http import CONNECTIONS, GENERATE, Load, Requests, bodies, end, load
from bench.report import Options, Table, command, spread
from bench.servers import Child, RedisServer, Service, calling, quick_upstream, submit, url_of

KEYS = 1_000
SEEN = "seen before"


@dataclass(frozen=True, slots=True)
class Row:
    """Requests a second, or tasks a second, of one service; both services make it in turn."""

    what: str
    measure: Callable[[int, Side], float]


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two services with its Redis. keys: those that its clients send, none without keys."""

    server: RedisServer
    service: Service
    upstream: Child
    keys: tuple[str, ...]
    task_id: str

    def load(self, seconds: float, method: str, path: str, sent: list[str], keys: tuple[str, ...]) -> Load:
        return load(self.service.port, seconds, Requests(method, path, sent, again=True, keys=keys))


def rows(count: int, seconds: float) -> list[Row]:
    def tasks(run: int, side: Side) -> float:
        wanted = Requests("POST", GENERATE, bodies(count, f"task {run}"), keys=side.keys)
        return end(side.server, side.service, side.upstream, wanted).per_s

    def hits(_run: int, side: Side) -> float:
        return side.load(seconds, "POST", GENERATE, [f'{{"prompt": "{SEEN}"}}'], side.keys[:1]).per_s

    def reads(_run: int, side: Side) -> float:
        return side.load(seconds, "GET", f"/api/images/{side.task_id}", [], side.keys[:1]).per_s

    return [Row("tasks, end to end", tasks), Row("cache hits", hits), Row("status reads", reads)]


def main(options: Options) -> None:
    count, seconds = options.count(100, 6_000, 20_000), 0.2 if options.tiny else float(options.count(1, 2, 5))
    table = Table(
        f"{KEYS:,} API keys, a budget and signed links, {CONNECTIONS} connections, both services in turn",
        "what",
        "goal x without",
        "x without",
        "a second with keys",
        "a second without",
    )
    keys = tuple(f"a-key-of-the-benchmark-{number:04d}" for number in range(KEYS))
    named = ",".join(f"client{number}:{key}" for number, key in enumerate(keys))
    with RedisServer() as one, RedisServer() as other, quick_upstream() as first, quick_upstream() as second:
        plain = {"WORKER_CONCURRENCY": "50", **calling(url_of(first))}
        keyed = {"WORKER_CONCURRENCY": "50", **calling(url_of(second))}
        keyed |= {"API_KEYS": named, "BUDGET_DAILY_USD": "1000000"}
        with Service(one.url, **plain) as without, Service(other.url, **keyed) as with_keys:
            sides = (
                Side(one, without, first, (), submit(without.port, SEEN, "?wait=30")),
                Side(other, with_keys, second, keys, submit(with_keys.port, SEEN, "?wait=30", X_API_Key=keys[0])),
            )
            for row in rows(count, seconds):
                found = [[row.measure(run, side) for side in sides] for run in range(options.runs)]
                ratio = statistics.median(with_them / alone for alone, with_them in found)
                columns = [spread([pair[side] for pair in found]) for side in (1, 0)]
                table.add(row.what, "0.90", f"{ratio:.2f}", *columns)
    table.show(command("keys", options), "x without: the median of the rounds' ratios.")
