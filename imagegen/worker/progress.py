"""Owns how what really happened in a call becomes the task's progress."""

from __future__ import annotations

from dataclasses import dataclass

from imagegen.queue.claim import Claim
from imagegen.queue.worker_queue import WorkerQueue
from imagegen.tasks.task import SENT_PROGRESS, image_progress


@dataclass(slots=True)
class ProgressReporter:
    """A provider's CallWatcher. wanted: pictures of the whole task; count: those of this call."""

    claims: WorkerQueue
    claim: Claim
    wanted: int
    count: int

    def sent(self) -> None:
        self.claims.progress(self.claim, SENT_PROGRESS)

    def progress(self, fraction: float) -> None:
        kept = len(self.claim.checkpoint.images)
        received = kept + self.count * min(max(fraction, 0.0), 1.0)
        self.claims.progress(self.claim, image_progress(received, kept, self.wanted))
