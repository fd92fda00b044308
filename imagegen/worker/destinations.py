"""Fair schedule of webhook tries, by destination: a slow or dead receiver delays no other webhooks.

Each try starts in the quick lane and leaves it after `SLOW_S`, so that others may start. A destination that was slow
or failed starts only in the slow lane, few at once, and after each failure it is left alone for longer.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Generic, TypeVar
from urllib.parse import urlsplit

from imagegen.backoff import doubled

Item = TypeVar("Item")

MAX_CONCURRENT = 100
"""Tries under way in all."""

MAX_QUICK = 40
MAX_SLOW = 40
MAX_PER_HOST = 16
"""Of one host and port, over all its destinations."""

MAX_UNPROVEN = 1
"""Of a destination without a record."""

MAX_HEALTHY = 8
MAX_SLOW_EACH = 2
MAX_FAILING_EACH = 1

SLOW_S = 1.0
"""A try that takes longer is slow."""

MIN_PAUSE_S = 0.01
MAX_PAUSE_S = 30.0
"""A pause is as long as the failed try took, doubled with each further failure in a row."""

MAX_RETRY_AFTER_S = 60.0
MAX_REMEMBERED = 1_000
"""Destinations that are remembered as slow or failing though nothing waits for them."""


@dataclass(slots=True, eq=False)
class Destination(Generic[Item]):
    """One receiver. waiting: heap of (due time, number, item); failures: in a row."""

    name: str
    host: str
    waiting: list[tuple[float, int, Item]] = field(default_factory=list)
    under_way: int = 0
    healthy: bool = False
    slow: bool = False
    failures: int = 0
    paused_until: float = 0.0
    timer_at: float = math.inf

    @property
    def is_troubled(self) -> bool:
        return self.slow or self.failures > 0

    @property
    def max_concurrent(self) -> int:
        if self.failures:
            return MAX_FAILING_EACH
        if self.slow:
            return MAX_SLOW_EACH
        return MAX_HEALTHY if self.healthy else MAX_UNPROVEN


@dataclass(slots=True, eq=False)
class Try(Generic[Item]):
    """A try that is under way."""

    item: Item
    destination: Destination[Item]
    is_quick: bool


class Destinations(Generic[Item]):
    """Queue of items by destination, and the choice of the next one. Times are of one clock, in seconds."""

    def __init__(self) -> None:
        self._all: dict[str, Destination[Item]] = {}
        self._quick: dict[str, Destination[Item]] = {}
        self._slow: dict[str, Destination[Item]] = {}
        self._blocked: dict[str, dict[str, Destination[Item]]] = {}
        self._timers: list[tuple[float, int, Destination[Item]]] = []
        self._of_host: Counter[str] = Counter()
        self._number = itertools.count()
        self._under_way = self._in_quick = self._in_slow = 0

    def add(self, name: str, due_at: float, item: Item, now: float) -> None:
        """Queue an item for a destination, to be tried at `due_at`."""
        destination = self._all.get(name)
        if destination is None:
            destination = self._all[name] = Destination(name, urlsplit(name).netloc)
        heapq.heappush(destination.waiting, (due_at, next(self._number), item))
        self._place(destination, now)

    def start(self, now: float) -> Try[Item] | None:
        """Return the next item to try, None if none may start now. Destinations take turns."""
        while self._timers and self._timers[0][0] <= now:
            timed = heapq.heappop(self._timers)[2]
            timed.timer_at = math.inf
            if self._all.get(timed.name) is timed:
                self._place(timed, now)
        if self._under_way >= MAX_CONCURRENT:
            return None
        if self._in_quick < MAX_QUICK and (destination := self._next_of(self._quick)):
            return self._start(destination, now, is_quick=True)
        if self._in_slow < MAX_SLOW and (destination := self._next_of(self._slow)):
            return self._start(destination, now, is_quick=False)
        return None

    def wait_s(self, now: float) -> float | None:
        """Return the seconds until something falls due, None if nothing will without an event."""
        return max(self._timers[0][0] - now, 0.0) if self._timers else None

    def slow_down(self, running: Try[Item], now: float) -> None:
        """Note that a try takes longer than `SLOW_S`: it leaves the quick lane."""
        running.destination.slow = True
        if running.is_quick:
            running.is_quick = False
            self._in_quick -= 1
            self._in_slow += 1
        self._place(running.destination, now)

    def end(
        self, running: Try[Item], now: float, *, took_s: float, failed: bool, retry_after_s: float | None = None
    ) -> None:
        """Note how a try ended.

        Args:
            running: the try.
            now: the time.
            took_s: seconds until its answer.
            failed: whether no answer came, or an answer that shows that the receiver has trouble.
            retry_after_s: seconds for which the receiver takes no more.
        """
        destination = running.destination
        destination.under_way -= 1
        self._under_way -= 1
        self._of_host[destination.host] -= 1
        if running.is_quick:
            self._in_quick -= 1
        else:
            self._in_slow -= 1
        destination.slow = took_s > SLOW_S
        if failed:
            destination.failures += 1
            pause_s = doubled(max(took_s, MIN_PAUSE_S), destination.failures - 1, MAX_PAUSE_S)
            pause_s = max(pause_s, min(retry_after_s or 0.0, MAX_RETRY_AFTER_S))
            destination.paused_until = now + pause_s
        else:
            destination.failures, destination.paused_until = 0, 0.0
            destination.healthy = not destination.slow
        self._place(destination, now)
        self._unblock(destination.host, now)
        self._forget(destination)

    def _start(self, destination: Destination[Item], now: float, *, is_quick: bool) -> Try[Item]:
        item = heapq.heappop(destination.waiting)[2]
        destination.under_way += 1
        self._under_way += 1
        self._of_host[destination.host] += 1
        if is_quick:
            self._in_quick += 1
        else:
            self._in_slow += 1
        self._place(destination, now)
        return Try(item, destination, is_quick)

    def _next_of(self, ready: dict[str, Destination[Item]]) -> Destination[Item] | None:
        """Remove and return the destination with the next turn; those of a full host wait for an end there."""
        while ready:
            name = next(iter(ready))
            destination = ready.pop(name)
            if self._of_host[destination.host] < MAX_PER_HOST:
                return destination
            self._blocked.setdefault(destination.host, {})[name] = destination
        return None

    def _place(self, destination: Destination[Item], now: float) -> bool:
        """Put a destination where it belongs: ready, waiting for a time, or nowhere. Return whether it is ready."""
        name = destination.name
        is_ready = False
        if destination.waiting and destination.under_way < destination.max_concurrent:
            at = max(destination.waiting[0][0], destination.paused_until)
            is_ready = at <= now
            if not is_ready and at < destination.timer_at:
                destination.timer_at = at
                heapq.heappush(self._timers, (at, next(self._number), destination))
        blocked = self._blocked.get(destination.host)
        if blocked is not None and name in blocked:
            return False
        lane = self._slow if destination.is_troubled else self._quick
        for ready in (self._quick, self._slow):
            if ready is not lane or not is_ready:
                ready.pop(name, None)
        if is_ready:
            lane.setdefault(name, destination)
        return is_ready

    def _unblock(self, host: str, now: float) -> None:
        """Give the place that became free at a host to the destination that waits longest for one."""
        blocked = self._blocked.get(host)
        while blocked:
            destination = blocked.pop(next(iter(blocked)))
            if self._place(destination, now):
                break
            self._forget(destination)
        if not blocked:
            self._blocked.pop(host, None)
        if self._of_host[host] <= 0:
            del self._of_host[host]

    def _forget(self, destination: Destination[Item]) -> None:
        """Drop a destination without work; the ones in trouble are remembered for a while."""
        if destination.waiting or destination.under_way:
            return
        self._all.pop(destination.name, None)
        if destination.is_troubled:
            self._all[destination.name] = destination
            if len(self._all) > MAX_REMEMBERED:
                destinations = self._all.values()
                idle = next((other for other in destinations if not other.waiting and not other.under_way), None)
                if idle is not None:
                    del self._all[idle.name]
