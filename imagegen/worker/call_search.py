"""Search for the provider job of a call that was sent, and of which this service lost the response."""

from __future__ import annotations

from collections.abc import Callable

from loguru import logger
from msgspec import Struct
from msgspec.structs import replace

from imagegen.errors import UpstreamError
from imagegen.queue.claim import Claim
from imagegen.queue.worker_queue import TAKE_JOB_S, WorkerQueue
from imagegen.tasks.provider_job import AcceptedJob, JobHandle, SentCall
from imagegen.tasks.retry import Failed, Retry
from imagegen.tasks.task import TaskError, WaitReason
from imagegen.worker.attempt_limits import AttemptLimits
from imagegen.worker.call_form import CallForm
from imagegen.worker.call_routes import Routes
from imagegen.worker.saving import AttemptEnded

SEARCH_RETRY_S = 5.0
"""Delay before the search goes on if the provider's list of jobs can't be read now."""

SEARCH_FOR_S = 900.0
"""Time after the call in which its job is searched for; providers keep jobs for an hour or longer."""

LAST_TAKE_JOB_S = 60.0
"""Time to find the task of a job in the last search of a call."""


class CallSearch(Struct, frozen=True):
    """Search of one claim; no call is made before it. clock: Unix time."""

    claims: WorkerQueue
    claim: Claim
    routes: Routes
    form: CallForm
    rules: AttemptLimits
    clock: Callable[[], float]

    async def run(self, *, begun: bool) -> None:
        """Search for the job of the last call, if its answer was lost; a job that is found is in the checkpoint then.

        Raises AttemptEnded if the list of jobs can't be read now, and if no job was found and no call may be made.
        begun: whether the attempt is counted yet.
        """
        sent = self.claim.checkpoint.sent
        if sent is None:
            return
        if handle := await self._find(sent, begun=begun):
            self._found(sent, handle)
            return
        self.claim.spent_on_lost = 0
        self.claims.count_lost_call(self.claim)
        self.claim.checkpoint = replace(self.claim.checkpoint, sent=None)
        if spent := self.rules.exhausted(self.claim.task, self.claim.checkpoint, self.clock()):
            raise AttemptEnded(self._with_cause(spent))

    def _with_cause(self, spent: Failed) -> Failed:
        """Return the end of the task with the error of its lost call, if this process has seen it."""
        error, code = spent.error, self.claim.cost.fault
        if error.code != "interrupted" or code in ("", error.code):
            return spent
        detail = "the provider's answer was lost, and it has no job of the call"
        return replace(spent, error=TaskError(code, detail, error.retryable))

    async def _find(self, sent: SentCall, *, begun: bool) -> JobHandle | None:
        checkpoint = self.claim.checkpoint
        route = self.routes.find(checkpoint.channel, checkpoint.account)
        if route is None:
            return None
        self.claims.go_away(self.claim)  # no call is made before its end, so it needs no slot
        try:
            handle = await route.find(self.form.sent_call(sent), sent.sent_at)
        except UpstreamError as error:
            if error.retryable and self._may_go_on(sent):
                raise self._later(begun=begun) from error
            return None
        is_ours = handle and await self.claims.take_found_job(self.claim, handle, self._take_for_s(sent))
        if handle and is_ours is None and self._may_go_on(sent):
            raise self._later(begun=begun)
        return handle if is_ours else None

    def _may_go_on(self, sent: SentCall) -> bool:
        return self.clock() < sent.sent_at + SEARCH_FOR_S

    def _take_for_s(self, sent: SentCall) -> float:
        """Return the seconds in which to find the task of a job; more if the search does not go on after that."""
        return TAKE_JOB_S if self._may_go_on(sent) else LAST_TAKE_JOB_S

    def _later(self, *, begun: bool) -> AttemptEnded:
        """Return the end of an attempt; its search goes on later, without a slot meanwhile."""
        return AttemptEnded(Retry(SEARCH_RETRY_S, WaitReason.RETRYING, counts_as_attempt=not begun))

    def _found(self, sent: SentCall, handle: JobHandle) -> None:
        """Let a job take the place of a call that counted as lost."""
        logger.bind(taskId=self.claim.task.id).info("The provider has the job of a call with a lost response")
        checkpoint = self.claim.checkpoint.with_job(AcceptedJob(handle, sent.indexes, sent.seed, sent.model))
        cost = checkpoint.cost and checkpoint.cost.found(sent.price)
        self.claim.checkpoint = replace(checkpoint, ambiguous_calls=max(checkpoint.ambiguous_calls - 1, 0), cost=cost)
