"""Claim: an instance's hold on one task, and the state that moves with it to another instance."""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Callable
from enum import Enum

from msgspec import Struct, field
from msgspec.structs import replace

from imagegen.queue.checkpoint import Checkpoint, decode_checkpoint, shown_images
from imagegen.queue.codec import UnreadableRecord
from imagegen.tasks.cost import INTERRUPTED, Cost
from imagegen.tasks.task import ATTEMPT_BLOCK, Task


class StartResult(Enum):
    """Result of a start.

    STARTED: written; the paid call may be made. LOST: another instance has the claim.
    INHERITED: another instance had begun; the claim now has its state, so decide again.
    """

    STARTED = 1
    LOST = 2
    INHERITED = 3


class Claim(Struct, eq=False):
    """An instance's hold on one task.

    Attributes:
        task: as last published.
        checkpoint: progress of the attempt.
        stored_bytes, stored_checkpoint: the checkpoint in Redis, None before the first start.
        written: hashes of the checkpoints that were written for it here, without their entry ids.
        charged_before: what was charged for its task before its last start, in micro-dollars.
        lost: another instance has the claim, or the task is over; `on_lost` is called then, to stop a running call.
        started: whether this instance started it. recorded: whether its calls are recorded, or need not be, once lost.
        occupies_slot: whether a loop works on it.
        ending: its end is being written, and may be in Redis already; the reply shows whether another one was first.
        began_at: monotonic start time of the running attempt.
        confirmed_at: monotonic time at which Redis last confirmed the claim.
        contested: a previous owner may still run the task without noticing the loss.
        spent_on_lost: micro-dollars of its last call, which counted as lost here, in the counts of its key.
    """

    entry_id: str
    task: Task
    checkpoint: Checkpoint
    stored_bytes: bytes | None = None
    stored_checkpoint: Checkpoint | None = None
    written: set[int] = field(default_factory=set)
    charged_before: int = 0
    lost: bool = False
    started: bool = False
    recorded: bool = False
    on_lost: Callable[[], None] | None = None
    timer: asyncio.TimerHandle | None = None
    occupies_slot: bool = False
    ending: bool = False
    began_at: float | None = None
    confirmed_at: float = -math.inf
    contested: bool = False
    spent_on_lost: int = 0

    @property
    def cost(self) -> Cost:
        """What the task has cost by now."""
        return self.checkpoint.cost or self.task.cost or Cost()

    @property
    def begun_cost(self) -> Cost:
        """What the task has cost by now, without a call of which the checkpoint is not written: it is not made.

        At least what the written checkpoint has: a call that was taken for lost may have been found meanwhile.
        """
        stored = None if self.stored_checkpoint is None else self.stored_checkpoint.cost
        if not self.cost.calling or self.cost == stored:
            return self.cost
        begun = self.cost.unpaid()
        return stored if stored is not None and stored.ended().charged > begun.charged else begun

    def uncharged_by(self, cancelled: Task) -> int:
        """Return what the end of a cancelled task lacks of its cost, in micro-dollars: Redis had no checkpoint then."""
        if cancelled.cost is None or cancelled.cancelled_upstream:
            return 0
        return max(self.begun_cost.ended().charged - cancelled.cost.charged, 0)

    @property
    def has_begun_call(self) -> bool:
        """Whether a paid call was begun, by this instance or an owner before: no call precedes its checkpoint."""
        begun = self.stored_checkpoint is not None and self.checkpoint.phase == "calling"
        return begun or self.checkpoint.is_paid or self.checkpoint.has_new_images

    @property
    def has_paid_call(self) -> bool:
        """Whether a call since its last start may be paid."""
        return self.checkpoint.billed_again > 0 or self.cost.charged > self.charged_before

    @property
    def has_unrecorded_call(self) -> bool:
        """Whether this instance has begun a call, or one may be paid, that is not recorded yet if the claim is lost."""
        return self.started and not self.recorded and (self.has_begun_call or self.checkpoint.billed_again > 0)

    def wrote(self, stored: bytes) -> bool:
        """Return whether a stored checkpoint of its entry was written for it here."""
        entry_id, _, json = stored.partition(b" ")
        return entry_id == self.entry_id.encode() and hash(json.rstrip()) in self.written

    def mark_lost(self) -> None:
        self.lost = True
        if self.on_lost is not None:
            self.on_lost()


MAX_OUTAGE_S = 600.0
"""Outage of all instances after which a paid call may be repeated; checkpoints live at least this long."""


_LEASE_IN_NAME = re.compile(r"-([0-9]{1,9}(?:\.[0-9]{1,3})?)s\Z")


def consumer_name(instance: str, lease_s: float) -> str:
    """Return the name of an instance's consumer.

    It ends in the lease: instances may have different ones while a deploy changes `LEASE_SECONDS`.
    """
    return f"{instance}-{round(lease_s, 3):.10g}s"


def lease_of(consumer: str, default_s: float) -> float:
    """Return the lease of a consumer's claims in seconds; the default if its version did not name it."""
    named = _LEASE_IN_NAME.search(consumer)
    return float(named[1]) if named else default_s


def owner_life_s(lease_s: float) -> float:
    """Return the seconds after the last renewal in which a claim's owner may still be at work."""
    return lease_s * 2 + 5


def checkpoint_ttl_s(lease_s: float) -> float:
    """Return the seconds that a checkpoint is kept without a renewal."""
    return owner_life_s(lease_s) + MAX_OUTAGE_S


def take_over_state(
    claim: Claim, existing: bytes | None, idle_s: float, lease_s: float, *, begun: bool = False
) -> bool:
    """Copy the previous owner's progress into a claim that was taken over. begun: it was begun, by its entry.

    Return whether a call was cut off that may have been paid. That is also assumed if the checkpoint is unreadable, or
    gone although the task was begun, or the entry was idle for longer than a checkpoint lives.
    """
    if existing is None:
        count_begun_calls(claim)
    checkpoint, claim.stored_bytes, claim.contested = claim.checkpoint, existing, True
    cut_off = existing is None and (begun or idle_s >= checkpoint_ttl_s(lease_s))
    if existing is not None:
        try:
            entry_id, their_checkpoint = decode_checkpoint(existing)
        except UnreadableRecord:
            cut_off = True
        else:
            if entry_id == claim.entry_id:
                checkpoint, cut_off = their_checkpoint, their_checkpoint.calling
                if their_checkpoint.phase == "calling" and (their_checkpoint.links or their_checkpoint.job):
                    checkpoint = replace(their_checkpoint, attempts=their_checkpoint.attempts - 1)
    if cut_off:
        checkpoint = replace(checkpoint, starts=max(checkpoint.starts, 1), attempts=max(checkpoint.attempts, 1))
    cost = checkpoint.cost
    if cut_off:
        cost = cost.lost(INTERRUPTED) if cost else claim.cost.assumed_sent()
    claim.checkpoint = replace(
        checkpoint, phase="waiting", ambiguous_calls=checkpoint.ambiguous_calls + cut_off, cost=cost
    )
    claim.task = replace(
        claim.task,
        attempts=claim.checkpoint.attempts,
        sequence=max(claim.task.sequence, claim.task.epoch + (checkpoint.starts + 1) * ATTEMPT_BLOCK - 1),
        possibly_billed_twice=claim.checkpoint.billed_again,
        images=shown_images(claim.task, claim.checkpoint),
    )
    return cut_off


def count_begun_calls(claim: Claim) -> None:
    """Count the calls before a release as lost, since Redis has lost the checkpoint with their images.

    The task keeps their number: an entry that is written before the next checkpoint must have it again.
    """
    lost = claim.task.begun_calls
    if lost > claim.checkpoint.ambiguous_calls:
        claim.checkpoint = replace(claim.checkpoint, ambiguous_calls=lost)
        claim.task = replace(claim.task, possibly_billed_twice=claim.checkpoint.billed_again)


def resume_from_existing(claim: Claim, existing: bytes) -> StartResult:
    """Decide what to do with an unexpected checkpoint: of an older epoch, a released claim, or another owner.

    If it is of another entry, Redis checks at the next start which of the two counts. Raises UnreadableRecord.
    """
    entry_id, checkpoint = decode_checkpoint(existing)
    if entry_id == claim.entry_id:
        if checkpoint.phase != "released":
            claim.mark_lost()
            return StartResult.LOST
        claim.checkpoint = checkpoint
        claim.contested = claim.contested or checkpoint.ambiguous_calls > 0  # a previous owner may still run
        claim.task = replace(claim.task, attempts=checkpoint.attempts, images=shown_images(claim.task, checkpoint))
    else:
        claim.contested = True
    claim.stored_bytes = existing
    return StartResult.INHERITED
