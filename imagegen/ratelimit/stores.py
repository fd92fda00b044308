"""Stores of rate limits: exact moving windows in memory, or shared ones with a fallback to memory."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from loguru import logger

from imagegen.errors import QueueUnavailable

MAX_WINDOWS = 60_000

MAX_ENTRIES = 1_000
"""Hits of a window that are kept apart; of a greater limit, those of a thousandth of the window count from the last."""

_REDIS_TIMEOUT_S = 0.4
_RETRY_AFTER_S = 5.0


class Window(NamedTuple):
    """Window of one limit: at most `limit` in any `window_s` seconds."""

    key: str
    limit: int
    window_s: float


class LimitState(NamedTuple):
    """State of a window after a hit.

    reset_s: seconds until some of it is free again (0 if nothing is spent).
    retry_s: seconds until the same hit would pass; over 0 means that this window refused it.
    """

    remaining: int
    reset_s: float
    retry_s: float


class RateLimitStore(Protocol):
    """Store of windows. A hit is one step over all windows: it spends from each, or from none."""

    async def hit(self, windows: Sequence[Window], cost: int) -> Sequence[LimitState]:
        """Spend from the windows; return the state of each, in order."""


class LocalRateLimitStore(RateLimitStore, Protocol):
    """Store that can also count in this process alone."""

    def hit_sync(self, windows: Sequence[Window], cost: int) -> list[LimitState]:
        """Count as `hit` does, without Redis; a cost of 0 only looks."""


class MemoryRateLimitStore:
    """Exact moving windows in this process; past `max_windows` the longest unused one is forgotten."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, max_windows: int = MAX_WINDOWS) -> None:
        self._clock = clock
        self._max_windows = max_windows
        self._spent: OrderedDict[str, _Hits] = OrderedDict()

    async def hit(self, windows: Sequence[Window], cost: int) -> list[LimitState]:
        """Spend from the windows."""
        return self.hit_sync(windows, cost)

    def hit_sync(self, windows: Sequence[Window], cost: int) -> list[LimitState]:
        """Return the same without waiting, so nothing comes between the look and the spending."""
        now, logs, passes = self._clock(), [], True
        for window in windows:
            hits = self._hits(window, now)
            retry_s = hits.retry_s(window, cost, now)
            passes = passes and not retry_s
            logs.append((window, hits, retry_s))
        if cost and passes:
            for window, hits, _ in logs:
                hits.add(window, cost, now)
        return [
            LimitState(window.limit - hits.spent, hits.reset_s(window, now), retry_s) for window, hits, retry_s in logs
        ]

    def refund(self, windows: Sequence[Window], cost: int) -> None:
        """Undo a hit that another store refused."""
        for window in windows:
            if hits := self._spent.get(window.key):
                hits.remove_last(cost)

    def _hits(self, window: Window, now: float) -> _Hits:
        hits = self._spent.get(window.key)
        if hits is None:
            hits = self._spent[window.key] = _Hits()
            if len(self._spent) > self._max_windows:
                self._spent.popitem(last=False)
        else:
            self._spent.move_to_end(window.key)
            hits.expire(window, now)
        return hits


class _Hits:
    """Hits in one window, oldest first. spent: the sum of their costs."""

    __slots__ = ("_costs", "_times", "spent")

    def __init__(self) -> None:
        self._times: list[float] = []
        self._costs: list[int] = []
        self.spent = 0

    def expire(self, window: Window, now: float) -> None:
        """Remove the hits that are as old as the window is long."""
        times, count = self._times, 0
        while count < len(times) and _left_s(times[count], window, now) <= 0:
            count += 1
        if count:
            self.spent -= sum(self._costs[:count])
            del times[:count], self._costs[:count]

    def retry_s(self, window: Window, cost: int, now: float) -> float:
        """Return the seconds until a hit of this cost would pass, 0 if it would now."""
        over = self.spent + cost - window.limit
        if over <= 0:
            return 0.0
        for spent_at, spent in zip(self._times, self._costs, strict=True):
            over -= spent
            if over <= 0:
                return _left_s(spent_at, window, now)
        return window.window_s

    def reset_s(self, window: Window, now: float) -> float:
        return _left_s(self._times[0], window, now) if self._times else 0.0

    def add(self, window: Window, cost: int, now: float) -> None:
        """Add a hit. It never counts for a shorter time than the window is long."""
        self.spent += cost
        step_s = window.window_s / MAX_ENTRIES if window.limit > MAX_ENTRIES else 0.0
        if self._times and (now == self._times[-1] or (step_s and now // step_s == self._times[-1] // step_s)):
            self._times[-1] = now
            self._costs[-1] += cost
        else:
            self._times.append(now)
            self._costs.append(cost)

    def remove_last(self, cost: int) -> None:
        """Remove the newest hits of this cost together."""
        while cost > 0 and self._costs:
            part = min(cost, self._costs[-1])
            self._costs[-1] -= part
            self.spent -= part
            cost -= part
            if not self._costs[-1]:
                del self._costs[-1], self._times[-1]


class FallbackRateLimitStore:
    """Store that instances share; while it is unavailable, the limits hold in this process's memory.

    Hits on this process are counted in memory too. So an outage gives no client a new allowance, and a client over its
    limit by its hits here alone costs no Redis command.
    """

    def __init__(
        self, shared: RateLimitStore, memory: MemoryRateLimitStore, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._shared = shared
        self._memory = memory
        self._clock = clock
        self._unavailable_since: float | None = None
        self._retry_at = 0.0

    async def hit(self, windows: Sequence[Window], cost: int) -> list[LimitState]:
        local = self._memory.hit_sync(windows, cost)
        if self._clock() < self._retry_at or not _passed(local):
            return local
        try:
            async with asyncio.timeout(_REDIS_TIMEOUT_S):
                shared = list(await self._shared.hit(windows, cost))
        except (QueueUnavailable, OSError) as error:
            self._mark_unavailable(error)
            return local
        self._mark_available()
        if not _passed(shared):
            self._memory.refund(windows, cost)
        return shared

    def hit_sync(self, windows: Sequence[Window], cost: int) -> list[LimitState]:
        """Count in this process alone; a client that is over its limit here is refused by `hit` too."""
        return self._memory.hit_sync(windows, cost)

    def _mark_unavailable(self, error: Exception) -> None:
        now = self._clock()
        self._retry_at = now + _RETRY_AFTER_S
        if self._unavailable_since is None:
            self._unavailable_since = now
            logger.warning("Shared rate limits are unavailable ({}): each instance limits alone", type(error).__name__)

    def _mark_available(self) -> None:
        if self._unavailable_since is not None:
            logger.info("Shared rate limits are back after {:.0f} s", self._clock() - self._unavailable_since)
            self._unavailable_since = None


def _passed(states: Sequence[LimitState]) -> bool:
    return all(state.retry_s <= 0 for state in states)


def _left_s(spent_at: float, window: Window, now: float) -> float:
    """Return the seconds until a hit is free again. In this order, rounding never makes it longer than the window."""
    return window.window_s - (now - spent_at)
