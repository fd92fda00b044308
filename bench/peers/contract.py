"""Common parts of the Python peers' scripts: their arguments, the submits in flight, the clock and the line they print.

It runs in each peer's own environment and imports only the standard library.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from importlib.metadata import version

WARM_UP = 200  # as bench/queue_alone.py has it, which a peer's environment can't import


@dataclass(frozen=True)
class Given:
    """Arguments of a script."""

    url: str
    count: int
    concurrency: int
    in_flight: int

    @property
    def submitted(self) -> int:
        return WARM_UP + self.count


def given() -> Given:
    url, *numbers = sys.argv[1:]
    return Given(url, *map(int, numbers))


class Finished:
    """Number of finished tasks."""

    def __init__(self) -> None:
        self._count = 0
        self._changed = asyncio.Event()

    def one(self) -> None:
        self._count += 1
        self._changed.set()

    async def reach(self, total: int) -> None:
        while self._count < total:
            self._changed.clear()
            await self._changed.wait()


async def measure(
    wanted: Given, submit: Callable[[], Awaitable[str]], until_stored: Callable[[int], Awaitable[None]]
) -> tuple[float, list[str]]:
    """Seconds from the first submit until the last result is stored, and the ids, those of the warm-up too.

    until_stored: returns once that number of results is stored since the start.
    """
    ids: list[str] = []

    async def submit_all(count: int) -> None:
        left = iter(range(count))

        async def submitter() -> None:
            for _ in left:
                ids.append(await submit())  # noqa: PERF401 - many append to it at once

        await asyncio.gather(*(submitter() for _ in range(wanted.in_flight)))

    await asyncio.gather(submit_all(WARM_UP), until_stored(WARM_UP))
    began = time.perf_counter()
    await asyncio.gather(submit_all(wanted.count), until_stored(wanted.submitted))
    return time.perf_counter() - began, ids


def report(wanted: Given, seconds: float, stored: int, *packages: str) -> None:
    """Print the line. Exits if a result is missing."""
    if stored != wanted.submitted:
        sys.exit(f"{stored} of {wanted.submitted} results are stored")
    first, *others = (version(package) for package in packages)
    clients = ", ".join(f"{package} {number}" for package, number in zip(packages[1:], others, strict=True))
    print(
        json.dumps({"seconds": seconds, "submitted": wanted.submitted, "version": f"{first} ({clients})"}), flush=True
    )
