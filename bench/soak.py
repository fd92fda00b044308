"""Steady load for a long time: memory, open files, keys and consumers must return to their start values at the end."""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections import Counter
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path

from bench.http import GENERATE
from bench.report import Options, Table, command, spread
from bench.servers import ADMIN, RedisServer, Service, ask
from imagegen.images.disk import SWEEP_INTERVAL_S
from imagegen.queue.claim import checkpoint_ttl_s
from imagegen.redis_client.keys import GROUP, Keys

TASKS_A_SECOND = 50
TTL_S = 10
LEASE_S = 5
"""Short, since the key of a run outlives its task by more than two leases."""

EVERY_S = 10.0
MIB = 2**20
KEYS = Keys("imagegen")
COLUMNS = (
    *("at s", "RSS MiB", "files open", "threads", "asyncio tasks"),
    *("images", "Redis keys", "Redis MiB", "consumers", "unfinished"),
)


@dataclass(frozen=True, slots=True)
class Sample:
    """Sample of the service. files: open ones, 0 if the system has no /proc, as threads; tasks: of the event loop, from
    the service's metrics; images: files on disk."""

    at_s: float
    rss_mib: float
    files: int
    threads: int
    tasks: int
    images: int
    keys: int
    redis_mib: float
    consumers: int
    unfinished: int

    @property
    def cells(self) -> tuple[str, ...]:
        counts = (self.files, self.threads, self.tasks, self.images, self.keys)
        there = (self.consumers, self.unfinished)
        return (
            f"{self.at_s:.0f}",
            f"{self.rss_mib:.1f}",
            *map(str, counts),
            f"{self.redis_mib:.2f}",
            *map(str, there),
        )


class Client(threading.Thread):
    """Submits at an even pace over one connection until `stop` is set; counts answers by status."""

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self._port = port
        self.stop = threading.Event()
        self.statuses: Counter[int] = Counter()

    def run(self) -> None:
        connection, began = HTTPConnection("127.0.0.1", self._port, timeout=30.0), time.monotonic()
        while not self.stop.wait(max(began + self.sent / TASKS_A_SECOND - time.monotonic(), 0.0)):
            body = json.dumps({"prompt": f"soak {self.sent}", "width": 64, "height": 64})
            connection.request("POST", GENERATE, body, {"Content-Type": "application/json"})
            with connection.getresponse() as answer:
                answer.read()
            self.statuses[answer.status] += 1
        connection.close()

    @property
    def sent(self) -> int:
        return self.statuses.total()


def sample(server: RedisServer, service: Service, began: float) -> Sample:
    proc = Path(f"/proc/{service.process.pid}")
    return Sample(
        time.monotonic() - began,
        service.rss_bytes / MIB,
        len(list(proc.glob("fd/*"))),
        len(list(proc.glob("task/*"))),
        asyncio_tasks(service.port),
        sum(len(names) for _, _, names in os.walk(service.data / "images")),  # folders may go while it looks
        int(server.client.dbsize()),
        server.used_bytes() / MIB,
        len(server.client.xinfo_consumers(KEYS.stream, GROUP)),
        server.unfinished(),
    )


def asyncio_tasks(port: int) -> int:
    """Return the number of tasks of the service's event loop. Raises RuntimeError if the metrics lack it."""
    _, metrics = ask(port, "GET", "/metrics", headers=ADMIN)
    found = re.search(rb"^imagegen_asyncio_tasks (\d+)", metrics, re.MULTILINE)
    if found is None:
        raise RuntimeError("the metrics lack the service's asyncio tasks")
    return int(found[1])


def sampled(server: RedisServer, service: Service, began: float, for_s: float) -> list[Sample]:
    """One at once, and one each ten seconds, the last at the end."""
    samples, ends_at = [sample(server, service, began)], time.monotonic() + for_s
    while (left_s := ends_at - time.monotonic()) > 0:
        time.sleep(min(left_s, EVERY_S))
        samples.append(sample(server, service, began))
    return samples


def main(options: Options) -> None:
    ttl_s, lease_s = (1, 1) if options.tiny else (TTL_S, LEASE_S)
    load_s, warm_s = options.count(2, 30, 900), options.count(1, 15, 60)
    settings = {"SANDBOX_DELAY": "0", "RESULT_TTL": str(ttl_s), "LEASE_SECONDS": str(lease_s)}
    with RedisServer() as server, Service(server.url, **settings) as service:
        began = time.monotonic()
        before, client = sample(server, service, began), Client(service.port)
        client.start()
        time.sleep(warm_s)
        loaded = sampled(server, service, began, load_s)
        client.stop.set()
        client.join()
        time.sleep(max(ttl_s, 0.0 if options.tiny else checkpoint_ttl_s(lease_s)) + 1)
        later = {"after the TTL": sample(server, service, began)}
        if options.full:
            time.sleep(SWEEP_INTERVAL_S)
            later["after the sweep"] = sample(server, service, began)
    table = Table(
        f"Soak: {TASKS_A_SECOND} tasks/s, {load_s} s after {warm_s} s, RESULT_TTL={ttl_s}, LEASE_SECONDS={lease_s}",
        "when",
        *COLUMNS,
    )
    moments = {"idle": before, "warm": loaded[0], "middle": loaded[len(loaded) // 2], "end": loaded[-1]}
    for when, seen in (moments | later).items():
        table.add(when, *seen.cells)
    table.show(
        command("soak", options),
        f"{client.sent:,} submits: {', '.join(f'{status} x{count:,}' for status, count in client.statuses.items())}",
        f"RSS MiB under load, {len(loaded)} samples, min / median / max: {spread([s.rss_mib for s in loaded], '.1f')}",
    )
