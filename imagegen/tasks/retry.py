"""Owns what follows from an attempt: an outcome value, and the policy that finds it for an upstream's error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from imagegen.errors import UpstreamError
from imagegen.tasks.image import StoredImage
from imagegen.tasks.task import Reason, TaskError

MAX_AMBIGUOUS = 2
"""A second call that was sent and brought no answer ends the task: each may have been paid for."""

MAX_BACKOFF_S = 300.0


@dataclass(frozen=True, slots=True)
class Succeeded:
    """All pictures that will come are kept."""

    images: tuple[StoredImage, ...]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Retry:
    """Try again after `delay_s` seconds. `counts`: whether what was done is an attempt (waiting out a 429 is none)."""

    delay_s: float
    reason: Reason
    counts: bool = True


@dataclass(frozen=True, slots=True)
class Failed:
    """No picture will come."""

    error: TaskError


@dataclass(frozen=True, slots=True)
class Lost:
    """The claim is not ours any more (cancelled, taken over, finished elsewhere): nothing is to be said."""


Outcome = Succeeded | Retry | Failed | Lost


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """max_attempts: calls that count; base_s: the first delay, doubled each time, with jitter."""

    max_attempts: int
    base_s: float

    def backoff_s(self, attempts: int, random: Callable[[], float]) -> float:
        """Exponential with jitter between half and the whole; `random` gives 0 to 1."""
        whole = min(self.base_s * 2.0 ** min(attempts - 1, 30), MAX_BACKOFF_S)
        return whole * (0.5 + 0.5 * random())

    def judge(
        self, error: UpstreamError, *, attempts: int, ambiguous: int, left_s: float, random: Callable[[], float]
    ) -> Retry | Failed:
        """What follows from an error. `ambiguous` counts this one too; `left_s` is the time until the deadline."""
        failed = Failed(TaskError(error.code, error.detail, error.retryable))
        if not error.retryable or (error.ambiguous and ambiguous >= MAX_AMBIGUOUS):
            return failed
        backoff_s = self.backoff_s(max(attempts, 1), random)
        if error.code == "upstream_rate_limited":
            delay_s = error.retry_after_s if error.retry_after_s is not None else backoff_s
            retry = Retry(delay_s, Reason.UPSTREAM_RATE_LIMITED, counts=False)
        elif attempts >= self.max_attempts:
            return failed
        else:
            overloaded = error.code == "upstream_overloaded"
            retry = Retry(
                max(backoff_s, error.retry_after_s or 0.0),
                Reason.UPSTREAM_OVERLOADED if overloaded else Reason.RETRYING,
            )
        return retry if retry.delay_s < left_s else failed
