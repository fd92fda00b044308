"""Tasks that no channel of this instance serves: left for other instances, and failed when no instance can run them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from loguru import logger

from imagegen.backoff import Backoff
from imagegen.errors import QueueUnavailable
from imagegen.queue.claim import Claim
from imagegen.queue.worker_queue import WorkerQueue
from imagegen.tasks.retry import Failed
from imagegen.tasks.task import Task, TaskError, WaitReason
from imagegen.worker.limits import AttemptLimits
from imagegen.worker.routes import Routes

ALONE_S = 60.0
"""How long a task waits for another instance while there is none, as in the middle of a deploy."""

FIRST_HELD_S, MAX_HELD_S = 0.5, 10.0
"""How long a task that came back is kept before it is released again: what a release costs stays rare."""

MAX_REMEMBERED = 10_000


@dataclass(slots=True)
class _Seen:
    """Record of a task that came here. alone_since: Unix time, None while there is another instance."""

    holds: Backoff
    alone_since: float | None = None
    is_held: bool = False
    released: int = 0


class UnservedTasks:
    """Claims of other instances' tasks. alone: whether there is no other instance; clock: Unix time."""

    def __init__(
        self,
        claims: WorkerQueue,
        routes: Routes,
        rules: AttemptLimits,
        *,
        alone: Callable[[], bool],
        clock: Callable[[], float],
    ) -> None:
        self._claims = claims
        self._routes = routes
        self._rules = rules
        self._alone = alone
        self._clock = clock
        self._seen: dict[str, _Seen] = {}
        self._warned = False

    async def runs_here(self, claim: Claim) -> bool:
        """Return whether a channel here serves a task; images that are paid for need none."""
        task = claim.task
        if self._routes.serves(task.model, sandbox=task.sandbox):
            return True
        await self._claims.read_released(claim)
        models = (model for model in self._rules.fallback_models if self._rules.may_use(task.client, model))
        job = claim.checkpoint.job
        if claim.checkpoint.links or (job and self._routes.has_key_of(job.handle)):
            return True
        return any(self._routes.serves(model, sandbox=task.sandbox) for model in models)

    async def leave(self, claim: Claim) -> Failed | None:
        """Release a claim for other instances, without counting an attempt, or hold it for a while first.

        Return the end of the task if no instance can run it.
        """
        seen, now = self._record(claim.task), self._clock()
        if not self._alone():
            seen.alone_since = None
        elif seen.alone_since is None:
            seen.alone_since = now
        ends_at = self._rules.deadline(claim.task)
        if seen.alone_since is not None:
            ends_at = min(ends_at, seen.alone_since + ALONE_S)
        if now >= ends_at:
            del self._seen[claim.task.id]
            error = TaskError("model_not_available", _no_channel(claim.task), retryable=True)
            return Failed(error, keeps_images=True)
        if seen.alone_since is None and (seen.is_held or not seen.released):
            seen.is_held, seen.released = False, seen.released + 1
            await self._release(claim)
            return None
        seen.is_held = True
        retry_at = min(now + seen.holds.next_s(), ends_at)
        self._claims.park(claim, WaitReason.QUEUED, retry_at, until=retry_at)
        return None

    def _record(self, task: Task) -> _Seen:
        if not self._warned:
            self._warned = True
            logger.warning(
                "A task of this Redis needs a channel that this instance does not have; it is left for other instances"
            )
        if len(self._seen) >= MAX_REMEMBERED:
            self._seen.clear()
        return self._seen.setdefault(task.id, _Seen(Backoff(FIRST_HELD_S, MAX_HELD_S)))

    async def _release(self, claim: Claim) -> None:
        try:
            await self._claims.release([claim])
        except QueueUnavailable:
            logger.info("A task could not be released; it is taken over when Redis is back")


def _no_channel(task: Task) -> str:
    kind = "" if task.sandbox is None else " of the sandbox" if task.sandbox else " of a paid provider"
    return f"no instance has a channel{kind} that serves the model {task.model[:200]}"
