"""Registry of the claims of this instance, and their dispatch to its loops."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping

from loguru import logger
from msgspec.structs import replace

from imagegen.line_limit import LineLimit
from imagegen.queue.checkpoint import Checkpoint
from imagegen.queue.claim import Claim
from imagegen.queue.codec import NewerRecord, UnreadableRecord, decode_entry, peek_task_id, reused_images
from imagegen.queue.eta import EtaEstimator, entry_order
from imagegen.queue.task_cache import TaskCache
from imagegen.queue.verbs.consume import Entry
from imagegen.tasks.task import State, Task

CLAIMS_PER_SLOT = 2
"""Claims of a slot: while the result of one is written, another fills the slot that it has left."""

MAX_AWAY = 64
"""Running claims without a slot; a further one that waits for a slow host keeps its slot."""


class ClaimDispatcher:
    """Claims of this instance, and the loops that wait for one.

    A claim leaves its slot before its result is written, so that the next one starts meanwhile. It may also be away
    from its slot while it waits for a slow host.

    Attributes:
        task_cache: states of the tasks of this instance.
        held: claims by entry id. claimed: the same by task id.
        skipped_entry_ids: entries that a newer version wrote and this one can't run.
        delivered: order of the last entry that was delivered to any instance.
        restoring: whether lost claims are being written back, so entries of held claims may come once more.
        renewals: set for a moment after each renewal of the leases.
        slots: claims that loops work on at once.
        on_lost: awaited with each lost claim whose calls may have to be recorded.
        paused: whether no claim goes to a loop. Running ones go on, and so do those with images that are paid for,
            since their links end.
    """

    def __init__(self, task_cache: TaskCache, estimates: EtaEstimator, instance: str, slots: int) -> None:
        self.task_cache = task_cache
        self.estimates = estimates
        self.instance = instance
        self.held: dict[str, Claim] = {}
        self.claimed: dict[str, Claim] = {}
        self.skipped_entry_ids: set[str] = set()
        self.demand = asyncio.Event()
        self.non_empty = asyncio.Event()
        self.renewals = asyncio.Event()
        self._ready: deque[Claim] = deque()
        self._waiters: deque[asyncio.Future[Claim | None]] = deque()
        self.slots = self._slots_left = slots
        self._away: set[Claim] = set()
        self._ending: set[Claim] = set()
        self._returning: deque[tuple[Claim, asyncio.Future[None]]] = deque()
        self._quiet = self.paused = False
        self._fresh = Checkpoint(instance)
        self.delivered = 0
        self.restoring = False
        self.on_lost: Callable[[Claim], Awaitable[object]] = _do_nothing
        self._loss_lines = LineLimit(lambda _, count: logger.warning("{} more claims were lost", count))

    @property
    def open_tasks(self) -> int:
        """Number of unfinished tasks that were submitted or run here."""
        return len(self.task_cache.live)

    async def claim(self) -> Claim | None:
        """Wait for a task to run and a free slot. Return None after `quiet`."""
        while not self._quiet:
            waiter: asyncio.Future[Claim | None] = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            self._dispatch()
            self.demand.set()
            claim = await waiter
            if claim is None or not claim.lost:
                return claim
            await self.give_up(claim)
        return None

    async def give_up(self, claim: Claim) -> None:
        """Drop a claim that is lost. All claims that another instance has, or has ended, end here or in `abandon`."""
        self.drop(claim)
        if claim.has_unrecorded_call:
            claim.recorded = True
            await self.on_lost(claim)

    def quiet(self) -> None:
        """Dispatch no more claims; entries that are read from now on wait to be released."""
        self._quiet = True
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
        for _, returned in self._returning:
            if not returned.done():
                returned.set_result(None)

    @property
    def free_slots(self) -> int:
        """Slots that a loop waits to fill, none while claiming is paused."""
        if self.paused or (free := self._takeable) <= 0:
            return 0
        count = 0
        for waiter in self._waiters:
            count += not waiter.done()
            if count == free:
                break
        return count

    @property
    def takes_claims(self) -> bool:
        """Whether claims of other instances may come here: not while it drains or claiming is paused."""
        return not (self._quiet or self.paused)

    @property
    def ready(self) -> int:
        """Claims that wait for a slot."""
        return len(self._ready)

    def leave_slot(self, claim: Claim) -> None:
        """Free the slot of a claim for another one."""
        if self._away:
            self._away.discard(claim)
        if claim.occupies_slot:
            claim.occupies_slot = False
            self._slots_left += 1
            self._dispatch()
            self.demand.set()

    def end(self, claim: Claim) -> None:
        """Free the slot of a claim whose result is being written until `forget`."""
        claim.ending = True
        self._ending.add(claim)
        self.leave_slot(claim)

    def go_away(self, claim: Claim) -> None:
        """Free the slot of a claim that goes on to run, unless there are many such ones."""
        if claim.occupies_slot and len(self._away) < MAX_AWAY:
            self.leave_slot(claim)
            self._away.add(claim)

    def runs(self, claim: Claim) -> bool:
        """Return whether an attempt runs, in its slot or away from it; its result is not being written yet."""
        return claim.occupies_slot or claim in self._away

    async def come_back(self, claim: Claim) -> None:
        """Wait for a slot for a claim that has none, before all that wait for a loop; not after `quiet`."""
        if not (claim.occupies_slot or self._quiet):
            returned: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._returning.append((claim, returned))
            self._dispatch()
            await returned

    def put(self, claim: Claim) -> None:
        """Give a claim to a waiting loop, or keep it for the next one."""
        self._ready.append(claim)
        self._dispatch()

    def pause(self, *, paused: bool) -> None:
        """Give no claims to loops from now on but paid ones, or all again."""
        self.paused = self.estimates.paused = paused
        self._dispatch()
        self.demand.set()

    def put_back(self, claim: Claim) -> None:
        """Keep a claim that was not started for a loop that takes it after the pause."""
        self.leave_slot(claim)
        self.put(claim)

    def _dispatch(self) -> None:
        while self._returning and self._slots_left > 0:
            back, returned = self._returning.popleft()
            if not returned.done():
                self._away.discard(back)
                back.occupies_slot = True
                self._slots_left -= 1
                returned.set_result(None)
        while self._ready and self._waiters and self._takeable > 0 and (claim := self._next_claim()):
            waiter = self._waiters.popleft()
            if not waiter.done():
                self._ready.remove(claim)
                claim.occupies_slot = True
                self._slots_left -= 1
                waiter.set_result(claim)

    @property
    def _takeable(self) -> int:
        """Claims that may go to loops now: for free slots, but few while results can't be written."""
        left = self._slots_left
        return min(left, (CLAIMS_PER_SLOT - 1) * self.slots + left - len(self._ending))

    def _next_claim(self) -> Claim | None:
        """Return the first ready claim that may go to a loop now."""
        if self.paused:
            return next((claim for claim in self._ready if claim.checkpoint.is_paid), None)
        return self._ready[0]

    def hold(self, entries: Iterable[Entry]) -> tuple[list[Claim], list[tuple[str, str]]]:
        """Return claims of entries, and the unreadable entries: entry id and error."""
        claims, unreadable, now = [], [], time.monotonic()
        for entry_id, fields in entries:
            self.delivered = max(self.delivered, entry_order(entry_id))
            try:
                task = self._task_of(entry_id, fields)
                claim = Claim(entry_id, task, self._first_checkpoint(task), confirmed_at=now)
            except NewerRecord:
                self.skipped_entry_ids.add(entry_id)
            except UnreadableRecord as error:
                unreadable.append((entry_id, str(error)))
            else:
                self.held[entry_id] = self.claimed[claim.task.id] = claim
                if claim.task is not self.task_cache.live.get(claim.task.id):
                    self.task_cache.put(claim.task)
                claims.append(claim)
        if claims:
            self.estimates.waiting.taken([claim.entry_id for claim in claims])
            self.non_empty.set()
        return claims, unreadable

    def result_of(self, task: Task) -> Task | None:
        """Return the result of a task that still has an entry although it has ended, None without one."""
        result = self.task_cache.finished(task.id)
        return result if result is not None and result.epoch == task.epoch else None

    def _first_checkpoint(self, task: Task) -> Checkpoint:
        images = reused_images(task)
        return replace(self._fresh, images=images) if images else self._fresh

    def redelivered(self, entry: Entry) -> bool:
        """Return whether an entry of a held claim was delivered again: the group or the claim was restored."""
        entry_id, fields = entry
        if (holder := self.held.get(entry_id)) is not None:
            return not holder.lost
        claim = self.claimed.get(peek_task_id(fields)) if self.restoring else None
        return claim is not None and not claim.lost and fields.get(b"g") == str(claim.task.epoch).encode()

    def _task_of(self, entry_id: str, fields: Mapping[bytes, bytes]) -> Task:
        """Return the task of an entry, from the cache if it was submitted here.

        Raises NewerRecord or UnreadableRecord.
        """
        cached = self.task_cache.live.get(peek_task_id(fields))
        if cached is not None and cached.entry_id == entry_id and cached.state is State.PENDING:
            return cached
        return decode_entry(fields, entry_id)

    def forget(self, claim: Claim) -> None:
        """Free the slot of a claim, and stop renewing its lease."""
        self._ending.discard(claim)
        self.leave_slot(claim)
        self.held.pop(claim.entry_id, None)
        self.estimates.ended(claim.task, None)
        if self.claimed.get(claim.task.id) is claim:
            del self.claimed[claim.task.id]
        if claim.timer is not None:
            claim.timer.cancel()

    def drop(self, claim: Claim) -> None:
        """Forget a lost claim, and the cached state of its task."""
        self.forget(claim)
        if self.task_cache.live.get(claim.task.id) is claim.task:
            self.task_cache.forget(claim.task.id)

    def mark_finished_elsewhere(self, task: Task) -> None:
        """Stop the claim of a task that was finished elsewhere, for example by a cancel."""
        claim = self.claimed.get(task.id)
        if claim is not None and claim.task.epoch == task.epoch:
            waiting = claim.timer is not None and not claim.occupies_slot
            claim.mark_lost()
            if task.state is State.CANCELLED and not claim.uncharged_by(task):
                claim.recorded = True
            if waiting and claim.has_unrecorded_call:
                if claim.timer is not None:
                    claim.timer.cancel()
                self.put(claim)
            elif waiting:
                self.forget(claim)

    def carry(self, claim: Claim, entry_id: str) -> None:
        """Move a claim to another entry that carries its task now."""
        if entry_id != claim.entry_id:
            self.held.pop(claim.entry_id, None)
            claim.entry_id = entry_id
            self.held[entry_id] = claim

    def abandon(self, claim: Claim) -> None:
        """Stop the work for a claim that another instance has."""
        if self._loss_lines.admits():
            logger.bind(taskId=claim.task.id).warning("The claim was lost")
        claim.mark_lost()
        if claim.timer is not None and not claim.occupies_slot:
            self.drop(claim)

    @property
    def nothing_waits(self) -> bool:
        """Whether a slot here waits for the next entry, so no entry waits."""
        return self.free_slots > 0 and not self.estimates.waiting

    def ids(self) -> list[tuple[str, str]]:
        """Return task and entry id of each claim; the task id is empty if there is no checkpoint to renew."""
        return [(claim.task.id if claim.stored_bytes else "", claim.entry_id) for claim in self.held.values()]


async def _do_nothing(_claim: Claim) -> None:
    return
