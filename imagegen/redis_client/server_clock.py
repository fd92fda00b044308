"""Estimate of the Redis server's clock, by which all instances measure ages and deadlines.

It runs on the monotonic clock, so a jump of this machine's clock changes nothing. It is set by what replies carry
anyway: the server's time in INFO, which each new connection begins with, and the id of an entry that was just added.
"""

from __future__ import annotations

import time
from collections.abc import Callable

TOLERANCE_S = 2.0
"""A reply may be so late. Smaller differences are no reason to set the clock."""


class ServerClock:
    """Callable that returns the Unix time of the server in seconds; this machine's time until a reply had it."""

    def __init__(
        self, *, wall: Callable[[], float] = time.time, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._monotonic = monotonic
        self._offset = wall() - monotonic()

    def __call__(self) -> float:
        return self._monotonic() + self._offset

    def learn(self, server_s: float) -> None:
        """Set the clock by the server's Unix time in a reply that came just now, if it is wrong."""
        if abs(server_s - self()) > TOLERANCE_S:
            self._offset = server_s - self._monotonic()
