"""Wait for the reply to a call, or for the end of the provider job that the call began."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from functools import partial

from msgspec import Struct
from msgspec.structs import replace

from imagegen.errors import UpstreamError
from imagegen.providers.protocol import CallObserver, Reply
from imagegen.queue.claim import Claim
from imagegen.queue.worker_queue import WorkerQueue
from imagegen.tasks.call_plan import PlannedCall
from imagegen.tasks.provider_job import AcceptedJob, FailedPolls, JobHandle
from imagegen.tasks.retry import Retry
from imagegen.tasks.task import WaitReason
from imagegen.worker.cancel_scope import ClaimWasLost
from imagegen.worker.progress import ProgressReporter
from imagegen.worker.saving import AttemptEnded, DeadlinePassed

JOB_SLOT_S = 60.0
"""How long a job keeps its slot; after that it is polled without one, unless many claims run so. A service may leave
jobs in its line for an hour: a few of them would stop all other tasks."""

JOB_RETRY_S = 5.0
"""Delay before an unfinished provider job is polled again, so that other tasks can use the slot."""

MIN_UNREAD_RETRY_S, MAX_UNREAD_RETRY_S, MAX_FAILED_POLLS = 10.0, 60.0, 3
"""The same delay if the last polls failed: it grows with the time since the first of them. After how many of them the
slot is left."""


class JobUnfinished(AttemptEnded):
    """The job runs for longer than a slot is held; it stays in the checkpoint."""


class JobWait(Struct, eq=False):
    """Waits of one claim. total: images of the task; longest_s: how long a job is polled in a slot; ends_at: returns
    the task's deadline, Unix time. has_job: whether the last call was accepted as a job."""

    claims: WorkerQueue
    claim: Claim
    total: int
    longest_s: float
    ends_at: Callable[[], float]
    clock: Callable[[], float]
    has_job: bool = False
    _retry_s: float = JOB_RETRY_S
    _slot_timer: asyncio.TimerHandle | None = None

    async def reply(
        self,
        share: PlannedCall,
        model: str,
        call: Callable[[CallObserver], Awaitable[Reply]],
        *,
        job: AcceptedJob | None = None,
        on_accepted: Callable[[], None] = lambda: None,
    ) -> Reply:
        """Return the reply. A job that the call begins is in the stored checkpoint before it is polled.

        job: an earlier call's job that `call` polls. on_accepted: is called once the job of a new call is stored.
        Raises JobUnfinished, DeadlinePassed, ClaimWasLost, and what `call` raises: then the job, if there was one, is
        over, and is no longer in the checkpoint.
        """
        limit, price, is_over = self._limit(job), self.claim.cost.calling, False
        self.has_job = job is not None

        async def accepted(handle: JobHandle) -> None:
            self.has_job = True
            try:
                if not is_over and not self.claim.lost:
                    accepted_job = AcceptedJob(handle, share.indexes, share.seed, model)
                    self.claim.checkpoint = self.claim.checkpoint.with_job(accepted_job)
                    if await self.claims.record_job(self.claim, self.claim.checkpoint):
                        self._hold_slot(limit)
                        on_accepted()
                        return
            finally:
                if self.claim.lost:  # before, or while Redis was to write it
                    self.claims.on_job_dropped(self.claim, handle, price)
            if not is_over:
                raise ClaimWasLost

        count = len(share.indexes)
        polls_failed, job_unread = partial(self._polls_failed, limit), partial(self._leave_slot, limit)
        observer = ProgressReporter(self.claims, self.claim, self.total, count, accepted, polls_failed, job_unread)
        try:
            async with limit:
                return await call(observer)
        except TimeoutError:
            if not limit.expired():
                raise  # not this limit's: nothing may take a call without a job for an unfinished one
            raise self._unfinished() from None
        except UpstreamError:
            if self.claim.checkpoint.job:
                self.claim.checkpoint = replace(self.claim.checkpoint, job=None)
            raise
        finally:
            is_over = True
            self._stop_slot_timer()

    def _limit(self, job: AcceptedJob | None) -> asyncio.Timeout:
        """Return the limit of the wait. For a job that was begun before no call is made, so it needs no slot."""
        if job is None:
            return asyncio.timeout_at(None)
        self.claims.go_away(self.claim)
        return asyncio.timeout_at(self._wait_end())

    def _hold_slot(self, limit: asyncio.Timeout) -> None:
        limit.reschedule(self._wait_end())
        self._slot_timer = asyncio.get_running_loop().call_later(JOB_SLOT_S, self._leave_slot, limit)

    def _stop_slot_timer(self) -> None:
        if self._slot_timer is not None:
            self._slot_timer.cancel()

    def _leave_slot(self, limit: asyncio.Timeout) -> None:
        """Poll the job without a slot from now on, unless many claims run so."""
        if limit.expired():
            return
        self.claims.go_away(self.claim)
        if limit.when() is not None and not self.claim.occupies_slot:  # without a job there is no end to move
            limit.reschedule(self._wait_end())

    def _polls_failed(self, limit: asyncio.Timeout, polls: FailedPolls) -> None:
        """Leave the slot if the state of the job can't be read: it may run on. The checkpoint has since when."""
        job = self.claim.checkpoint.job
        if job is None:
            return
        job = replace(job, handle=replace(job.handle, failed_polls=polls))
        self.claim.checkpoint = replace(self.claim.checkpoint, job=job)
        if polls.count >= MAX_FAILED_POLLS:
            failing_s = (self.clock() - polls.since) / 2
            self._retry_s = min(max(failing_s, MIN_UNREAD_RETRY_S), MAX_UNREAD_RETRY_S)
            limit.reschedule(asyncio.get_running_loop().time())

    def _wait_end(self) -> float:
        """Return the event-loop time until which a job is polled: without a slot, until the deadline."""
        longest_s = self.longest_s if self.claim.occupies_slot else math.inf
        return asyncio.get_running_loop().time() + min(longest_s, self.ends_at() - self.clock())

    def _unfinished(self) -> JobUnfinished | DeadlinePassed:
        left_s = self.ends_at() - self.clock()
        if left_s <= 0:
            return DeadlinePassed()
        return JobUnfinished(Retry(min(self._retry_s, left_s), WaitReason.RETRYING, counts_as_attempt=False))
