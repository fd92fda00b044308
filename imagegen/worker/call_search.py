"""Search for the provider job of a call that was sent, and of which this service lost the response."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from loguru import logger
from msgspec.structs import replace

from imagegen.errors import UpstreamError
from imagegen.queue.claim import Claim
from imagegen.queue.worker_queue import WorkerQueue
from imagegen.tasks.provider_job import AcceptedJob, JobHandle, SentCall
from imagegen.tasks.retry import Retry
from imagegen.tasks.task import WaitReason
from imagegen.worker.attempt_limits import AttemptLimits
from imagegen.worker.call_form import CallForm
from imagegen.worker.call_routes import Routes
from imagegen.worker.saving import AttemptEnded

SEARCH_RETRY_S = 5.0
"""Delay before the search goes on if the provider's list of jobs can't be read now."""

SEARCH_FOR_S = 900.0
"""Time after the call in which its job is searched for; providers keep jobs for an hour or longer."""


@dataclass(frozen=True, slots=True)
class CallSearch:
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
            raise AttemptEnded(spent)

    async def _find(self, sent: SentCall, *, begun: bool) -> JobHandle | None:
        run = self.claim.checkpoint
        route = self.routes.find(run.channel, run.account)
        if route is None:
            return None
        try:
            handle = await route.find(self.form.sent_call(sent), sent.sent_at)
        except UpstreamError as error:
            if error.retryable and self.clock() < sent.sent_at + SEARCH_FOR_S:
                pause = Retry(SEARCH_RETRY_S, WaitReason.RETRYING, counts_as_attempt=not begun)
                raise AttemptEnded(pause) from error
            return None
        return handle if handle and await self.claims.take_found_job(self.claim, handle.id) else None

    def _found(self, sent: SentCall, handle: JobHandle) -> None:
        """Let a job take the place of a call that counted as lost."""
        logger.bind(taskId=self.claim.task.id).info("The provider has the job of a call whose answer was lost")
        run = self.claim.checkpoint.with_job(AcceptedJob(handle, sent.indexes, sent.seed, sent.model))
        cost = run.cost and run.cost.found(sent.price)
        self.claim.checkpoint = replace(run, ambiguous_calls=max(run.ambiguous_calls - 1, 0), cost=cost)
