"""Transitions between the states of a task, as pure functions that return the changed task."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace

from imagegen.tasks.image import StoredImage
from imagegen.tasks.task import ATTEMPT_BLOCK, FINAL_OFFSET, State, Task, TaskError, WaitReason

_STARTED_PROGRESS = 5


def started(task: Task, *, attempts: int, starts: int, now: float) -> Task:
    """Begin an attempt. `starts` counts every start of this epoch, also those that were no attempt."""
    return replace(
        task,
        state=State.PROCESSING,
        sequence=max(task.epoch + starts * ATTEMPT_BLOCK, task.sequence + 1),
        progress=_STARTED_PROGRESS,
        attempts=attempts,
        started_at=task.started_at or now,
        reason=None,
        retry_at=None,
    )


def progressed(task: Task, progress: int, images: Sequence[StoredImage] | None = None) -> Task:
    """Raise the progress, which never falls within an attempt, or add images that are ready."""
    return replace(
        task,
        sequence=task.sequence + 1,
        progress=max(task.progress, progress),
        images=task.images if images is None else tuple(images),
    )


def requeued(task: Task, *, reason: WaitReason, retry_at: float | None, attempts: int) -> Task:
    """Put the task back to wait after an attempt without a result."""
    return replace(
        task,
        state=State.PENDING,
        sequence=task.sequence + 1,
        progress=0,
        attempts=attempts,
        reason=reason,
        retry_at=retry_at,
    )


def stalled(task: Task, *, reason: WaitReason | None, retry_at: float | None) -> Task:
    """Mark a running task as waiting within its attempt; without a reason it goes on."""
    return replace(task, sequence=task.sequence + 1, reason=reason, retry_at=retry_at)


def completed(task: Task, images: Sequence[StoredImage], warnings: Sequence[str], *, now: float, ttl_s: float) -> Task:
    """Finish a task after all its images are stored."""
    images, warnings = tuple(images), tuple(warnings)
    return _ended(task, State.COMPLETED, now, ttl_s, progress=100, images=images, stale_images=False, warnings=warnings)


def failed(task: Task, error: TaskError, *, now: float, ttl_s: float) -> Task:
    """Finish a task that gets no image."""
    return _ended(task, State.FAILED, now, ttl_s, error=error)


def cancelled(task: Task, *, now: float, ttl_s: float) -> Task:
    """Finish a task that its client has cancelled."""
    return _ended(task, State.CANCELLED, now, ttl_s)


def _ended(task: Task, state: State, now: float, ttl_s: float, **changes: object) -> Task:
    return replace(
        task,
        state=state,
        sequence=max(task.epoch + FINAL_OFFSET, task.sequence + 1),
        finished_at=now,
        expires_at=now + ttl_s,
        entry_id="",
        reason=None,
        retry_at=None,
        **changes,
    )
