"""Instructions of a request, counted by Valgrind: the same on a busy machine, so that two versions can be compared.

BEFORE=FOLDER measures the service in that checkout too.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from bench.report import Options, Table, command
from bench.servers import ROOT, RedisServer, answers, free_port, until

CONNECTIONS = 32
WARM_UP = 300
START_WITHIN_S = 300.0

_COUNTED = re.compile(r"I\s+refs:\s+([0-9,]+)")
_FIRST = json.dumps({"prompt": "the first"})


@dataclass(frozen=True, slots=True)
class Kind:
    """Kind of request. method: of all; path: without the task's id; bodies: one after the other."""

    name: str
    method: str
    is_distinct: bool = False


KINDS = (Kind("distinct submit", "POST", is_distinct=True), Kind("repeated submit", "POST"), Kind("status read", "GET"))


def instructions(checkout: Path, kind: Kind, count: int) -> int:
    """Return the instructions of one request: the difference of two runs, divided by that of their requests."""
    return (_run(checkout, kind, WARM_UP + count) - _run(checkout, kind, WARM_UP)) // count


def _run(checkout: Path, kind: Kind, count: int) -> int:
    """Return the instructions of a whole life of the service with this number of requests."""
    with tempfile.TemporaryDirectory(prefix="imagegen-bench-") as folder, RedisServer() as server:
        with _service(checkout, server.url, folder) as port:
            asyncio.run(_request(port, kind, count))
        report = Path(folder, "report").read_text()
    counted = _COUNTED.search(report)
    if counted is None:
        raise RuntimeError(f"Valgrind counted nothing: {report[-2_000:]}")
    return int(counted[1].replace(",", ""))


@contextmanager
def _service(checkout: Path, redis_url: str, folder: str) -> Iterator[int]:
    """Run a service under Valgrind, with one slot that never finishes; its report is complete afterwards."""
    port = free_port()
    settings = {"PORT": str(port), "REDIS_URL": redis_url, "DATA_DIR": folder, "MAX_QUEUE": "10000000"}
    settings |= {"RATE_LIMIT_MAX": "0", "IMAGE_RATE_LIMIT_MAX": "0", "LOG_LEVEL": "WARNING", "DRAIN_SECONDS": "0"}
    settings |= {"SANDBOX_DELAY": "3600", "WORKER_CONCURRENCY": "1", "LEASE_SECONDS": "600"}
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    process = subprocess.Popen(
        [
            *("valgrind", "--tool=cachegrind", "--cache-sim=no", f"--log-file={folder}/report"),
            *(f"--cachegrind-out-file={folder}/lines", sys.executable, str(checkout / "run.py")),
        ],
        cwd=folder,
        env=kept | {"PYTHONPATH": str(checkout), "PYTHONHASHSEED": "0"} | settings,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        until(lambda: answers(port, "/healthz"), START_WITHIN_S)
        yield port
    finally:
        process.terminate()
        process.wait(START_WITHIN_S)


async def _request(port: int, kind: Kind, count: int) -> None:
    base = f"http://127.0.0.1:{port}/api/images"
    limits = aiohttp.TCPConnector(limit=CONNECTIONS)
    headers = {"Content-Type": "application/json"}
    async with aiohttp.ClientSession(connector=limits, headers=headers, raise_for_status=True) as session:
        async with session.post(f"{base}/generate", data=_FIRST) as response:
            url = f"{base}/{(await response.json())['taskId']}" if kind.method == "GET" else f"{base}/generate"
        numbers = iter(range(count))

        async def request_all() -> None:
            for number in numbers:
                body = json.dumps({"prompt": f"the {number}th"}) if kind.is_distinct else _FIRST
                async with session.request(kind.method, url, data=body if kind.method == "POST" else None) as response:
                    await response.read()

        await asyncio.gather(*(request_all() for _ in range(CONNECTIONS)))


def main(options: Options) -> None:
    if shutil.which("valgrind") is None:
        print("\nInstructions of a request: not measured, since valgrind is not installed")
        return
    before = os.environ.get("BEFORE")
    checkouts: Sequence[Path] = (Path(before).resolve(), ROOT) if before else (ROOT,)
    count = options.count(10, 1_200, 5_000)
    table = Table(
        "Instructions of a request in thousands, 32 connections, LOG_LEVEL=WARNING", "what", *_columns(before)
    )
    for kind in KINDS:
        counted = [instructions(checkout, kind, count) for checkout in checkouts]
        ratio = [f"{counted[-1] / counted[0]:.3f}"] if before else []
        table.add(kind.name, *(f"{each / 1_000:.1f}" for each in counted), *ratio)
    table.show(("BEFORE=FOLDER " if before else "") + command("instructions", options))


def _columns(before: str | None) -> tuple[str, ...]:
    return ("before", "now", "now / before") if before else ("now",)
