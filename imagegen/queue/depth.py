"""Owns the count of waiting tasks, kept without asking Redis each time."""

from __future__ import annotations

from imagegen.redis_client.batcher import MAX_AT_ONCE


class DepthEstimate:
    """Measured again after 0.5 % of `limit` new tasks, and at every submit while what is on its way could fill it.

    A blocked read that finds nothing says for free that nothing waits.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.waiting = 0
        self._unmeasured = 0

    @property
    def capacity(self) -> int:
        return self.limit - self.waiting

    @property
    def stale(self) -> bool:
        return self.capacity < MAX_AT_ONCE or (self.waiting > 0 and self._unmeasured >= max(self.limit // 200, 1))

    def submitted(self, added: int, measured: int | None) -> None:
        self._unmeasured = 0 if measured is not None else self._unmeasured + added
        self.waiting = (self.waiting if measured is None else measured) + added

    def claimed(self, count: int) -> None:
        self.waiting = max(self.waiting - count, 0)

    def mark_empty(self) -> None:
        self.waiting = self._unmeasured = 0
