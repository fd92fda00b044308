"""Progress of a task from the events of its calls."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from msgspec import Struct

from imagegen.queue.claim import Claim
from imagegen.queue.worker_queue import WorkerQueue
from imagegen.tasks.provider_job import FailedPolls, JobHandle
from imagegen.tasks.task import SENT_PROGRESS, image_progress
from imagegen.worker.cancel_scope import ClaimWasLost


class ProgressReporter(Struct, frozen=True):
    """A provider's CallObserver. total: images of the whole task; count: images of this call.

    on_accepted: keeps the handle of a provider job. on_polls_failed: receives which polls of it have failed.
    on_job_unread: is called if its state has not been read for seconds.
    """

    claims: WorkerQueue
    claim: Claim
    total: int
    count: int
    on_accepted: Callable[[JobHandle], Awaitable[None]]
    on_polls_failed: Callable[[FailedPolls], None]
    on_job_unread: Callable[[], None]

    def sending(self) -> Awaitable[None] | None:
        return None if self.claims.has_lease(self.claim) else self._renewed()

    async def _renewed(self) -> None:
        """Wait until the lease is renewed. Raises ClaimWasLost."""
        if not await self.claims.renewed(self.claim):
            raise ClaimWasLost

    def sent(self) -> None:
        self.claims.progress(self.claim, SENT_PROGRESS)

    async def takes(self, job: JobHandle) -> bool:
        return await self.claims.take_found_job(self.claim, job) is True

    async def accepted(self, handle: JobHandle) -> None:
        await self.on_accepted(handle)

    def polls_failed(self, polls: FailedPolls) -> None:
        self.on_polls_failed(polls)

    def job_unread(self) -> None:
        self.on_job_unread()

    def progress(self, fraction: float) -> None:
        stored = len(self.claim.checkpoint.images)
        received = stored + self.count * min(max(fraction, 0.0), 1.0)
        self.claims.progress(self.claim, image_progress(received, stored, self.total))
