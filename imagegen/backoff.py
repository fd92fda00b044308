"""Waits that double after each failure, up to a limit."""

from __future__ import annotations

_MAX_DOUBLINGS = 60


def doubled(first_s: float, times: int, max_s: float) -> float:
    """Return `first_s` doubled `times` times, at most `max_s`. Seconds."""
    return min(first_s * 2.0 ** min(times, _MAX_DOUBLINGS), max_s)


class Backoff:
    """The waits of one loop: `first_s`, then twice as long each time, at most `max_s`."""

    def __init__(self, first_s: float, max_s: float) -> None:
        self._first_s = first_s
        self._max_s = max_s
        self._failures = 0

    def next_s(self) -> float:
        """Return the seconds to wait now; the next wait is longer."""
        wait_s = doubled(self._first_s, self._failures, self._max_s)
        self._failures += 1
        return wait_s

    def reset(self) -> None:
        """Begin with the first wait again."""
        self._failures = 0
