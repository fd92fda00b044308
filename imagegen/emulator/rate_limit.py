"""Emulated rate limit: calls a minute, enforced by the second as Together does."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

_UNLIMITED: Final[Mapping[str, str]] = {
    "x-ratelimit-limit": "100000",
    "x-ratelimit-remaining": "99999",
    "x-ratelimit-reset": "0",
    "x-tokenlimit-limit": "100000000",
    "x-tokenlimit-remaining": "99999999",
}


class TokenBucket:
    """A bucket that holds one second's worth of calls, at least one; 60 a minute means about one a second.

    https://docs.together.ai/docs/rate-limits: the values of the headers are per second.
    """

    def __init__(self, per_minute: float | None) -> None:
        self.per_minute = per_minute
        self._per_s = (per_minute or 0.0) / 60
        self._capacity = max(1.0, self._per_s)
        self._level = self._capacity
        self._filled_at: float | None = None

    def admit(self, now: float) -> bool:
        """Take one call out of the bucket. Return False if it is empty. now: monotonic seconds."""
        if self.per_minute is None:
            return True
        self._fill(now)
        if self._level < 1 - 1e-9:
            return False
        self._level -= 1
        return True

    def reset_s(self) -> float:
        """Return the seconds until the next call would be admitted."""
        return 0.0 if self.per_minute is None else math.ceil(max(0.0, 1 - self._level) / self._per_s * 1000) / 1000

    def headers(self) -> Mapping[str, str]:
        if self.per_minute is None:
            return _UNLIMITED
        return {
            "x-ratelimit-limit": f"{self._per_s:g}",
            "x-ratelimit-remaining": f"{int(self._level)}",
            "x-ratelimit-reset": f"{self.reset_s():.3f}",
        }

    def _fill(self, now: float) -> None:
        if self._filled_at is not None:
            self._level = min(self._capacity, self._level + (now - self._filled_at) * self._per_s)
        self._filled_at = now
