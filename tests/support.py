"""What tests of several rooms need."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable

from imagegen.queue.client_queue import Submission


async def eventually(holds: Callable[[], Awaitable[object] | object], within_s: float = 5.0) -> None:
    """Waits until it holds; fails when it does not in time."""
    deadline = time.monotonic() + within_s
    while True:
        found = holds()
        if isinstance(found, Awaitable):
            found = await found
        if found:
            return
        assert time.monotonic() < deadline, "it did not come true in time"
        await asyncio.sleep(0.005)


class Clock:
    """Time that stands until a test moves it."""

    def __init__(self, now: float = 1_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def submission(name: object) -> Submission:
    """One of as many different submissions as there are names."""
    task_id = hashlib.md5(str(name).encode()).hexdigest()
    return Submission(
        task_id, hashlib.sha256(str(name).encode()).hexdigest()[:32], "m", b'{"prompt":"%d"}' % hash(name)
    )
