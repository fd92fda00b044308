"""Reports of stored values that this service did not write, and of other types than it writes."""

from __future__ import annotations

from typing import Any

from loguru import logger

from imagegen.line_limit import LineLimit
from imagegen.metrics import Meter

MAX_REPORTED = 1_000
"""Values remembered, so that each is logged and counted once."""

_SHOWN = 80


class Unreadable:
    """Counter of values that can't be read; each is logged once, and many of a kind in a few lines."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._reported: dict[tuple[str, str], None] = {}
        self._limit = LineLimit(_log_more)

    def report(self, kind: str, name: str, value: object) -> None:
        """Log and count a value of a kind of key. Later reports of the same name do nothing."""
        if (kind, name) in self._reported:
            return
        self._reported[kind, name] = None
        if len(self._reported) > MAX_REPORTED:
            del self._reported[next(iter(self._reported))]
        self._meter.dead_letters += 1
        text = "A {} in Redis can't be read and is skipped: {} ({!r})"
        self._log(kind, text, kind, name, str(value)[:_SHOWN])

    def report_entry(self, entry_id: str, error: str) -> None:
        """Log an entry of the stream; the verb that moves it counts it."""
        self._log("entry", "Entry {} can't be read and goes to the dead-letter list: {}", entry_id, error)

    def _log(self, kind: str, text: str, *args: Any) -> None:
        if self._limit.admits(kind):
            logger.error(text, *args)


def _log_more(kind: str, count: int) -> None:
    logger.error("{} more values in Redis of the kind {} can't be read since the line above", count, kind)
