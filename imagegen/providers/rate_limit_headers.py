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
_DURATION = r"(?=[0-9])(?:([0-9]{1,3})h)?(?:([0-9]{1,4})m)?(?:([0-9]{1,6}(?:\.[0-9]{1,12})?)s)?"
_WHOLE_DURATION = re.compile(_DURATION)
_LONG_WAIT = re.compile(rf"(?:try again|retry|resets) (?:in|after) ~?({_DURATION})(?![0-9a-z])", re.IGNORECASE)
_SECONDS_OF_UNIT = {"ms": 0.001, "min": 60, "mins": 60, "minute": 60, "minutes": 60}
_SECONDS_A_DAY = 86_400
_UNIX_TIME = re.compile(r"[0-9]{10}(?:\.[0-9]{1,9})?")

_LIMIT_NAMES = tuple((f"x-ratelimit-{name}", f"x-ratelimit-{name}-dynamic") for name in ("remaining", "reset"))


_EXHAUSTED = tuple((f"x-ratelimit-remaining-{unit}", f"x-ratelimit-reset-{unit}") for unit in ("requests", "tokens"))
"""OpenAI's: https://platform.openai.com/docs/guides/rate-limits#rate-limits-in-headers"""


def retry_after_s(code: str, headers: Mapping[str, str], message: str, now_s: float | None) -> float | None:
    """Return the seconds until the next call, None if the response names none. message: of the refusal, shortened.

    Together documents only `x-ratelimit-reset`: https://docs.together.ai/docs/rate-limits
    """
    requested_s = _number(headers.get("retry-after"))
    if requested_s is None and (milliseconds := _number(headers.get("retry-after-ms"))) is not None:
        requested_s = milliseconds / 1000
    if requested_s is None:
        requested_s = _until_s(headers, now_s)
    if requested_s is not None or code != "upstream_rate_limited":
        return requested_s
    if (reset_s := _reset_s(headers, now_s)) is not None:
        return reset_s
    if match := _WAIT.search(message):
        return float(match[1]) * _SECONDS_OF_UNIT.get(match[2].lower(), 1)
    if match := _LONG_WAIT.search(message):
        return _duration_s(match[1].lower())
    per_minute = _PER_MINUTE.search(message)
    return 60 / float(per_minute[1]) if per_minute and float(per_minute[1]) > 0 else None


def _reset_s(headers: Mapping[str, str], now_s: float | None) -> float | None:
    """Return the seconds of `x-ratelimit-reset`, which some services send as a Unix time, or of OpenAI's headers."""
    of_exhausted = [_duration_s(headers.get(reset)) for left, reset in _EXHAUSTED if headers.get(left) == "0"]
    if waits_s := [wait_s for wait_s in of_exhausted if wait_s is not None]:
        return max(waits_s)
    text = headers.get("x-ratelimit-reset") or ""
    if now_s is None or not _UNIX_TIME.fullmatch(text):
        return read_limits(headers).reset_s
    wait_s = float(text) - now_s
    return max(wait_s, 0.0) if wait_s <= _SECONDS_A_DAY else None


def _duration_s(text: str | None) -> float | None:
    """Return the seconds of a duration such as `1m12.5s`."""
    parts = _WHOLE_DURATION.fullmatch(text or "")
    if parts is None:
        return None
    return sum(float(part or 0) * unit_s for part, unit_s in zip(parts.groups(), (3_600, 60, 1), strict=True))


def _until_s(headers: Mapping[str, str], now_s: float | None) -> float | None:
    then_s = parse_http_date(headers.get("retry-after"))
    sent_s = parse_http_date(headers.get("date"))
    since_s = now_s if sent_s is None else sent_s
    if then_s is None or since_s is None or then_s - since_s > _LARGEST_NUMBER:
        return None
    return max(0.0, then_s - since_s)


def read_limits(headers: Mapping[str, str]) -> UpstreamLimits:
    """Return the rate limit of a response's headers; its fields are None if they are not there."""
    return UpstreamLimits(*[_number(headers.get(name) or headers.get(dynamic)) for name, dynamic in _LIMIT_NAMES])


def _number(text: str | None) -> float | None:
    """Return a number of a header; `float` alone accepts digits of every script and `1_000`."""
    if not text or not text.isascii() or "_" in text:
        return None
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0 <= value <= _LARGEST_NUMBER else None
