"""Limits of a task: attempts, ambiguous calls, deadline. No I/O."""

from __future__ import annotations

from dataclasses import dataclass

from imagegen.queue.codec import Checkpoint
from imagegen.tasks.retry import MAX_AMBIGUOUS, Failed, RetryPolicy
from imagegen.tasks.task import Task, TaskError, WaitReason


@dataclass(frozen=True, slots=True)
class AttemptLimits:
    """deadline_s: seconds from the submit to the end of the last attempt; fallback_models: tried in this order if
    the requested model is not available."""

    policy: RetryPolicy
    deadline_s: float
    fallback_models: tuple[str, ...] = ()

    def deadline(self, task: Task) -> float:
        """Return the task's deadline, Unix time."""
        return task.created_at + self.deadline_s

    def deadline_failure(self, task: Task) -> Failed:
        """Return the failure of a task at its deadline; its code is the reason that it waited for."""
        waited_for = task.reason in (WaitReason.UPSTREAM_RATE_LIMITED, WaitReason.UPSTREAM_OVERLOADED)
        code = str(task.reason) if waited_for else "upstream_timeout"
        detail = f"the task could not be finished within {self.deadline_s:g} s"
        return Failed(TaskError(code, detail, retryable=True), at_deadline=True)

    def exhausted(self, task: Task, run: Checkpoint, now: float) -> Failed | None:
        """Return the failure of a task that must not be called for again; paid images may still be fetched."""
        if run.links:
            return self.deadline_failure(task) if now >= self.deadline(task) else None
        if run.ambiguous_calls >= MAX_AMBIGUOUS or run.attempts >= self.policy.max_attempts:
            return Failed(TaskError("interrupted", "the service stopped while the task ran", retryable=True))
        return self.deadline_failure(task) if now >= self.deadline(task) else None
