"""Reports of stored values that this service did not write, and of other types than it writes."""

from __future__ import annotations

from loguru import logger

from imagegen.metrics import Meter

MAX_REPORTED = 1_000
"""Values remembered, so that each is logged and counted once."""

_SHOWN = 80


class Unreadable:
    """Counter of values that can't be read; each is logged once."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._reported: dict[tuple[str, str], None] = {}

    def report(self, kind: str, name: str, value: object) -> None:
        """Log and count a value of a kind of key. Later reports of the same name do nothing."""
        if (kind, name) in self._reported:
            return
        self._reported[kind, name] = None
        if len(self._reported) > MAX_REPORTED:
            del self._reported[next(iter(self._reported))]
        self._meter.dead_letters += 1
        logger.error("A {} in Redis can't be read and is skipped: {} ({!r})", kind, name, str(value)[:_SHOWN])
