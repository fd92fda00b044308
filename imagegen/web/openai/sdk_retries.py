"""Time-outs and own retries of the SDKs that call `/v1`."""

from __future__ import annotations

import math
from collections.abc import Mapping

from imagegen.web.openai.client_calls import Mark, Marking

MAX_PATIENCE_S = 90.0
DEFAULT_READ_TIMEOUT_S = 60.0

_SAFETY_FACTOR = 0.9
_MAX_WAIT_FACTOR = 0.99
"""Of V1_MAX_WAIT: Node's own fetch waits 300 s for an answer, and the 503 must come before."""

_RETRY_COUNT = "x-stainless-retry-count"
_READ_TIMEOUTS = ("x-stainless-read-timeout", "x-stainless-timeout")
"""Python's SDKs send the first, those for Node the second, in seconds."""

_REPEATING_AGENTS = ("Together/v1 ", "ai-sdk/", "litellm/")
"""Parts of the `User-Agent` of clients that repeat failed calls without a mark."""


def wait_limit_s(headers: Mapping[str, str], max_wait_s: float) -> float:
    """Return how many seconds a client may be kept waiting.

    An SDK repeats its call, so it is answered a little before it would give up; any other client is held for
    `max_wait_s`, since it would not come again.
    """
    if not repeats_by_itself(headers):
        return max_wait_s * _MAX_WAIT_FACTOR
    text = next((headers[name] for name in _READ_TIMEOUTS if name in headers), "")
    try:
        read_timeout_s = float(text)
    except ValueError:
        read_timeout_s = DEFAULT_READ_TIMEOUT_S
    if not math.isfinite(read_timeout_s) or read_timeout_s <= 0:
        read_timeout_s = DEFAULT_READ_TIMEOUT_S
    return min(read_timeout_s * _SAFETY_FACTOR, MAX_PATIENCE_S)


def repeats_by_itself(headers: Mapping[str, str]) -> bool:
    """Return whether the client is an SDK that repeats calls after a timeout or a 503, and marks the repeats."""
    return _RETRY_COUNT in headers or any(name in headers for name in _READ_TIMEOUTS)


def mark_of(headers: Mapping[str, str]) -> Mark:
    """Return how far the headers mark a POST as a repeat.

    Proxies such as LiteLLM's repeat a failed call of an SDK as a new one.
    """
    count = headers.get(_RETRY_COUNT, "0")
    if count != "0":
        return Mark(Marking.REPEAT, int(count) if count.isascii() and count.isdigit() and len(count) < 4 else 1)
    agent = headers.get("user-agent", "")
    if repeats_by_itself(headers) or any(part in agent for part in _REPEATING_AGENTS):
        return Mark(Marking.UNSURE)
    return Mark(Marking.NEW)
