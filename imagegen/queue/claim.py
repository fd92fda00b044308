"""Owns the claim: an instance's hold on one task, and what of it survives a change of hands."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from msgspec.structs import replace

from imagegen.queue.codec import Checkpoint, UnreadableRecord, decode_checkpoint, shown_images
from imagegen.tasks.task import ATTEMPT_BLOCK, Task


class StartResult(Enum):
    """What came of a start.

    STARTED: written; the paid call may be made. LOST: the claim is not ours any more.
    ADOPTED: another instance had begun; what it did is in the claim now, look again.
    """

    STARTED = 1
    LOST = 2
    INHERITED = 3


@dataclass(eq=False, slots=True)
class Claim:
    """An instance's hold on one task.

    task: as last published; run: how far it has come; written: the run as it stands in Redis, and stands: its bytes
    there, None before the first start.
    lost: somebody else has it, or nobody should; `abandon` is called then, to stop a call that is under way.
    in_slot: a loop works on it; began_at: when the attempt that runs was started, monotonic.
    confirmed_at: when Redis last confirmed that the claim is ours, monotonic; contested: another instance may have
    held it before and may not know that it lost it.
    """

    entry_id: str
    task: Task
    checkpoint: Checkpoint
    stored_bytes: bytes | None = None
    stored_checkpoint: Checkpoint | None = None
    lost: bool = False
    on_lost: Callable[[], None] | None = None
    timer: asyncio.TimerHandle | None = field(default=None, repr=False)
    occupies_slot: bool = False
    began_at: float | None = None
    confirmed_at: float = -math.inf
    contested: bool = False

    def mark_lost(self) -> None:
        self.lost = True
        if self.on_lost is not None:
            self.on_lost()


MAX_OUTAGE_S = 600.0
"""So long all instances may be away, and what is paid for already is not paid for again."""


def owner_life_s(lease_s: float) -> float:
    """Return the seconds after its last renewal in which a run's owner may still be at work."""
    return lease_s * 2 + 5


def checkpoint_ttl_s(lease_s: float) -> float:
    """Return the seconds that a run is kept without a renewal."""
    return owner_life_s(lease_s) + MAX_OUTAGE_S


def take_over_state(claim: Claim, stands: bytes | None, idle_s: float, lease_s: float) -> bool:
    """Puts into a claim that was taken over what the instance before had done, from the run it wrote.

    Returns whether a call was cut off that may have been paid.
    A run that is gone though the entry rested longer than a run lives, or that can't be read, is taken for a call that
    may have been paid.
    """
    run, claim.stored_bytes, claim.contested = claim.checkpoint, stands, True
    cut_off = stands is None and idle_s >= checkpoint_ttl_s(lease_s)
    if stands is not None:
        try:
            entry_id, theirs = decode_checkpoint(stands)
        except UnreadableRecord:
            cut_off = True
        else:
            if entry_id == claim.entry_id:
                run, cut_off = theirs, theirs.calling
                if theirs.phase == "calling" and theirs.links:
                    run = replace(theirs, attempts=theirs.attempts - 1)
    if cut_off:
        run = replace(run, starts=max(run.starts, 1), attempts=max(run.attempts, 1))
    claim.checkpoint = replace(run, phase="waiting", ambiguous_calls=run.ambiguous_calls + cut_off)
    claim.task = replace(
        claim.task,
        attempts=claim.checkpoint.attempts,
        sequence=max(claim.task.sequence, claim.task.epoch + (run.starts + 1) * ATTEMPT_BLOCK - 1),
        possibly_billed_twice=claim.checkpoint.billed_again,
        images=shown_images(claim.task, claim.checkpoint),
    )
    return cut_off


def resume_from_existing(claim: Claim, stands: bytes) -> StartResult:
    """Another run stands where ours should: an older generation's, one that was handed back, or a thief's.

    Where it is of another entry, Redis checks at the next start which of the two counts. Raises UnreadableRecord.
    """
    entry_id, run = decode_checkpoint(stands)
    if entry_id == claim.entry_id:
        if run.phase != "released":
            claim.mark_lost()
            return StartResult.LOST
        claim.checkpoint = run
        claim.contested = claim.contested or run.ambiguous_calls > 0  # an owner from before may still be under way
        claim.task = replace(claim.task, attempts=run.attempts, images=shown_images(claim.task, run))
    else:
        claim.contested = True
    claim.stored_bytes = stands
    return StartResult.INHERITED
