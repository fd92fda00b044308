"""Requests as steps without I/O: a generator yields what to do, and a driver, synchronous or not, does it.

A driver sends each `HttpRequest` and returns its `HttpResponse`, or throws `NoResponse`; it sleeps for each `Pause`.
"""

from __future__ import annotations

import random
from collections.abc import Generator, Mapping
from datetime import UTC, datetime
from itertools import count
from typing import TypeVar

from msgspec import Struct
from msgspec.structs import replace

from imagegen.client.exceptions import ConnectionFailed, ResponseError, response_error

_T = TypeVar("_T")

_NOT_ACCEPTED = frozenset({"rate_limited", "too_many_open_tasks", "too_many_connections", "queue_full", "draining"})
"""Codes of refusals before anything of a request was done; a repeat of any request is safe."""

_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})


class HttpRequest(Struct, frozen=True):
    """Request to send.

    path: from the base address of the service, or a whole address.
    timeout_s: longest silence while the response is awaited.
    is_repeatable: sent twice, it does the same as sent once. Else it is repeated only if nothing was done.
    """

    method: str
    path: str
    headers: Mapping[str, str] = {}
    body: bytes | None = None
    timeout_s: float = 30.0
    is_repeatable: bool = True


class HttpResponse(Struct, frozen=True):
    """Whole response. headers: names in lower case. attempts: how often its request was sent."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    attempts: int = 1


class Pause(Struct, frozen=True):
    """Time to wait before the next step. why: code of the refusal that is waited out; empty for a lost answer."""

    seconds: float
    why: str = ""


class NoResponse(Exception):
    """The connection failed or was lost. maybe_sent: the service may have received the request."""

    def __init__(self, message: str, *, maybe_sent: bool) -> None:
        super().__init__(message)
        self.maybe_sent = maybe_sent


Steps = Generator[HttpRequest | Pause, HttpResponse | None, _T]


class RepeatPolicy(Struct, frozen=True):
    """Policy of repeats: how often a request is sent, and the pauses between.

    max_attempts: with the first one. base_s: the first pause; it doubles up to `longest_s`, with jitter.
    max_retry_after_s: a service that requires a longer pause is not waited for.
    """

    max_attempts: int = 4
    base_s: float = 0.5
    longest_s: float = 10.0
    max_retry_after_s: float = 65.0

    def pause_s(self, attempt: int) -> float:
        """Return the seconds after an attempt, counted from 1."""
        longest_s = min(self.longest_s, self.base_s * 2.0 ** min(attempt - 1, 30))
        return longest_s * random.uniform(0.5, 1.0)  # noqa: S311 - spreads the repeats


PATIENT = RepeatPolicy(max_attempts=40)
"""For reads of a task that is waited for: about five minutes, so that it outlives a deploy of the service."""


def send(request: HttpRequest, policy: RepeatPolicy) -> Steps[HttpResponse]:
    """Send a request, and repeat it as the policy allows; return a response without error.

    Raises ResponseError, ConnectionFailed.
    """
    for attempt in count(1):
        is_last = attempt >= policy.max_attempts
        try:
            response = yield request
        except NoResponse as loss:
            if is_last or (loss.maybe_sent and not request.is_repeatable):
                raise ConnectionFailed(str(loss), maybe_sent=loss.maybe_sent) from loss
            yield Pause(policy.pause_s(attempt))
            continue
        if response is None:
            raise RuntimeError("the driver sent no response")
        if response.status < 400:
            return replace(response, attempts=attempt)
        error = error_of(response)
        error.attempts = attempt
        pause_s = error.retry_after_s if error.retry_after_s is not None else policy.pause_s(attempt)
        if is_last or not may_repeat(request, error) or pause_s > policy.max_retry_after_s:
            raise error
        yield Pause(pause_s, error.code)
    raise AssertionError("unreachable")


def may_repeat(request: HttpRequest, error: ResponseError) -> bool:
    """Return whether the request may be sent again after this error."""
    if not request.is_repeatable:
        return error.code in _NOT_ACCEPTED
    return error.status in _PASSING and (error.retryable or not error.code)


def error_of(response: HttpResponse) -> ResponseError:
    """Return the error of a response."""
    return response_error(response.status, response.headers, response.body, datetime.now(UTC))
