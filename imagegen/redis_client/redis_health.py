"""Availability of Redis: outages, and their log lines."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable

from loguru import logger

from imagegen.redis_client.redis_errors import InvalidResponse, ResponseError, remedy, shown

REFUSED_S, PARTLY_S = 10.0, 3.0
"""Seconds that a permanent refusal counts, or one of a full or read-only server or a cluster that is down.

Other commands succeed there meanwhile, and must not report Redis as back.
"""

UNREADABLE_S = 3.0
"""Seconds after an invalid reply in which no reply ends a wait: it was valid for the connection alone."""

MAX_OUTAGES, OUTAGES_S, LONG_S = 3, 60.0, 5.0
"""Outages that are logged in a period, as when one of several connections is refused now and then.

A further one is logged once it is long.
"""


class Health:
    """Availability of Redis: one log line when it is lost, one with the downtime when it is back.

    A refusal that an operator must fix has a line also if the outage began with another error.

    down_since, back_at: monotonic times when the present outage began, and when the last one ended.
    cause: the last error in one line.
    on_down: called at the start of an outage with whether Redis refuses commands; else it does not answer.
    """

    def __init__(self) -> None:
        self.down_since: float | None = None
        self.cause = ""
        self._refused_until = self._unreadable_until = -math.inf
        self.back_at = -math.inf
        self.on_down: list[Callable[[bool], None]] = []
        self._back = asyncio.Event()
        self._back.set()
        self._logged_at: deque[float] = deque(maxlen=MAX_OUTAGES)
        self._is_logged = False
        self._unlogged = 0
        self._remedy: str | None = None

    @property
    def refused(self) -> bool:
        """Whether Redis has just refused a command that the queue needs."""
        return self.down_since is not None and time.monotonic() < self._refused_until

    def failed(self, error: BaseException) -> None:
        to_do, now = remedy(error), time.monotonic()
        self.cause = shown(error)
        if isinstance(error, InvalidResponse):
            self._unreadable_until = now + UNREADABLE_S
        if to_do is not None or isinstance(error, ResponseError):
            self._refused_until = now + (PARTLY_S if to_do is None else REFUSED_S)
        if begins := self.down_since is None:
            self.down_since, self._is_logged, self._remedy = now, False, None
            self._back.clear()
        is_new = not self._is_logged or (to_do is not None and self._remedy is None)
        if is_new:
            self._log(error, to_do, now)
        if begins:
            for callback in self.on_down:
                callback(self.refused)

    def _log(self, error: BaseException, to_do: str | None, now: float) -> None:
        full = len(self._logged_at) == MAX_OUTAGES and now - self._logged_at[0] < OUTAGES_S
        began_at = self.down_since or now
        if full and not self._is_logged and now - began_at < LONG_S:
            return
        if not self._is_logged:
            self._logged_at.append(now)
        unlogged, self._unlogged = self._unlogged, 0
        self._is_logged, self._remedy = True, to_do
        more = f" ({unlogged} shorter outages before are not in the log)" if unlogged else ""
        logger.warning("Redis can't be used: {}{}{}", shown(error), f"; {to_do}" if to_do else "", more)

    def succeeded(self) -> None:
        if self.down_since is not None and not self.refused:
            if self._is_logged:
                logger.info("Redis is back after {:.1f} s", time.monotonic() - self.down_since)
            else:
                self._unlogged += 1
            self.down_since, self.back_at = None, time.monotonic()
            self._back.set()

    async def wait(self, at_most_s: float) -> None:
        """Wait until Redis is back, or the time is over; after an invalid reply wait until that."""
        if self._back.is_set() or time.monotonic() < self._unreadable_until:
            await asyncio.sleep(at_most_s)
            return
        try:
            async with asyncio.timeout(at_most_s):
                await self._back.wait()
        except TimeoutError:
            return
