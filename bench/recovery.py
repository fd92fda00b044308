"""Time until the service continues after a kill, a SIGTERM and an outage of Redis; and time until it ends."""

from __future__ import annotations

import itertools
import json
import random
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from bench.report import Options, Table, command, spread
from bench.servers import ADMIN, RedisServer, Service, answers, ask, asked, calling, emulator, submit, until, url_of

AT_ONCE = 4
"""Pairs of instances that are killed in parallel; each has its own REDIS_PREFIX."""

STREAMS = 200
CALL_S = 2.0
UNKNOWN = "0" * 32
HANGS = "{{fault:hang times=1}}"
ASKED = (
    ("GET", f"/api/images/{UNKNOWN}", None),
    ("GET", f"/api/images/{UNKNOWN}/events", None),
    ("GET", f"/api/images/{UNKNOWN}/0", None),
    ("GET", "/api/images", None),
    ("GET", "/api/stats", None),
    ("GET", "/metrics", None),
    ("GET", "/readyz", None),
    ("POST", "/api/images/generate", {"prompt": "while Redis is away"}),
    ("POST", "/api/images/generate?wait=30", {"prompt": "while Redis is away, waited for"}),
    ("POST", "/api/images/batch", {"requests": [{"prompt": "while Redis is away, in a batch"}]}),
    ("POST", "/v1/images/generations", {"prompt": "while Redis is away, for an SDK", "model": "m"}),
)


@dataclass(frozen=True)
class Stage:
    """A Redis and an emulated upstream, and services on them that don't see each other's tasks."""

    server: RedisServer
    upstream: str
    numbers: Iterator[int] = field(default_factory=itertools.count)

    def service(self, prefix: str, **settings: str) -> Service:
        return Service(self.server.url, REDIS_PREFIX=prefix, **calling(self.upstream) | settings)

    @contextmanager
    def services(self, count: int, **settings: str) -> Iterator[list[Service]]:
        """Run `count` instances of one service; they start in parallel."""
        prefix = f"stage{next(self.numbers)}"
        with ExitStack() as ends:
            started = [self.service(prefix, **settings) for _ in range(count)]
            for service in started:
                ends.push(service)
            for service in started:
                service.__enter__()
                until(lambda port=service.port: answers(port, "/readyz"), 10.0)  # type: ignore[misc]
            yield started

    def prompt(self, fault: str = "") -> str:
        """Return a prompt that no other task has."""
        return f"recovery {next(self.numbers)} {fault}".rstrip()

    def calls(self, prompt: str) -> list[dict[str, Any]]:
        """Return the upstream's calls for a prompt."""
        ledger = asked(int(self.upstream.rpartition(":")[2]), "GET", "/_emulator/ledger")
        return [call for call in ledger["calls"] if call["prompt"] == prompt]

    def called_at(self, prompt: str, nth: int, within_s: float = 120.0) -> float:
        """Wait for the nth call for a prompt; return its Unix time."""
        until(lambda: len(self.calls(prompt)) > nth, within_s, every_s=0.02)
        return float(self.calls(prompt)[nth]["received_at"])


def holder(services: list[Service]) -> Service:
    """Return the instance with a call in flight."""
    return next(one for one in services if asked(one.port, "GET", "/api/stats", **ADMIN)["queue"]["inFlight"])


def taken_over_s(stage: Stage, lease_s: float) -> float:
    """Measure from the kill -9 of one instance, at any moment of its lease, to the next call by the other."""
    prompt = stage.prompt(HANGS)
    with stage.services(2, LEASE_SECONDS=str(lease_s)) as services:
        submit(services[0].port, prompt)
        stage.called_at(prompt, 0)
        time.sleep(random.uniform(0.0, lease_s))
        victim, killed_at = holder(services), time.time()
        victim.process.kill()
        return stage.called_at(prompt, 1) - killed_at


def takeovers(stage: Stage, lease_s: float, count: int) -> list[float]:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(lambda _: taken_over_s(stage, lease_s), range(count)))


def released_s(stage: Stage) -> float:
    """Measure from the SIGTERM of one instance, which has no time to drain, to the next call by the other."""
    prompt = stage.prompt(HANGS)
    with stage.services(2, DRAIN_SECONDS="0") as services:
        submit(services[0].port, prompt)
        stage.called_at(prompt, 0)
        leaver, stopped_at = holder(services), time.time()
        leaver.process.terminate()
        return stage.called_at(prompt, 1) - stopped_at


@dataclass
class Outages:
    """Of each answer while Redis was away: how late, and which status; and when the first task after it was taken."""

    answers_s: list[float] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)
    taken_s: list[float] = field(default_factory=list)


def ask_all(service: Service, found: Outages) -> None:
    """Send every kind of request at the same moment."""

    def one(wanted: tuple[str, str, object]) -> tuple[float, str]:
        began = time.monotonic()
        try:
            status = str(ask(service.port, *wanted, headers=ADMIN, timeout_s=15.0)[0])
        except OSError:
            status = "none"
        return time.monotonic() - began, status

    with ThreadPoolExecutor(len(ASKED)) as pool:
        for took_s, status in pool.map(one, ASKED):
            found.answers_s.append(took_s)
            found.statuses[status] += 1


def submit_insistently(service: Service, prompt: str) -> None:
    deadline = time.monotonic() + 60.0
    while ask(service.port, "POST", "/api/images/generate", {"prompt": prompt})[0] not in (200, 202):
        if time.monotonic() > deadline:
            raise TimeoutError("no submit was taken after Redis returned")
        time.sleep(0.02)


def outages(stage: Stage, rounds: int, go: Callable[[], None], come_back: Callable[[], None]) -> Outages:
    """Run rounds: an outage, requests during it, its end, and a client that submits until it succeeds."""
    found = Outages()
    with stage.services(1) as (service,):
        asked(service.port, "POST", "/api/images/generate?wait=30", {"prompt": stage.prompt()})
        for _ in range(rounds):
            go()
            ask_all(service, found)
            come_back()
            back_at, prompt = time.time(), stage.prompt()
            submit_insistently(service, prompt)
            found.taken_s.append(stage.called_at(prompt, 0) - back_at)
    return found


def exit_s(service: Service) -> float:
    """Measure from SIGTERM to the process's end. Raises RuntimeError if the exit code is not 0."""
    began = time.monotonic()
    service.process.terminate()
    code = service.process.wait(60.0)
    if code:
        raise RuntimeError(f"the service ended with code {code}")
    return time.monotonic() - began


def idle_exit_s(stage: Stage) -> float:
    with stage.services(1, DRAIN_SECONDS="25") as (service,):
        return exit_s(service)


def streaming_exit_s(stage: Stage) -> float:
    """Measure with streams that wait for a task with a Retry-After of ten minutes."""
    prompt = stage.prompt("{{fault:429 retry_after=600}}")
    with stage.services(1, DRAIN_SECONDS="25") as (service,), ExitStack() as ends:
        task_id = submit(service.port, prompt)
        stage.called_at(prompt, 0)
        streams = [ends.enter_context(open_stream(service.port, task_id)) for _ in range(STREAMS)]
        for stream in streams:
            while b"snapshot" not in stream.recv(65_536):
                pass
        return exit_s(service)


def open_stream(port: int, task_id: str) -> socket.socket:
    stream = socket.create_connection(("127.0.0.1", port), timeout=30.0)
    stream.sendall(f"GET /api/images/{task_id}/events HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    return stream


@dataclass(frozen=True, slots=True)
class Busy:
    """End of an instance with a call in flight, and the task's state as a later instance reads it."""

    exit_s: float
    finished: bool
    excess: int


def busy_exit(stage: Stage) -> Busy:
    prompt = stage.prompt(f"{{{{fault:ok delay_s={CALL_S:g}}}}}")
    prefix = f"stage{next(stage.numbers)}"
    with stage.service(prefix, DRAIN_SECONDS="25") as service:
        task_id = submit(service.port, prompt)
        stage.called_at(prompt, 0)
        took_s = exit_s(service)
    with stage.service(prefix) as later:
        state = json.loads(ask(later.port, "GET", f"/api/images/{task_id}?wait=10")[1])["status"]
    return Busy(took_s, state == "completed", len(stage.calls(prompt)) - 1)


def lives(stage: Stage, table: Table, options: Options) -> None:
    """Measure takeover and release after the end of an instance."""
    for lease_s, count in ((30.0, options.count(0, 1, 5)), (1.0 if options.tiny else 2.0, options.count(1, 10, 100))):
        if count:
            what = f"kill -9 to the other instance's call, LEASE_SECONDS={lease_s:g}"
            table.add(what, f"<= {lease_s + 5:g} s", count, spread(takeovers(stage, lease_s, count), ".2f"), "")
    released = [released_s(stage) for _ in range(options.count(1, 10))]
    what = "SIGTERM to the other instance's call, DRAIN_SECONDS=0"
    table.add(what, "<= 1 s", len(released), spread(released, ".3f"), "")


def redis_away(stage: Stage, table: Table, options: Options) -> None:
    rounds, server = options.count(1, 5, 10), stage.server
    for how, go, come_back in (("hangs", server.hang, server.go_on), ("is gone", server.kill, server.start)):
        found = outages(stage, rounds, go, come_back)
        seen = ", ".join(f"{status} x{count}" for status, count in found.statuses.most_common())
        table.add(
            f"an answer while Redis {how}", "<= 2.5 s", len(found.answers_s), spread(found.answers_s, ".2f"), seen
        )
        table.add(f"Redis {how}: from its return to the call", "<= 2 s", rounds, spread(found.taken_s, ".2f"), "")


def exits(stage: Stage, table: Table, options: Options) -> None:
    count = options.count(1, 5, 10)
    idle = [idle_exit_s(stage) for _ in range(count)]
    table.add("exit after SIGTERM, idle", "<= 1 s", count, spread(idle, ".2f"), "")
    streaming = [streaming_exit_s(stage) for _ in range(count)]
    table.add(f"exit with {STREAMS} event streams open", "<= 2 s", count, spread(streaming, ".2f"), "")
    busy = [busy_exit(stage) for _ in range(count)]
    finished, excess = sum(one.finished for one in busy), sum(one.excess for one in busy)
    seen = f"{finished} finished, {excess} excess calls"
    what = f"exit with a call of {CALL_S:g} s in flight"
    table.add(what, "finished, 0 excess", count, spread([one.exit_s for one in busy], ".2f"), seen)


def main(options: Options) -> None:
    table = Table("Recovery", "what", "goal", "times", "s min / median / max", "seen")
    with RedisServer() as server, emulator() as upstream:
        stage = Stage(server, url_of(upstream))
        for part in (lives, redis_away, exits):
            part(stage, table, options)
    table.show(command("recovery", options), "An instance is killed at a random moment of its lease.")
