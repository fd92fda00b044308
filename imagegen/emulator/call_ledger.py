"""Ledger of the emulator: each call that it received, and whether the call would have been paid."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from time import time
from typing import Final

import orjson

from .input_files import InputFile
from .jobs import Job

_KEPT: Final = 200_000


@dataclass(slots=True)
class EmulatedCall:
    """One call. Times are seconds since 1970.

    outcome: the status that it got or will get, or what came instead (`hang`, `reset`, `trickle` …).
    paid: the whole request was read, and the answer is no 4xx.
    client_there: whether the client was still there when it was answered; None while it waits.
    inputs: the images that came with it; path: of the route.
    job: the job that it began; `paid` is whether that was charged in the end.
    """

    received_at: float
    outcome: int | str
    paid: bool
    body_hash: str = ""
    prompt: str = ""
    model: str = ""
    n: int = 0
    seed: int | None = None
    body: Mapping[str, object] = field(default_factory=dict)
    answered_at: float | None = None
    client_there: bool | None = None
    inputs: Sequence[InputFile] = ()
    path: str = ""
    job: Job | None = None


class CallLedger:
    """The calls, oldest first (the last 200,000), and counts of all since the start or the last clear()."""

    def __init__(self) -> None:
        self.calls: deque[EmulatedCall] = deque(maxlen=_KEPT)
        self.total = 0
        self.paid_total = 0
        self.in_flight = 0
        self.peak_in_flight = 0
        self._waiting: list[asyncio.Future[None]] = []

    @property
    def jobs(self) -> list[Job]:
        return [call.job for call in self.calls if call.job is not None]

    @property
    def paid(self) -> list[EmulatedCall]:
        return [call for call in self.calls if call.paid]

    def matching(self, text: str) -> list[EmulatedCall]:
        """Return the calls with a prompt that holds `text`."""
        return [call for call in self.calls if text in call.prompt]

    def opened(self, call: EmulatedCall) -> None:
        self.calls.append(call)
        self.total += 1
        self.paid_total += call.paid
        self.in_flight += 1
        self.peak_in_flight = max(self.peak_in_flight, self.in_flight)
        self._notify()

    def closed(self, call: EmulatedCall, *, client_there: bool) -> None:
        """Record that a call was answered, or that its client left. Only the first report of a call counts."""
        if call.answered_at is not None:
            return
        call.answered_at, call.client_there = time(), client_there
        self.in_flight = max(0, self.in_flight - 1)
        self._notify()

    def clear(self) -> None:
        self.calls.clear()
        self.total = self.paid_total = 0
        self.peak_in_flight = self.in_flight

    async def wait_for(self, condition: Callable[[CallLedger], object], timeout_s: float = 30.0) -> None:
        """Wait until `condition(ledger)` is true. Raises TimeoutError."""
        async with asyncio.timeout(timeout_s):
            while not condition(self):
                waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                self._waiting.append(waiter)
                await waiter

    def to_json(self, text: str = "") -> bytes:
        """Return the counts of all calls, and the calls with a prompt that holds `text`."""
        return orjson.dumps(
            {
                "total": self.total,
                "paid": self.paid_total,
                "in_flight": self.in_flight,
                "peak_in_flight": self.peak_in_flight,
                "calls": self.matching(text),
            }
        )

    def _notify(self) -> None:
        waiting, self._waiting = self._waiting, []
        for waiter in waiting:
            if not waiter.done():
                waiter.set_result(None)
