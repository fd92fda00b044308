from __future__ import annotations

from msgspec.structs import replace

from imagegen.errors import UpstreamError
from imagegen.tasks.retry import (
    MAX_BACKOFF_S,
    MAX_RETRY_AFTER_S,
    Failed,
    FailureContext,
    Retry,
    RetryPolicy,
    was_never_sent,
)
from imagegen.tasks.task import WaitReason
from tests.support import over_rows

POLICY = RetryPolicy(max_attempts=3, base_s=5.0)
FIRST = FailureContext(attempts=1, ambiguous=0, left_s=3600.0)
LAST = replace(FIRST, attempts=3)

LIMITED = UpstreamError("upstream_rate_limited", "429", retryable=True, status=429)
OVERLOADED = UpstreamError("upstream_overloaded", "503", retryable=True, status=503)
BROKEN = UpstreamError("upstream_error", "500", retryable=True, status=500)
REFUSED = UpstreamError("upstream_error", "no connection", retryable=True)
LOSS = UpstreamError("upstream_timeout", "no answer", retryable=True, ambiguous=True)
INVALID = UpstreamError("upstream_invalid_request", "400", status=400)


def judged(error: UpstreamError, standing: FailureContext = FIRST) -> Retry | Failed:
    return POLICY.decide(error, standing, lambda: 1.0)


def asked(error: UpstreamError, retry_after_s: float) -> UpstreamError:
    return UpstreamError(error.code, error.detail, retryable=True, status=error.status, retry_after_s=retry_after_s)


@over_rows(
    ("error", "reason", "counts"),
    [
        (LIMITED, WaitReason.UPSTREAM_RATE_LIMITED, False),
        (OVERLOADED, WaitReason.UPSTREAM_OVERLOADED, True),
        (BROKEN, WaitReason.RETRYING, True),
        (LOSS, WaitReason.RETRYING, True),
        (REFUSED, WaitReason.UPSTREAM_OVERLOADED, False),
    ],
)
def test_a_first_failure_is_tried_again(error: UpstreamError, reason: WaitReason, counts: bool) -> None:
    assert judged(error) == Retry(5.0, reason, counts)


@over_rows("error", [OVERLOADED, BROKEN, LOSS])
def test_a_counted_failure_ends_the_last_attempt(error: UpstreamError) -> None:
    failed = judged(error, LAST)
    assert isinstance(failed, Failed)
    assert (failed.error.code, failed.error.retryable) == (error.code, True)


@over_rows("error", [LIMITED, REFUSED])
def test_an_uncounted_failure_never_exhausts_the_attempts(error: UpstreamError) -> None:
    assert judged(error, LAST) == judged(error)


def test_a_task_that_alone_meets_a_rate_limit_waits_longer_each_time() -> None:
    delays = [judged(asked(LIMITED, 1.0), replace(FIRST, own_limits=count)) for count in (0, 1, 2, 3, 20)]
    assert delays == [Retry(s, WaitReason.UPSTREAM_RATE_LIMITED, False) for s in (1.0, 10.0, 20.0, 40.0, 300.0)]


def test_a_job_that_failed_by_a_rate_limit_waits_for_a_minute_and_counts_as_an_attempt() -> None:
    job = UpstreamError(LIMITED.code, "429", retryable=True, status=429, refund_unsure=True)
    assert judged(job) == Retry(60.0, WaitReason.UPSTREAM_RATE_LIMITED, counts_as_attempt=True)
    assert isinstance(judged(job, LAST), Failed)


def test_a_refusal_fails_at_once_and_is_not_retryable() -> None:
    failed = judged(INVALID)
    assert isinstance(failed, Failed)
    assert not failed.error.retryable


def test_a_second_ambiguous_loss_fails_whatever_the_attempts() -> None:
    assert isinstance(judged(LOSS, replace(FIRST, ambiguous=1)), Retry)
    assert isinstance(judged(LOSS, replace(FIRST, ambiguous=2)), Failed)
    assert isinstance(judged(LOSS, replace(FIRST, ambiguous=2, circuit_open=True)), Failed)


def test_a_failure_that_is_not_ambiguous_is_tried_again_after_a_loss() -> None:
    assert isinstance(judged(BROKEN, replace(FIRST, ambiguous=1)), Retry)


@over_rows("error", [OVERLOADED, BROKEN, LOSS])
def test_nothing_counts_while_the_upstream_is_dead(error: UpstreamError) -> None:
    assert judged(error, replace(LAST, circuit_open=True)) == Retry(
        5.0, WaitReason.UPSTREAM_OVERLOADED, counts_as_attempt=False
    )


def test_a_paid_attempt_without_images_always_counts() -> None:
    assert judged(LIMITED, replace(FIRST, paid_without_result=True)) == Retry(
        5.0, WaitReason.UPSTREAM_RATE_LIMITED, counts_as_attempt=True
    )
    assert isinstance(judged(LIMITED, replace(LAST, paid_without_result=True)), Failed)


def test_a_rate_limit_waits_for_the_retry_after() -> None:
    assert judged(asked(LIMITED, 0.5)) == Retry(0.5, WaitReason.UPSTREAM_RATE_LIMITED, counts_as_attempt=False)
    assert judged(asked(LIMITED, 86_400.0)) == Retry(
        MAX_RETRY_AFTER_S, WaitReason.UPSTREAM_RATE_LIMITED, counts_as_attempt=False
    )


def test_an_overloaded_upstream_is_given_the_longer_of_both_waits() -> None:
    assert judged(asked(OVERLOADED, 30.0)) == Retry(30.0, WaitReason.UPSTREAM_OVERLOADED)
    assert judged(asked(OVERLOADED, 1.0)) == Retry(5.0, WaitReason.UPSTREAM_OVERLOADED)


def test_a_wait_beyond_the_deadline_fails_at_once() -> None:
    for error in (LIMITED, BROKEN, REFUSED):
        failed = judged(error, replace(FIRST, left_s=4.0))
        assert isinstance(failed, Failed)
        assert failed.error.code == error.code


def test_the_delay_doubles_has_jitter_and_an_end() -> None:
    assert [POLICY.backoff_s(attempts, lambda: 1.0) for attempts in (1, 2, 3)] == [5.0, 10.0, 20.0]
    assert POLICY.backoff_s(1, lambda: 0.0) == 2.5
    assert POLICY.backoff_s(1000, lambda: 1.0) == MAX_BACKOFF_S


def test_only_unsent_calls_never_reached_the_upstream() -> None:
    partly = UpstreamError("upstream_error", "lost within the body", retryable=True, partly_sent=True)
    errors = (REFUSED, BROKEN, LOSS, LIMITED, INVALID, partly)
    assert [was_never_sent(error) for error in errors] == [True] + [False] * 5
