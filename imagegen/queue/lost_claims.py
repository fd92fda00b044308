"""Claims that another instance has: their work ends, and a paid call that the other one lacks is recorded.

Mostly the other instance has read this one's checkpoint, and counted the call. It could not where Redis lost the
checkpoint, as when instances follow a failover at different times: each then uses another server for a while.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence

from imagegen.errors import QueueUnavailable
from imagegen.queue.checkpoint import Checkpoint, decode_checkpoint
from imagegen.queue.claim import Claim
from imagegen.queue.codec import NewerRecord, UnreadableRecord, decode_record
from imagegen.queue.dispatcher import ClaimDispatcher
from imagegen.queue.notifier import FRESH, Notifier
from imagegen.queue.queue_verbs import QueueVerbs
from imagegen.queue.verbs.budget_counters import charge
from imagegen.queue.verbs.raise_billed import LostCall
from imagegen.tasks.task import State, Task

KEPT_S, MAX_KEPT = 600.0, 1_000
"""How long a count is kept in memory, since Redis may lose it again; how many are."""


class LostClaims:
    """End of the work for claims that another instance has.

    on_charged: called with a task and what its calls here cost, in micro-dollars, which no end of it charges.
    """

    def __init__(self, verbs: QueueVerbs, dispatcher: ClaimDispatcher, notifier: Notifier) -> None:
        self._verbs = verbs
        self._dispatcher = dispatcher
        self._notifier = notifier
        self._counts: dict[tuple[str, int], tuple[int, float]] = {}
        """Recorded count by id and epoch of a task, and the monotonic time at which it was recorded."""
        self._unrecorded: list[Claim] = []
        self._recorded: dict[str, bool] = {}
        """Whether the try to record a call was answered, by the name of the call."""
        self.on_charged: Callable[[Task, int], None] = lambda _task, _amount: None

    def keep(self, task: Task, count: int) -> None:
        """Keep a count that was recorded, and let peers read it."""
        self._verbs.meter.ambiguous += 1
        self._dispatcher.task_cache.raise_billed(task.id, task.epoch, count)
        self._counts[task.id, task.epoch] = (count, time.monotonic())
        while len(self._counts) > MAX_KEPT:
            del self._counts[next(iter(self._counts))]
        self._notifier.publish(FRESH, ids=[task.id])

    async def record_again(self) -> None:
        """Record the counts of the last minutes again, since Redis may have lost them. Raises QueueUnavailable."""
        oldest = time.monotonic() - KEPT_S
        self._counts = {name: kept for name, kept in self._counts.items() if kept[1] > oldest}
        for (task_id, epoch), (count, _) in list(self._counts.items()):
            await self._verbs.raise_billed(task_id, epoch, count)
        if self._counts:
            self._notifier.publish(FRESH, ids=[task_id for task_id, _ in self._counts])

    async def abandon(self, claims: Sequence[Claim]) -> None:
        """Stop the work, and record calls that are not counted elsewhere.

        Raises QueueUnavailable: the next call records the rest, since parked claims are not held any more.
        """
        for claim in claims:
            if not claim.lost:
                self._dispatcher.abandon(claim)
            if claim.has_begun_call and not claim.recorded:
                claim.recorded = True
                self._unrecorded.append(claim)
        while self._unrecorded:
            claim = self._unrecorded.pop()
            try:
                await self.record(claim)
            except QueueUnavailable:
                self._unrecorded.append(claim)
                raise

    async def record(self, claim: Claim) -> int:
        """Record the call of a claim if it is not counted elsewhere. Raises QueueUnavailable.

        Return the count of calls that may be paid twice that the record has now, 0 if it was not changed.
        """
        name, task = call_name(claim), claim.task
        count, amount = await self._uncounted(claim)
        if self._recorded.get(name, not (count or amount)):
            return 0
        self._recorded[name] = False  # a repeat has to find what this try may record, also if nothing is to be then
        call = LostCall(name, count, amount, charge(claim.cost, amount))
        recorded = await self._verbs.record_call(task.id, task.epoch, call)
        if recorded is None:
            del self._recorded[name]
            return 0
        self._recorded[name] = True
        if len(self._recorded) > MAX_KEPT:
            del self._recorded[next(iter(self._recorded))]
        count, amount = recorded
        if amount:
            self.on_charged(task, amount)
        self._dispatcher.drop(claim)
        if count:
            self.keep(task, count)
        return count

    async def _uncounted(self, claim: Claim) -> tuple[int, int]:
        """Return what is to be recorded: the count that the record must have, and what the calls cost.

        The count of a cancelled task stays 0: it has no result for which a call was paid twice.
        """
        record, stored, _ = await self._verbs.read(claim.task.id)
        if record is None:
            return 0, 0
        try:
            _, task = decode_record(record)
            checkpoint = None if stored is None else decode_checkpoint(stored)[1]
        except (NewerRecord, UnreadableRecord):
            return 0, 0
        if task.state is State.CANCELLED and task.epoch == claim.task.epoch:
            return 0, claim.uncharged_by(task)
        count = uncounted_calls(claim.checkpoint, task, checkpoint)
        return count, uncounted_charge(claim, checkpoint) if count else 0


def call_name(claim: Claim) -> str:
    """Return a name of the last call of a claim that no other call has."""
    checkpoint = claim.checkpoint
    numbers = (checkpoint.starts, checkpoint.attempts, checkpoint.billed_again)
    text = f"{checkpoint.owner} {claim.task.id} {claim.task.epoch} {claim.entry_id} {numbers}"
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def uncounted_charge(claim: Claim, theirs: Checkpoint | None) -> int:
    """Return what the calls of a claim cost, in micro-dollars, with the one in flight; not those before its task.

    theirs: the checkpoint in Redis. Another owner's of the same start has the calls before that start too.
    """
    before, ours = claim.task.cost.charged if claim.task.cost else 0, claim.checkpoint
    if theirs is not None and theirs.owner != ours.owner and theirs.starts == ours.starts:
        before = max(before, claim.charged_before)
    return max(claim.begun_cost.ended().charged - before, 0)


def uncounted_calls(ours: Checkpoint, task: Task, theirs: Checkpoint | None) -> int:
    """Return the count of calls that may be paid twice that a record must have; 0 if our call is counted elsewhere.

    Args:
        ours: with a call in flight, or one that is paid.
        task: as Redis has it. theirs: the checkpoint in Redis, maybe our own.
    """
    if theirs is not None and theirs.owner != ours.owner and _inherited(theirs, ours):
        return 0
    if task.state.is_final:  # its end was written without our call
        return 0 if task.state is State.CANCELLED or _is_completed_by(ours, task) else max(ours.billed_again, 1)
    if theirs is not None and theirs.owner == ours.owner:
        return 0
    return ours.billed_again + 1


def _is_completed_by(ours: Checkpoint, task: Task) -> bool:
    """Return whether another instance found our images in the store, and completed the task without a start.

    A further call of ours in flight has no image there.
    """
    saved = {(image.index, image.sha256) for image in ours.images if not image.reused}
    used = {(image.index, image.sha256) for image in task.images}
    is_found = task.state is State.COMPLETED and task.started_at is None and bool(saved) and saved <= used
    return is_found and ours.sent is None


def _inherited(theirs: Checkpoint, ours: Checkpoint) -> bool:
    """Return whether another instance continued from our checkpoint."""
    if theirs.starts > ours.starts or theirs.billed_again > ours.billed_again:
        return True
    if ours.begun_jobs:
        return ours.begun_jobs[-1] in theirs.begun_jobs
    if ours.links or ours.has_new_images:
        return (theirs.links, theirs.images) == (ours.links, ours.images)
    return ours.sent is not None and theirs.sent == ours.sent
