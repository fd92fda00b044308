"""Limits of a task: attempts, ambiguous calls, deadline, images a call. No I/O."""

from __future__ import annotations

from collections.abc import Callable

from msgspec import Struct

from imagegen.queue.checkpoint import Checkpoint
from imagegen.tasks.retry import MAX_AMBIGUOUS, Failed, RetryPolicy
from imagegen.tasks.task import Task, TaskError, WaitReason

MIN_JOB_WAIT_S = 600.0
"""Shortest wait for a provider job in a slot, also if `UPSTREAM_TIMEOUT` is shorter: polls are free, the job paid."""

MAX_KNOWN_COUNTS = 200
"""Models; clients may name any."""


class AttemptLimits(Struct, frozen=True):
    """Limits of the attempts of a task.

    deadline_s: seconds from the submit to the end of the last attempt; fallback_models: tried in this order if
    the requested model is not available. job_wait_s: how long an attempt polls a provider job in its slot. may_use:
    returns whether a key, by its name, allows a model. after_jumps: returns a time as it would be after jumps of the
    server's clock.
    """

    policy: RetryPolicy
    deadline_s: float
    fallback_models: tuple[str, ...] = ()
    job_wait_s: float = MIN_JOB_WAIT_S
    may_use: Callable[[str, str], bool] = lambda _name, _model: True
    after_jumps: Callable[[float], float] = lambda unix_s: unix_s

    def deadline(self, task: Task) -> float:
        """Return the task's deadline, Unix time."""
        return self.after_jumps(task.created_at) + self.deadline_s

    def deadline_failure(self, task: Task) -> Failed:
        """Return the failure of a task at its deadline; its code is the reason that it waited for."""
        waited_for = task.reason in (WaitReason.UPSTREAM_RATE_LIMITED, WaitReason.UPSTREAM_OVERLOADED)
        code = str(task.reason) if waited_for else "upstream_timeout"
        detail = f"the task could not be finished within {self.deadline_s:g} s"
        return Failed(TaskError(code, detail, retryable=True), keeps_images=True)

    def exhausted(self, task: Task, checkpoint: Checkpoint, now: float) -> Failed | None:
        """Return the failure of a task that must not be called for again; paid images may still be fetched."""
        if checkpoint.links or checkpoint.job or checkpoint.sent:
            return self.deadline_failure(task) if now >= self.deadline(task) else None
        if checkpoint.ambiguous_calls >= MAX_AMBIGUOUS or checkpoint.attempts >= self.policy.max_attempts:
            return Failed(TaskError("interrupted", "the service stopped while the task ran", retryable=True))
        return self.deadline_failure(task) if now >= self.deadline(task) else None


class SeedSupport:
    """Support of seeds by models: by the provider, by the model table, and as learned from refusals, which cost nothing
    but a request.

    Args:
        carried: returns whether the provider sends seeds for a model.
        published: returns whether a model takes seeds by the table, None if that is unknown.
    """

    def __init__(
        self,
        carried: Callable[[str], bool] = lambda _model: True,
        published: Callable[[str], bool | None] = lambda _model: None,
    ) -> None:
        self._carried = carried
        self._published = published
        self._refusing: set[str] = set()

    def sends(self, model: str, *, given: bool) -> bool:
        """Return whether a call carries a seed. given: by the client, which is refused at submit or left to the model.

        The seed of a variant is not sent to a model that refuses it by the table or in an earlier call.
        """
        if not self._carried(model):
            return False
        return given or (model not in self._refusing and self._published(model) is not False)

    def refused(self, model: str) -> None:
        """Learn from a refused call."""
        if len(self._refusing) >= MAX_KNOWN_COUNTS:
            self._refusing.clear()
        self._refusing.add(model)


class ImageCounts:
    """Limits of images a call, by model: published ones, and those learned from refusals, which cost nothing."""

    def __init__(self, published: Callable[[str], int | None] = lambda _model: None) -> None:
        self._most: dict[str, int] = {}
        self._published = published

    def most(self, model: str, per_call: int) -> int:
        return min(per_call, self._most.get(model, per_call), self._published(model) or per_call)

    def refused(self, model: str, count: int, most: int) -> None:
        """Learn from a refused call for `count` images; `most`: the highest count that the refusal names."""
        if len(self._most) >= MAX_KNOWN_COUNTS:
            self._most.clear()
        self._most[model] = max(min(most, count - 1), 1)
