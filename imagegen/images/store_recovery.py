"""Recovery of an image store after failed saves: the space that it needs, and the pace of its probes."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable

MAX_PROBE_INTERVAL_S = 30.0
FLAP_S = 10.0
"""A failure this soon after a recovery shows that the probe does not see what fails."""

NEEDED_S = 600.0
"""How long the size of an image that could not be saved counts as needed: its task may have ended meanwhile."""


class NeededSpace:
    """Size of the largest image that could not be saved recently. clock: Unix time."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._bytes, self._until_s = 0, 0.0

    @property
    def size_bytes(self) -> int:
        """Zero if all images could be saved."""
        return self._bytes if self._clock() < self._until_s else 0

    def save_failed(self, size_bytes: int) -> None:
        """Record that an image could not be saved."""
        self._bytes = max(self.size_bytes, size_bytes)
        self._until_s = self._clock() + NEEDED_S

    def saved(self, size_bytes: int) -> None:
        """Record that an image was saved."""
        if size_bytes >= self._bytes:
            self._bytes = 0


class RecoveryPace:
    """Pace of the probes of one store: slower each time that a failure soon follows a recovery.

    retry_s: between two probes. interval_s: between the caller's looks at the store's health.
    """

    def __init__(self, interval_s: float) -> None:
        self.retry_s = interval_s
        self._interval_s = interval_s
        self._recovered_at_s = -math.inf

    async def recover(self, check: Callable[[], Awaitable[bool]], flap_s: float = FLAP_S) -> None:
        """Probe a failed store until `check` returns that it can be written. Call it one interval after the last look.

        flap_s: how soon after the last recovery a failure counts as soon.
        """
        loop = asyncio.get_running_loop()
        flaps = loop.time() - self._recovered_at_s < flap_s
        self.retry_s = min(2 * self.retry_s, MAX_PROBE_INTERVAL_S) if flaps else self._interval_s
        await asyncio.sleep(self.retry_s - self._interval_s)
        healthy = await check()
        while not healthy:
            await asyncio.sleep(self.retry_s)
            healthy = await check()
        self._recovered_at_s = loop.time()
