"""Tasks that no channel of this instance serves: left for other instances, and failed when no instance can run them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from loguru import logger
from msgspec import Struct, field

from imagegen.backoff import Backoff
from imagegen.errors import QueueUnavailable
from imagegen.queue.claim import Claim
from imagegen.queue.worker_queue import WorkerQueue
from imagegen.tasks.retry import Failed
from imagegen.tasks.task import Task, TaskError, WaitReason
from imagegen.worker.attempt_limits import AttemptLimits
from imagegen.worker.call_routes import Routes
from imagegen.worker.peer_channels import PeerChannels, able_peers

ALONE_S = 60.0
"""How long a task waits for an instance that serves it while there is none, as in the middle of a deploy."""

FIRST_HELD_S, MAX_HELD_S = 0.5, 10.0
"""How long a task that came back is kept before it is given away again: what that costs stays rare."""

PING_PEERS_INTERVAL_S = 60.0
"""Shortest time between two checks whether the instances that do not take their tasks live."""

MAX_REMEMBERED = 10_000


@dataclass(slots=True)
class _UnservedTask:
    """Record of a task that came here. alone_since: Unix time, None while another instance may run it.

    times_given: how often it was given away. was_parked: whether it was kept since then.
    """

    holds: Backoff
    alone_since: float | None = None
    was_parked: bool = False
    times_given: int = 0


class OtherInstances(Struct, frozen=True):
    """Other instances as the pool sees them. hand_over: gives a claim to the instance of a name.

    ping_peers: forgets those that are gone. alone: whether there is none, so that none could run the claims parked
    here. greet: sends them a greeting.
    """

    alone: Callable[[], bool] = lambda: True
    channels: PeerChannels = field(default_factory=PeerChannels)
    hand_over: Callable[[Claim, str], None] = lambda _claim, _peer: None
    ping_peers: Callable[[], None] = lambda: None
    greet: Callable[[], None] = lambda: None


class UnservedTasks:
    """Claims of other instances' tasks. clock: Unix time."""

    def __init__(
        self,
        claims: WorkerQueue,
        routes: Routes,
        rules: AttemptLimits,
        others: OtherInstances,
        *,
        clock: Callable[[], float],
    ) -> None:
        self._claims = claims
        self._routes = routes
        self._rules = rules
        self._others = others
        self._clock = clock
        self._records: dict[str, _UnservedTask] = {}
        self._warned = False
        self._turn = 0
        self._pinged_at = -math.inf

    async def runs_here(self, claim: Claim) -> bool:
        """Return whether a claim is to run here: its key or a channel is here; images that are paid for need none."""
        task, job = claim.task, claim.checkpoint.job
        if job and not self._routes.has_key_of(job.handle) and self._others.channels.with_key(job.handle.account):
            return False
        if self._routes.serves(task.model, sandbox=task.sandbox):
            return True
        if not claim.checkpoint.is_paid and self._others.channels.serving(task.model, sandbox=task.sandbox):
            return False  # which also reads what an earlier owner paid for
        await self._claims.read_released(claim)
        job = claim.checkpoint.job
        if claim.checkpoint.links or (job and self._routes.has_key_of(job.handle)):
            return True
        models = (model for model in self._rules.fallback_models if self._rules.may_use(task.client, model))
        return any(self._routes.serves(model, sandbox=task.sandbox) for model in models)

    async def leave(self, claim: Claim) -> Failed | None:
        """Give a claim to an instance that can run it, without counting an attempt, or hold it for a while first.

        If no instance certainly serves it, it is released for any that may. Return the end of the task if none can.
        """
        task, now = claim.task, self._clock()
        record = self._record(task)
        able = able_peers(self._others.channels, claim)
        if able or self._others.channels.may_serve(task.model, sandbox=task.sandbox):
            record.alone_since = None
        elif record.alone_since is None:
            record.alone_since = now
        ends_at = self._rules.deadline(task)
        if record.alone_since is not None:
            ends_at = min(ends_at, record.alone_since + ALONE_S)
        if now >= ends_at:
            del self._records[task.id]
            error = TaskError("model_not_available", _no_channel(task), retryable=True)
            return Failed(error, keeps_images=True)
        if record.times_given > 1 or record.alone_since is not None:
            self._check_others(now)
        if record.alone_since is None and (record.was_parked or not record.times_given):
            record.was_parked, record.times_given = False, record.times_given + 1
            await self._give(claim, able)
            return None
        record.was_parked = True
        retry_at = min(now + record.holds.next_s(), ends_at)
        self._claims.park(claim, WaitReason.QUEUED, retry_at, until=retry_at)
        return None

    def _record(self, task: Task) -> _UnservedTask:
        if not self._warned:
            self._warned = True
            logger.warning(
                "A task of this Redis needs a channel that this instance does not have; it is left for other instances"
            )
        if len(self._records) >= MAX_REMEMBERED:
            self._records.clear()
        return self._records.setdefault(task.id, _UnservedTask(Backoff(FIRST_HELD_S, MAX_HELD_S)))

    def _check_others(self, now: float) -> None:
        """Let instances be forgotten that do not live any more, now and then."""
        if now - self._pinged_at >= PING_PEERS_INTERVAL_S:
            self._pinged_at = now
            self._others.ping_peers()

    async def _give(self, claim: Claim, able: Sequence[str]) -> None:
        if able:
            self._turn += 1
            self._others.hand_over(claim, able[self._turn % len(able)])
        else:
            await self._release(claim)

    async def _release(self, claim: Claim) -> None:
        try:
            await self._claims.release([claim])
        except QueueUnavailable:
            logger.info("A task could not be released; it is taken over when Redis is back")


def _no_channel(task: Task) -> str:
    kind = "" if task.sandbox is None else " of the sandbox" if task.sandbox else " of a paid provider"
    return f"no instance has a channel{kind} that serves the model {task.model[:200]}"
