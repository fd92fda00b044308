"""Stores of rate limits: exact moving windows in memory, or shared ones with a fallback to memory."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from loguru import logger

from imagegen.errors import QueueUnavailable

MAX_CLIENTS = 20_000

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
    """Exact moving windows in this process; past `max_clients` the client that was longest away is forgotten."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, max_clients: int = MAX_CLIENTS) -> None:
        self._clock = clock
        self._max_clients = max_clients
        self._spent: OrderedDict[str, deque[float]] = OrderedDict()

    async def hit(self, windows: Sequence[Window], cost: int) -> list[LimitState]:
        """Spend from the windows."""
        return self.hit_sync(windows, cost)

    def hit_sync(self, windows: Sequence[Window], cost: int) -> list[LimitState]:
        """Return the same without waiting, so nothing comes between the look and the spending."""
        now = self._clock()
        logs = [self._log(window, now) for window in windows]
        refusals = [_retry_s(log, window, cost, now) for window, log in zip(windows, logs, strict=True)]
        if not any(refusals):
            for log in logs:
                log.extend([now] * cost)
        return [
            LimitState(window.limit - len(log), _left_s(log[0], window, now) if log else 0.0, retry_s)
            for window, log, retry_s in zip(windows, logs, refusals, strict=True)
        ]

    def refund(self, windows: Sequence[Window], cost: int) -> None:
        """Undo a hit that another store refused."""
        for window in windows:
            log = self._spent.get(window.key, deque())
            for _ in range(min(cost, len(log))):
                log.pop()

    def _log(self, window: Window, now: float) -> deque[float]:
        log = self._spent.get(window.key)
        if log is None:
            log = self._spent[window.key] = deque()
            if len(self._spent) > self._max_clients:
                self._spent.popitem(last=False)
        else:
            self._spent.move_to_end(window.key)
        while log and _left_s(log[0], window, now) <= 0:
            log.popleft()
        return log


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


def _retry_s(log: deque[float], window: Window, cost: int, now: float) -> float:
    over = len(log) + cost - window.limit
    if over <= 0:
        return 0.0
    if over > len(log):
        return window.window_s
    return _left_s(log[over - 1], window, now)


def _left_s(spent_at: float, window: Window, now: float) -> float:
    """Return the seconds until a hit is free again. In this order, rounding never makes it longer than the window."""
    return window.window_s - (now - spent_at)
