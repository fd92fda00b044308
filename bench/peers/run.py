"""The queue bench with peers: the same no-op work on each queue in turn, round by round, and its table."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import cast

from bench.peers import installed
from bench.peers.installed import NotMeasured
from bench.queue_alone import IN_FLIGHT, WARM_UP
from bench.rates import CONCURRENCY, measured
from bench.report import Options, Table, command, spread
from bench.servers import RedisServer, difference

OURS = "imagegen"
LIMIT_S = 60.0
TINY_SHARE = 50

COUNTS = {"bullmq": 5_000, "arq": 1_000, "saq": 5_000, "taskiq": 5_000, "streaq": 5_000}
"""Tasks of each peer: what takes it some 5 s at most. arq works 200 a second."""

NOTES = (
    "tasks/s, ours/its: min / median / max of the rounds; in a round each queue runs once, in this order.",
    "Timed from the first submit until the last result is stored; each queue is warmed up by 200 tasks before.",
    "Client and worker of each queue are in one process; versions in brackets are its client library's.",
    "Defaults but for the concurrency; logs at WARNING. arq has fewer tasks, as it starts about 200 a second.",
    "Commands: INFO commandstats, those inside scripts and functions too, the warm-up and the idle loops included.",
)


@dataclass(frozen=True, slots=True)
class Run:
    """Result of one queue in one round."""

    count: int
    tasks_per_s: float
    commands: float
    version: str


def queue(options: Options) -> None:
    """Measure ours and the peers in the same rounds."""
    with RedisServer() as server:
        results = rounds(_contestants(server, options), options.runs)
    title = f"No-op tasks, {IN_FLIGHT} submits in flight, concurrency {CONCURRENCY}, {server.name}"
    table(title, results).show(command("queue", options), *NOTES)


def rounds(contestants: Mapping[str, Callable[[], Run]], runs: int) -> dict[str, list[Run] | str]:
    """Return the runs of each peer, or why it was not measured: a peer that fails is left out of further rounds."""
    results: dict[str, list[Run]] = {name: [] for name in contestants}
    failed: dict[str, str] = {}
    for _ in range(runs):
        for name, run in contestants.items():
            if name in failed:
                continue
            try:
                results[name].append(run())
            except NotMeasured as error:
                failed[name] = str(error)
    return results | failed


def table(title: str, results: Mapping[str, list[Run] | str]) -> Table:
    """Return the table. Our own queue must have been measured."""
    made = Table(title, "queue", "version", "tasks", "tasks/s", "ours/its", "Redis commands a task")
    ours = results[OURS]
    for name, runs in results.items():
        if isinstance(runs, str):
            made.add(name, "-", "-", "-", "-", f"not measured: {runs}")
            continue
        ratios = [own.tasks_per_s / its.tasks_per_s for own, its in zip(cast(list[Run], ours), runs, strict=True)]
        made.add(
            name,
            runs[0].version,
            f"{runs[0].count:,}",
            spread([run.tasks_per_s for run in runs]),
            "1" if name == OURS else spread(ratios, ".2f"),
            f"{statistics.median(run.commands for run in runs):.2f}",
        )
    return made


def _contestants(server: RedisServer, options: Options) -> dict[str, Callable[[], Run]]:
    """Ours first."""
    found: dict[str, Callable[[], Run]] = {OURS: partial(_run_ours, server, options.count(100, 5_000))}
    for name, count in COUNTS.items():
        found[name] = partial(_run_peer, server, name, options.count(count // TINY_SHARE, count))
    return found


def _run_ours(server: RedisServer, count: int) -> Run:
    found, kinds = measured(server, count, 1)
    return Run(count, found[0], sum(kinds.values()) / (WARM_UP + count), "this tree")


def _run_peer(server: RedisServer, name: str, count: int) -> Run:
    """Raises NotMeasured."""
    arguments = [*installed.command(name), server.url, str(count), str(CONCURRENCY), str(IN_FLIGHT)]
    server.empty()
    before = server.calls()
    printed = json.loads(installed.output(arguments, installed.FOLDER / name, LIMIT_S))
    calls = sum(difference(before, server.calls()).values())
    return Run(count, count / printed["seconds"], calls / printed["submitted"], printed["version"])
