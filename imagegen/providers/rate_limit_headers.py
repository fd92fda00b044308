"""Parser of rate limits and waiting times in the headers and refusals of image services. No I/O."""

from __future__ import annotations

import re
from collections.abc import Mapping

from imagegen.formats import parse_http_date
from imagegen.providers.protocol import UpstreamLimits

_LARGEST_NUMBER = 1e6
"""More is no count of seconds but a point in time, and no rate."""

_PER_MINUTE = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?) (?:queries|requests|calls|images) per minute", re.IGNORECASE)
_WAIT = re.compile(
    r"(?:try again|retry|resets) (?:in|after) ~?([0-9]{1,6}(?:\.[0-9]{1,12})?) ?(ms|s|secs?|seconds?|mins?|minutes?)\b",
    re.IGNORECASE,
)
_SECONDS_OF_UNIT = {"ms": 0.001, "min": 60, "mins": 60, "minute": 60, "minutes": 60}
_SECONDS_A_DAY = 86_400
_UNIX_TIME = re.compile(r"[0-9]{10}(?:\.[0-9]{1,9})?")

_LIMIT_NAMES = tuple((f"x-ratelimit-{name}", f"x-ratelimit-{name}-dynamic") for name in ("remaining", "reset"))


def retry_after_s(code: str, headers: Mapping[str, str], message: str, now_s: float | None) -> float | None:
    """Return the seconds until the next call, None if the response names none. message: of the refusal, shortened.

    Together documents only `x-ratelimit-reset`: https://docs.together.ai/docs/rate-limits
    """
    requested_s = _number(headers.get("retry-after"))
    if requested_s is None:
        requested_s = _until_s(headers, now_s)
    if requested_s is not None or code != "upstream_rate_limited":
        return requested_s
    if (reset_s := _reset_s(headers, now_s)) is not None:
        return reset_s
    if match := _WAIT.search(message):
        return float(match[1]) * _SECONDS_OF_UNIT.get(match[2].lower(), 1)
    per_minute = _PER_MINUTE.search(message)
    return 60 / float(per_minute[1]) if per_minute and float(per_minute[1]) > 0 else None


def _reset_s(headers: Mapping[str, str], now_s: float | None) -> float | None:
    """Return the seconds of `x-ratelimit-reset`, which some services send as a Unix time."""
    text = headers.get("x-ratelimit-reset") or ""
    if now_s is None or not _UNIX_TIME.fullmatch(text):
        return read_limits(headers).reset_s
    wait_s = float(text) - now_s
    return max(wait_s, 0.0) if wait_s <= _SECONDS_A_DAY else None


def _until_s(headers: Mapping[str, str], now_s: float | None) -> float | None:
    then_s = parse_http_date(headers.get("retry-after"))
    sent_s = parse_http_date(headers.get("date"))
    since_s = now_s if sent_s is None else sent_s
    if then_s is None or since_s is None or then_s - since_s > _LARGEST_NUMBER:
        return None
    return max(0.0, then_s - since_s)


def read_limits(headers: Mapping[str, str]) -> UpstreamLimits:
    """Return the rate limit of a response's headers; its fields are None if they are not there."""
    return UpstreamLimits(*(_number(headers.get(name) or headers.get(dynamic)) for name, dynamic in _LIMIT_NAMES))


def _number(text: str | None) -> float | None:
    """Return a number of a header; `float` alone accepts digits of every script and `1_000`."""
    if not text or not text.isascii() or "_" in text:
        return None
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0 <= value <= _LARGEST_NUMBER else None
