"""Text forms that several layers read or write: times, decimal digits, printable text, base64."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import lru_cache
from itertools import takewhile
from urllib.parse import unquote_to_bytes

_URL_SAFE_TO_STANDARD = bytes.maketrans(b"-_", b"+/")

_MASK = "[prompt]"
_QUOTED_CHARS, _SHORTEST_QUOTED_CHARS = 20, 3

MAX_FAULT_CHARS = 100
"""Of the reason of TLS for a refused certificate."""

DATA_URI_HEAD = (
    r"data:(?i:(?:image/[a-z0-9.+-]{1,20}|application/octet-stream)?"
    r"(?:;\s?[a-z0-9=._-]{1,60}){0,3};\s?base64(?:;[a-z0-9=._-]{1,60}){0,3},\s?)"
)
"""How an image as a `data:` URI in base64 begins, maybe with parameters: https://www.rfc-editor.org/rfc/rfc2397

Its scheme is in lower case, since a search that ignores case takes 0.1 s for an answer of 16 MB."""


def rfc3339(unix_s: float) -> str:
    """Return a Unix time in UTC with milliseconds, as `2026-01-31T12:00:00.000Z`."""
    second, micros = divmod(round(unix_s * 1_000_000), 1_000_000)
    return f"{_date_and_time(second)}.{micros // 1000:03d}Z"


@lru_cache(maxsize=4096)
def _date_and_time(unix_s: int) -> str:
    return datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m-%dT%H:%M:%S")


def parse_http_date(text: str | None) -> float | None:
    """Return the Unix time of a `Date` or a `Retry-After` header, None for any other text.

    A date without a time zone is in UTC. https://www.rfc-editor.org/rfc/rfc9110.html#name-date-time-formats
    """
    try:
        moment = parsedate_to_datetime(text or "")
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        return None


def parse_digits(text: str) -> int | None:
    """Return the number of up to 18 ASCII digits, None for any other text: `int` accepts every script and `1_000`."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 18 else None


def printable(text: str, max_chars: int | None = None) -> str:
    """Return text with `?` for each unprintable character, cut at `max_chars`."""
    return "".join(char if char.isprintable() else "?" for char in text[:max_chars])


def mask_quotes(text: str, hidden: Iterable[str | None]) -> str:
    """Return a text with `[prompt]` for each quote of a hidden text: whole, or from its start as far as it goes.

    A hidden text of one or two characters is left, since each word may have it.
    """
    for whole in hidden:
        plain = " ".join((whole or "").split())
        start, at = plain[:_QUOTED_CHARS].lower(), -1
        while len(start) >= _SHORTEST_QUOTED_CHARS and (at := text.lower().find(start, at + 1)) >= 0:
            same = takewhile(lambda pair: pair[0] == pair[1], zip(text[at:].lower(), plain.lower(), strict=False))
            text = text[:at] + _MASK + text[at + sum(1 for _ in same) :]
            at += len(_MASK) - 1
    return text


def certificate_fault(error: BaseException) -> str:
    """Return why the certificate of a server was refused, such as `certificate has expired`; empty for another error.

    error: of aiohttp, or raised because of one. The text has no names.
    """
    fault = getattr(error, "certificate_error", None)
    if fault is None and error.__context__ is not None:
        return certificate_fault(error.__context__)
    return printable(str(getattr(fault, "verify_message", "")).partition(",")[0], MAX_FAULT_CHARS)


def plain_base64(text: bytes) -> bytes:
    """Return base64 in the standard alphabet and without padding.

    Read are also the URL-safe alphabet, percent-encoding, white space anywhere, and padding of any length.
    """
    if b"%" in text:
        text = unquote_to_bytes(text)
    return b"".join(text.split()).translate(_URL_SAFE_TO_STANDARD).rstrip(b"=")


def declares_base64(head: str) -> bool:
    """Return whether a `data:` URI is base64 by its part before the comma, at any place among the parameters."""
    return "base64" in [parameter.strip().lower() for parameter in head.split(";")[1:]]
