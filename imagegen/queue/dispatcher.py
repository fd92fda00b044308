"""Registry of the claims of this instance, and their dispatch to its loops."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Iterable, Mapping

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


class ClaimDispatcher:
    """Claims of this instance, and the loops that wait for one.

    A claim leaves its slot before its result is written, so that the next one starts meanwhile.

    Attributes:
        task_cache: states of the tasks of this instance.
        held: claims by entry id. claimed: the same by task id.
        skipped_entry_ids: entries that a newer version wrote and this one can't run.
        delivered: order of the last entry that was delivered to any instance.
        restoring: whether lost claims are being written back, so entries of held claims may come once more.
        slots: claims that loops work on at once.
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
        self._ready: deque[Claim] = deque()
        self._waiters: deque[asyncio.Future[Claim | None]] = deque()
        self.slots = self._slots_left = slots
        self._quiet = self.paused = False
        self._fresh = Checkpoint(instance)
        self.delivered = 0
        self.restoring = False
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
            self.drop(claim)
        return None

    def quiet(self) -> None:
        """Dispatch no more claims; entries that are read from now on wait to be released."""
        self._quiet = True
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)

    @property
    def free_slots(self) -> int:
        """Slots that a loop waits to fill, none while claiming is paused."""
        return 0 if self.paused else min(self._slots_left, sum([not waiter.done() for waiter in self._waiters]))

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
        if claim.occupies_slot:
            claim.occupies_slot = False
            self._slots_left += 1
            self._dispatch()
            self.demand.set()

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
        while self._ready and self._waiters and self._slots_left > 0 and (claim := self._next_claim()):
            waiter = self._waiters.popleft()
            if not waiter.done():
                self._ready.remove(claim)
                claim.occupies_slot = True
                self._slots_left -= 1
                waiter.set_result(claim)

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
            if waiting:
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
