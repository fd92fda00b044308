"""Limit of log lines about many things of one cause: the first of a minute, then one line that counts the others."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

MAX_LINES, COUNTED_S = 5, 60.0
"""Lines of a kind in that time; then one line counts the others, and as many follow again."""


class LineLimit:
    """Limit of the lines of each kind. log_more: called with the kind and the count of lines that were left out."""

    def __init__(self, log_more: Callable[[str, int], None]) -> None:
        self._log_more = log_more
        self._counts: dict[str, int] = {}
        """Lines by kind since the first one of the present period."""

    def admits(self, kind: str = "") -> bool:
        """Count a line. Return whether it may be logged."""
        count = self._counts[kind] = self._counts.get(kind, 0) + 1
        if count == 1:
            asyncio.get_running_loop().call_later(COUNTED_S, self._end_period, kind)
        return count <= MAX_LINES

    def _end_period(self, kind: str) -> None:
        more = self._counts.pop(kind) - MAX_LINES
        if more > 0:
            self._log_more(kind, more)
