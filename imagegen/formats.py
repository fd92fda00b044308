"""Text forms that several layers read or write: RFC 3339 times, decimal digits, printable text."""

from __future__ import annotations

from datetime import UTC, datetime
from functools import lru_cache


def rfc3339(unix_s: float) -> str:
    """Return a Unix time in UTC with milliseconds, as `2026-01-31T12:00:00.000Z`."""
    second, micros = divmod(round(unix_s * 1_000_000), 1_000_000)
    return f"{_date_and_time(second)}.{micros // 1000:03d}Z"


@lru_cache(maxsize=4096)
def _date_and_time(unix_s: int) -> str:
    return datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m-%dT%H:%M:%S")


def parse_digits(text: str, max_digits: int = 18) -> int | None:
    """Return the number that ASCII digits write, None for any other text: `int` accepts every script and `1_000`."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= max_digits else None


def printable(text: str, max_chars: int | None = None) -> str:
    """Return text with `?` for each unprintable character, cut at `max_chars`."""
    return "".join(char if char.isprintable() else "?" for char in text[:max_chars])
