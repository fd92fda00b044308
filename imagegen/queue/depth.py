"""Estimate of the number of waiting tasks, kept without a command to Redis for each submit."""

from __future__ import annotations

from collections.abc import Callable

from imagegen.redis_client.batcher import MAX_AT_ONCE


class DepthEstimate:
    """Depth of the queue, at most `limit`.

    It is measured again after 0.5 % of `limit` new tasks, and with every submit while the calls in flight could fill
    the queue. A blocked read without a result shows for free that no task waits.

    in_lines: returns how many tasks wait in lines, outside of the stream.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.waiting = 0
        self._unmeasured = 0
        self.in_lines: Callable[[], int] = lambda: 0

    @property
    def room(self) -> int:
        """Tasks that may wait in the stream."""
        return self.limit - self.in_lines()

    @property
    def capacity(self) -> int:
        return self.room - self.waiting

    @property
    def stale(self) -> bool:
        return self.capacity < MAX_AT_ONCE or (self.waiting > 0 and self._unmeasured >= max(self.limit // 200, 1))

    def submitted(self, added: int, measured: int | None) -> None:
        """Add new tasks; measured: the depth before them, None if it was not measured."""
        self._unmeasured = 0 if measured is not None else self._unmeasured + added
        self.waiting = (self.waiting if measured is None else measured) + added

    def claimed(self, count: int) -> None:
        self.waiting = max(self.waiting - count, 0)

    def mark_empty(self) -> None:
        self.waiting = self._unmeasured = 0
