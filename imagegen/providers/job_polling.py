"""Polls of a provider job until its end: their pace, and what polls mean that fail or do not find the job."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Literal

from msgspec import Struct

from imagegen.errors import UpstreamError
from imagegen.providers.protocol import CallObserver, Reply, forgotten_job
from imagegen.tasks.provider_job import NO_FAILED_POLLS, FailedPolls, JobHandle

POLL_TIMEOUT_S = 15.0
FIRST_DELAY_S, DELAY_GROWTH, MAX_DELAY_S = 1.0, 1.5, 5.0
JITTER = 0.1
"""Part of a delay that is random, so that jobs which began together are not polled together."""

MAX_FAULT_DELAY_S = 30.0
"""Longest delay after polls that failed."""

MIN_DELAY_S, MAX_RETRY_AFTER_S = 0.2, 60.0
UNKNOWN_GRACE_S = 15.0
"""An upstream may not find a job yet that it has just accepted, while its databases are synchronised, or not find any
job for some seconds, in the middle of its deploy. A job that has just ended may have no images yet."""

MAX_UNKNOWN = 3
"""Polls in sequence, over `UNKNOWN_GRACE_S` at least, after which a job that the provider does not find is given up."""

MIN_USELESS, MIN_USELESS_S = 10, 600.0
"""Polls in sequence, and seconds since the first of them, after which a job is given up if they refuse the key or have
another answer that no repeat changes, such as an HTML page. The job is paid for, and maintenance of a gateway lasts
minutes. A provider that fails or is overloaded is polled until the task's deadline."""

UNREAD_S = 3.0
"""How long polls may hang, fail, not find the job or not show its state, or the job of a lost call be searched for,
until that is reported: tasks that wait need not wait for it."""

REFUSALS = frozenset({"upstream_auth", "upstream_billing"})
REDIRECTS = frozenset({301, 302, 303, 307, 308})
MAX_ID_CHARS = 200

Phase = Literal["running", "done", "failed", "forgotten"]

_WORDS: Mapping[Phase, str] = {
    "running": "submitted pending processing queued queueing running in_progress in_queue not_start starting started"
    " created accepted generating waiting initialized throttled",
    "done": "completed complete succeeded succeed success successful finished done ready",
    "failed": "failed failure fail error cancelled canceled aborted rejected timeout",
    "forgotten": "expired not_found unknown",
}
_PHASE_OF_WORD: Mapping[str, Phase] = {word: phase for phase, words in _WORDS.items() for word in words.split()}


def phase_of(word: str) -> Phase:
    """Return the phase that a provider's word for a state means; `running` for an unknown word."""
    return _PHASE_OF_WORD.get(_normalised(word), "running")


def is_unknown(word: str) -> bool:
    """Return whether a word is in no list of states, so that a job with it may run or not."""
    return _normalised(word) not in _PHASE_OF_WORD


def _normalised(word: str) -> str:
    return word.strip().lower().replace(" ", "_")


class JobState(Struct, frozen=True):
    """State of a job.

    phase: `forgotten` if the upstream does not find the job. reply: of a job that is done; error: of a failed job, as
    a call with the same result would have raised it. progress: 0 to 1, None if the upstream reports none.
    retry_after_s: seconds until the next poll, by the upstream. unclear: it only may run, since the upstream's word for
    its state is unknown or missing.
    """

    phase: Phase
    reply: Reply | None = None
    error: UpstreamError | None = None
    progress: float | None = None
    retry_after_s: float | None = None
    unclear: bool = False


Poll = Callable[[], Awaitable[JobState]]
"""Polls a job once. Raises UpstreamError for a failed poll: the job's state is unclear then."""


async def poll_until_end(
    handle: JobHandle, observer: CallObserver, poll: Poll, first_delay_s: float | None = None
) -> Reply:
    """Return the result of a job. Raises UpstreamError once it can have no image any more.

    first_delay_s: before the first poll; None: it is polled at once.
    """
    polls = _Polls(handle, poll, observer)
    if first_delay_s is not None:
        await asyncio.sleep(first_delay_s)
    try:
        while True:
            state = await polls.state()
            if state.reply is not None:
                return state.reply
            if state.error is not None:
                raise state.error
            if state.progress is not None:
                observer.progress(state.progress)
            await asyncio.sleep(polls.delay_s)
    finally:
        polls.stop_timer()


def first_delay_s(retry_after_s: float | None) -> float:
    """Return the seconds from the acceptance of a job to its first poll. retry_after_s: by the upstream."""
    return _bounded(retry_after_s) or FIRST_DELAY_S


class _Polls:
    """Polls of one job. delay_s: until the next poll. Call `stop_timer` after the last one."""

    def __init__(self, handle: JobHandle, poll: Poll, observer: CallObserver) -> None:
        self._handle, self._poll, self._observer = handle, poll, observer
        self._unknown, self._unknown_since, self._failures = 0, 0.0, handle.failed_polls
        self._empty_since: float | None = None
        self._pace_s = FIRST_DELAY_S / DELAY_GROWTH
        self.delay_s = self._pace_s
        self._timer: asyncio.TimerHandle | None = None

    async def state(self) -> JobState:
        """Return the state of the job, `running` while it is unclear or its images are missing.

        Raises UpstreamError if the job is given up.
        """
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(UNREAD_S, self._observer.job_unread)
        try:
            state = await self._poll()
        except UpstreamError as error:
            return self._failed(error)
        if self._failures.count:
            self._failures = NO_FAILED_POLLS
            self._observer.polls_failed(self._failures)
        if state.phase == "forgotten":
            return self._not_found()
        if not state.unclear:
            self.stop_timer()
        self._unknown = 0
        self._pace_s = min(self._pace_s * DELAY_GROWTH, MAX_DELAY_S)
        self.delay_s = _bounded(state.retry_after_s) or self._pace_s * _random_factor(JITTER)
        return JobState("running") if state.reply and not state.reply.images and self._may_get_images() else state

    def stop_timer(self) -> None:
        """Stop the wait that a poll has begun for the state of the job."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _may_get_images(self) -> bool:
        now = time.time()
        self._empty_since = self._empty_since or now
        return now < self._empty_since + UNKNOWN_GRACE_S

    def _not_found(self) -> JobState:
        now, expires_at = time.time(), self._handle.expires_at
        if not self._unknown:
            self._unknown_since = now
        self._unknown += 1
        self.delay_s = min(FIRST_DELAY_S * self._unknown, MAX_DELAY_S)
        has_expired = expires_at is not None and now >= expires_at
        if has_expired or (self._unknown >= MAX_UNKNOWN and now >= self._unknown_since + UNKNOWN_GRACE_S):
            raise forgotten_job()
        return JobState("running")

    def _failed(self, error: UpstreamError) -> JobState:
        self._failures = failures = _with_failure(self._failures, error, time.time())
        if failures.useless >= MIN_USELESS and time.time() - failures.useless_since >= MIN_USELESS_S:
            raise _given_up(error)
        self._observer.polls_failed(failures)
        backoff_s = min(FIRST_DELAY_S * 2 ** min(failures.count - 1, 10), MAX_FAULT_DELAY_S)
        self.delay_s = _bounded(error.retry_after_s) or backoff_s * _random_factor(0.25)
        return JobState("running")


def _with_failure(polls: FailedPolls, error: UpstreamError, now: float) -> FailedPolls:
    """Return the failed polls with one more. now: Unix time."""
    count, since = polls.count + 1, polls.since or now
    if error.retryable:
        return FailedPolls(count, since)
    return FailedPolls(count, since, polls.useless + 1, polls.useless_since or now)


def _given_up(error: UpstreamError) -> UpstreamError:
    """Return the error of a job that can't be polled. It may have been paid, so no call takes its place."""
    if error.code in REFUSALS:
        code, detail = error.code, error.detail
    else:
        code, detail = "upstream_bad_response", f"The state of the provider's job can't be read: {error.detail}"[:300]
    upstream_detail = error.upstream_detail
    return UpstreamError(code, detail, ambiguous=True, status=error.status, upstream_detail=upstream_detail)


def _bounded(seconds: float | None) -> float | None:
    return None if seconds is None else min(max(seconds, MIN_DELAY_S), MAX_RETRY_AFTER_S)


def _random_factor(spread: float) -> float:
    return 1 + spread * (2 * random.random() - 1)  # noqa: S311 - jitter
