"""Outcomes of an attempt, and the policy that decides the outcome of an upstream's error."""

from __future__ import annotations

from collections.abc import Callable

from msgspec import Struct

from imagegen.backoff import doubled
from imagegen.errors import UpstreamError
from imagegen.tasks.image import StoredImage
from imagegen.tasks.reply_details import ReplyDetails
from imagegen.tasks.task import TaskError, WaitReason

MAX_AMBIGUOUS = 2
"""A second call without a response ends the task: each may have been paid for."""

MAX_BACKOFF_S = 300.0

LIMITED_JOB_BACKOFFS = 12
"""Back-offs, a minute by default, before a job that failed by a rate limit is made again: its relay's limit is most
often one of a minute, and few repeats are made."""

MAX_RETRY_AFTER_S = 120.0
"""Longest wait that an upstream may request; after that the call is repeated."""


class Succeeded(Struct, frozen=True, gc=False):
    """All images of the task are stored."""

    images: tuple[StoredImage, ...]
    warnings: tuple[str, ...] = ()
    details: ReplyDetails | None = None


class Retry(Struct, frozen=True, gc=False):
    """Try again after `delay_s` seconds. `counts_as_attempt`: a 429 does not."""

    delay_s: float
    reason: WaitReason
    counts_as_attempt: bool = True


class Failed(Struct, frozen=True, gc=False):
    """The task ends. keeps_images: with the images that it has, if it has some; only time or money for more ran out."""

    error: TaskError
    keeps_images: bool = False


class ClaimLost(Struct, frozen=True, gc=False):
    """The claim is not ours any more (cancelled, taken over, finished elsewhere): nothing is written."""


class NotStarted(Struct, frozen=True, gc=False):
    """The service stops, or claiming is paused, before the attempt began: the claim is released or held unchanged."""


Outcome = Succeeded | Retry | Failed | ClaimLost | NotStarted


class FailureContext(Struct, frozen=True, gc=False):
    """State of a task when a call has failed.

    attempts: begun ones, with this one; ambiguous: calls that were sent and got no response, with this one.
    left_s: seconds until the deadline. circuit_open: the upstream was found dead, so the failure is not the task's.
    paid_without_result: this attempt had a useless response, so that it must count, however it ended.
    own_limits: refused calls since a rate limit was found to be met by this task alone; it waits longer each time.
    """

    attempts: int
    ambiguous: int
    left_s: float
    circuit_open: bool = False
    paid_without_result: bool = False
    own_limits: int = 0


def was_never_sent(error: UpstreamError) -> bool:
    """Return whether a call can't have been paid: connection refused, unknown name, TLS, a gateway without origin."""
    unsent = error.code == "upstream_error" and error.status is None and error.retryable and not error.ambiguous
    return error.unreached or (unsent and not error.partly_sent)


def is_server_error(error: UpstreamError) -> bool:
    """Return whether the provider itself answered this call with a server error, such as 500, and not with overload."""
    return error.code == "upstream_error" and error.status is not None and not (error.ambiguous or error.unreached)


def is_useless_response(error: UpstreamError) -> bool:
    """Return whether a call was answered without a usable image, so that it may be paid for all the same.

    A redirect or another refusal is no such response, and a job with an unreadable result may still have one.
    """
    refused = error.status is not None and 300 <= error.status < 500 and not error.charged
    return error.code == "upstream_bad_response" and not (refused or error.ambiguous)


def may_be_paid(error: UpstreamError) -> bool:
    """Return whether a call that ended so may have been paid."""
    return error.ambiguous or error.charged or error.refund_unsure or is_useless_response(error)


class RetryPolicy(Struct, frozen=True):
    """Policy of the attempts of a task.

    max_attempts: calls that count; base_s: the first delay, doubled each time, with jitter.
    """

    max_attempts: int
    base_s: float

    def backoff_s(self, attempts: int, random: Callable[[], float]) -> float:
        """Return the exponential delay with jitter, between half of it and all. random: returns 0 to 1."""
        whole = doubled(self.base_s, attempts - 1, MAX_BACKOFF_S)
        return whole * (0.5 + 0.5 * random())

    def decide(self, error: UpstreamError, context: FailureContext, random: Callable[[], float]) -> Retry | Failed:
        """Return the outcome that follows from an error."""
        failed = Failed(TaskError(error.code, error.detail, error.retryable))
        if not error.retryable or (error.ambiguous and context.ambiguous >= MAX_AMBIGUOUS):
            return failed
        limited = error.code == "upstream_rate_limited"
        is_limited_job = limited and error.refund_unsure
        resting = (limited and not is_limited_job) or context.circuit_open or was_never_sent(error)
        counts = context.paid_without_result or not resting
        if counts and context.attempts >= self.max_attempts:
            return failed
        backoff_s = self.backoff_s(context.attempts if counts else 1 + context.own_limits, random)
        if is_limited_job:
            backoff_s = min(backoff_s * LIMITED_JOB_BACKOFFS, MAX_BACKOFF_S)
        requested_s = None if error.retry_after_s is None else min(error.retry_after_s, MAX_RETRY_AFTER_S)
        delay_s = max(backoff_s, requested_s or 0.0)
        if limited and requested_s is not None and not context.own_limits:
            delay_s = requested_s
        retry = Retry(delay_s, _reason(error.code, resting=resting), counts)
        return retry if delay_s < context.left_s else Failed(failed.error, keeps_images=True)


def _reason(code: str, *, resting: bool) -> WaitReason:
    if code == "upstream_rate_limited":
        return WaitReason.UPSTREAM_RATE_LIMITED
    return WaitReason.UPSTREAM_OVERLOADED if resting or code == "upstream_overloaded" else WaitReason.RETRYING
