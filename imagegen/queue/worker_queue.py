"""Worker side of the queue: claim, start, checkpoint, progress, finish, retry, park and release."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any

from msgspec.structs import replace

from imagegen.errors import QueueUnavailable
from imagegen.queue.checkpoint import Checkpoint, decode_checkpoint, is_readable_checkpoint, is_released, shown_images
from imagegen.queue.claim import Claim, StartResult, count_begun_calls, resume_from_existing, take_over_state
from imagegen.queue.codec import decode_record, with_delivery_log
from imagegen.queue.dispatcher import ClaimDispatcher
from imagegen.queue.queue_verbs import QueueVerbs
from imagegen.queue.task_cache import TaskCache
from imagegen.queue.verbs.budget_counters import Limits
from imagegen.queue.verbs.compare_and_set import CompareAndSetItem
from imagegen.queue.verbs.finish import as_stored, finish_item
from imagegen.queue.verbs.release import release_item
from imagegen.queue.verbs.reserve_more import Extension
from imagegen.queue.verbs.start_fenced import FencedStart
from imagegen.redis_client.connection import Connection
from imagegen.redis_client.redis_errors import ResponseError, wrong_type
from imagegen.tasks import transitions
from imagegen.tasks.provider_job import JobHandle
from imagegen.tasks.retry import Retry
from imagegen.tasks.task import State, Task, WaitReason

SURE_SHARE = 0.8
"""Share of a lease after Redis confirmed a claim in which no other instance can have taken it over."""

TAKE_JOB_S = 5.0
"""How long a slot is held to find the task of a job."""


class WorkerQueue:
    """Verbs of the worker pool. Each one waits until Redis is available.

    slots: claims that may run at once. on_transferred: called after a claim went back to its owner.
    on_job_dropped: called with a job that was accepted after its claim was lost, or that its task did not wait for,
        and the price of its call.
    on_refused: awaited with a claim with a paid call, if its task has another end; returns the raised count of calls
    that may be paid twice, or 0.
    """

    def __init__(
        self,
        connection: Connection,
        verbs: QueueVerbs,
        task_cache: TaskCache,
        dispatcher: ClaimDispatcher,
        *,
        lease_s: float,
    ) -> None:
        self._connection = connection
        self._verbs = verbs
        self._task_cache = task_cache
        self._dispatcher = dispatcher
        self._estimates = dispatcher.estimates
        self._meter = connection.meter
        self._lease_s = lease_s
        self._unreadable = verbs.unreadable
        self._clock = connection.clock
        self.slots = dispatcher.slots
        self.on_transferred: Callable[[], None] = lambda: None
        self.on_refused: Callable[[Claim], Awaitable[int]] = _count_nothing
        self.on_job_dropped: Callable[[Claim, JobHandle, int], None] = _ignore

    def claim(self) -> Coroutine[Any, Any, Claim | None]:
        """Wait for a task to run and a free slot. Return None after `quiet`."""
        return self._dispatcher.claim()

    def quiet(self) -> None:
        """Stop claiming."""
        self._dispatcher.quiet()

    @property
    def is_paused(self) -> bool:
        """Return whether claiming is paused."""
        return self._dispatcher.paused

    def put_back(self, claim: Claim) -> None:
        """Keep a claim that was not started until claiming goes on."""
        self._dispatcher.put_back(claim)

    def drop(self, claim: Claim) -> None:
        """Forget a claim that is taken over from what it last wrote, and the task's cached state."""
        self._dispatcher.drop(claim)

    async def give_up(self, claim: Claim) -> None:
        """Forget a lost claim. Its calls are recorded, unless another instance has counted them."""
        await self._dispatcher.give_up(claim)

    def go_away(self, claim: Claim) -> None:
        """Free the slot of a running claim that waits for a slow host, unless many claims do."""
        self._dispatcher.go_away(claim)

    async def come_back(self, claim: Claim) -> None:
        """Wait for a slot for a running claim that is away from its own."""
        await self._dispatcher.come_back(claim)

    async def read_released(self, claim: Claim) -> None:
        """Copy what an earlier owner released with the task into a claim that is not started; costs one command."""
        if claim.stored_bytes is not None:
            return
        (existing,) = await self._connection.retry_until_available(self._verbs.read_checkpoints, [claim.task.id])
        if existing and is_released(existing, claim.entry_id):
            resume_from_existing(claim, existing)

    async def _inherit_released(self, claim: Claim) -> bool:
        """Copy what an earlier owner released, or count its calls as lost if that is gone. Return False for neither."""
        (existing,) = await self._connection.retry_until_available(self._verbs.read_checkpoints, [claim.task.id])
        if existing is None:
            self._meter.ambiguous += 1
            count_begun_calls(claim)
            return True
        if not is_released(existing, claim.entry_id):
            return False
        resume_from_existing(claim, existing)
        return True

    async def take_found_job(self, claim: Claim, job: JobHandle, within_s: float = TAKE_JOB_S) -> bool | None:
        """Let a claim's task own a job that it found at the provider. Return False if another task has it.

        Return None if that stays open for some seconds.
        """
        return await self._verbs.take_found_job(claim.task.id, job, within_s)

    async def start(self, claim: Claim) -> StartResult:
        """Count the attempt and set the owner, before money is spent."""
        if not self._connection.recovered.is_set():
            await self._connection.recovered.wait()
        is_uncounted = claim.task.begun_calls > claim.checkpoint.ambiguous_calls
        if is_uncounted and claim.stored_bytes is None and await self._inherit_released(claim):
            return StartResult.INHERITED
        checkpoint = replace(
            claim.checkpoint,
            owner=self._dispatcher.instance,
            phase="calling",
            starts=claim.checkpoint.starts + 1,
            attempts=claim.checkpoint.attempts + 1,
            started_at=claim.checkpoint.started_at or self._clock(),
            reason=None,
            retry_at=None,
        )
        value = checkpoint.encode(claim.entry_id)
        existing = await self._connection.retry_until_available(self._write, claim, checkpoint, value)
        if existing is None:
            claim.mark_lost()
            return StartResult.LOST
        if existing and claim.contested:  # the previous owner started it after our takeover
            cut_off = take_over_state(claim, existing, 0.0, self._lease_s)
            self._meter.ambiguous += cut_off and claim.checkpoint.sent is None
            return StartResult.INHERITED
        if existing:
            return await self._take_over(claim, existing)
        self._record_checkpoint(claim, checkpoint, value)
        claim.started, claim.charged_before = True, claim.cost.charged
        if (server := self._connection.server) and server.evicts and self._is_surely_ours(claim):
            with suppress(QueueUnavailable):  # later the claim may be another's; else the next renewal sets the mark
                await self._verbs.mark_begun(self._dispatcher.instance, claim.entry_id)
        now = self._clock()
        self._count_start(claim, now)
        self._estimates.started(claim.task, now)
        self._publish(
            claim, transitions.started(claim.task, attempts=checkpoint.attempts, starts=checkpoint.starts, now=now)
        )
        return StartResult.STARTED

    async def checkpoint(self, claim: Claim, checkpoint: Checkpoint) -> bool:
        """Write the progress of an attempt before its next paid call. Return False if the claim is lost."""
        await self._connection.recovered.wait()
        value = checkpoint.encode(claim.entry_id)
        if await self._connection.retry_until_available(self._write, claim, checkpoint, value) != b"":
            claim.mark_lost()
            return False
        self._record_checkpoint(claim, checkpoint, value)
        return True

    async def reserve_more(self, claim: Claim, amount: int, limits: Limits) -> bool | None:
        """Reserve more for the next call of a task; a checkpoint records it. Return None if the claim is lost.

        Return False if a budget is used up.
        """
        await self._connection.recovered.wait()
        cost = claim.cost
        checkpoint = replace(claim.checkpoint, owner=self._dispatcher.instance, cost=cost.with_more(amount))
        if claim.stored_bytes is None:
            checkpoint = replace(checkpoint, phase="waiting")  # nothing was begun
        value, expected = checkpoint.encode(claim.entry_id), claim.stored_bytes or b""
        while True:
            item = Extension(claim.task.id, expected, value, cost.day, amount, limits)
            reply = await self._connection.retry_until_available(self._verbs.reserve_more, item)
            if claim.lost or not claim.wrote(reply.existing):
                break
            expected = reply.existing
        if reply.reserved:
            self._record_checkpoint(claim, checkpoint, value)
            return True
        if not reply.existing:
            return False
        claim.mark_lost()
        return None

    async def record_job(self, claim: Claim, checkpoint: Checkpoint) -> bool:
        """Write a checkpoint with an accepted provider job; costs one command. Return False if the claim is lost."""
        await self._connection.recovered.wait()
        value = checkpoint.encode(claim.entry_id)
        if await self._connection.retry_until_available(self._write_job, claim, checkpoint, value) != b"":
            claim.mark_lost()
            return False
        self._record_checkpoint(claim, checkpoint, value)
        return True

    def count_lost_call(self, claim: Claim) -> None:
        """Count a call of another instance after a search that found no job."""
        self._meter.ambiguous += claim.checkpoint.owner != self._dispatcher.instance

    def progress(self, claim: Claim, percent: int) -> None:
        """Publish progress from memory; costs no command."""
        if not claim.lost:
            self._publish(
                claim, transitions.progressed(claim.task, percent, shown_images(claim.task, claim.checkpoint))
            )

    async def finish(self, claim: Claim, final: Task) -> Task:
        """Write a final task. Return the stored one, which is another's if that came first.

        The claim's slot is free from now on.
        """
        with self._verbs.end_marks.marked(final) as marked:
            return await self._finish(claim, marked)

    async def retry(self, claim: Claim, retry: Retry) -> None:
        """Keep the claim without a slot, and dispatch it again after the delay."""
        retry_at = self._clock() + retry.delay_s
        attempts = claim.checkpoint.attempts - (not retry.counts_as_attempt)
        checkpoint = replace(
            claim.checkpoint, phase="waiting", attempts=attempts, reason=retry.reason, retry_at=retry_at
        )
        if not await self.checkpoint(claim, checkpoint):
            claim.checkpoint = checkpoint
            await self.give_up(claim)
            return
        self._count_attempt(claim, "retry")
        self._estimates.ended(claim.task, None)
        waiting = transitions.requeued(claim.task, reason=retry.reason, retry_at=retry_at, attempts=attempts)
        self._publish(claim, waiting)
        self._dispatcher.leave_slot(claim)
        claim.timer = asyncio.get_running_loop().call_later(retry.delay_s, self._dispatcher.put, claim)

    def mark_waiting(self, claim: Claim, reason: WaitReason, retry_at: float) -> None:
        """Publish from memory that a task waits for its turn; costs no command."""
        if not claim.lost:
            self._publish(
                claim,
                transitions.requeued(claim.task, reason=reason, retry_at=retry_at, attempts=claim.checkpoint.attempts),
            )

    def stall(self, claim: Claim, reason: WaitReason | None, retry_at: float | None) -> None:
        """Publish from memory why a running attempt waits in its slot; None as reason: it continues."""
        if not claim.lost:
            self._publish(claim, transitions.stalled(claim.task, reason=reason, retry_at=retry_at))

    def park(self, claim: Claim, reason: WaitReason, retry_at: float, *, until: float) -> None:
        """Keep a claim without a slot until `resume`, or until it is dispatched again at that Unix time."""
        self.mark_waiting(claim, reason, retry_at)
        self._dispatcher.leave_slot(claim)
        delay_s = max(until - self._clock(), 0.0)
        claim.timer = asyncio.get_running_loop().call_later(delay_s, self._dispatcher.put, claim)

    def resume(self, claim: Claim) -> None:
        """Dispatch a parked claim to the next free slot."""
        if claim.timer is not None:
            claim.timer.cancel()
        claim.timer = None
        if not claim.lost:
            self._dispatcher.put(claim)

    async def release(self, claims: Sequence[Claim], *, leaving: bool = False) -> None:
        """Release claims, which wakes another instance at once, and give lost ones up.

        leaving: remove our consumer too.

        While claiming is paused no instance reads entries, so those with images that are paid for are left for a
        takeover when their lease ends.
        """
        for claim in claims:
            self._dispatcher.forget(claim)
        unread = leaving and self.is_paused
        ours = [claim for claim in claims if not (claim.lost or (unread and claim.checkpoint.is_paid))]
        calling = [claim for claim in ours if claim.checkpoint.calling and claim.stored_bytes is not None]
        self._meter.ambiguous += sum(claim.checkpoint.sent is None for claim in calling)  # else who searches counts
        await self._verbs.release(self._dispatcher.instance, [release_item(claim) for claim in ours], leaving=leaving)
        for claim in claims:
            if claim.lost:
                await self.give_up(claim)

    async def _finish(self, claim: Claim, final: Task) -> Task:
        """Finish with a marked task. An existing record with its mark is its own: the first reply was lost."""
        item = finish_item(claim.entry_id, final, claim.cost)
        self._dispatcher.end(claim)
        self._estimates.ended(final, self._clock() if final.state is State.COMPLETED else None)
        reply = await self._connection.retry_until_available(self._verbs.with_key_repair, self._verbs.finish, item)
        is_ours = not reply.existing
        if reply.existing:
            mark = final.counted_in
            _, final = decode_record(reply.existing)
            if is_ours := final.counted_in == mark:
                self._count_end(claim, final)
                _, _, log = await self._connection.retry_until_available(self._verbs.read, final.id)
                final = with_delivery_log(final, log)
            elif item.final.state is State.COMPLETED or claim.has_paid_call:
                count = await self._connection.retry_until_available(self.on_refused, claim)
                final = replace(final, possibly_billed_twice=max(final.possibly_billed_twice, count))
        else:
            final = as_stored(final, reply)
            self._count_end(claim, final)
        if final.state.is_final:
            self._dispatcher.forget(claim)
            self._task_cache.put(final)
        else:  # a new epoch; its record has no request, so a cached state is no worse
            self._dispatcher.drop(claim)
        if is_ours:
            self._task_cache.on_finished_here(final)
        return final

    async def _take_over(self, claim: Claim, existing: bytes) -> StartResult:
        """Continue from an existing checkpoint. A twice delivered entry goes back to the checkpoint's owner."""
        result = resume_from_existing(claim, existing)
        entry_id, checkpoint = decode_checkpoint(existing)
        if result is StartResult.LOST and entry_id == claim.entry_id and checkpoint.owner:
            await self._connection.retry_until_available(self._verbs.transfer_entry, checkpoint.owner, entry_id)
            self.on_transferred()
        return result

    def _record_checkpoint(self, claim: Claim, checkpoint: Checkpoint, value: bytes) -> None:
        claim.checkpoint = claim.stored_checkpoint = checkpoint
        claim.stored_bytes = value
        claim.written.add(hash(value.partition(b" ")[2]))

    def _count_start(self, claim: Claim, now: float) -> None:
        claim.began_at = time.monotonic()
        if claim.checkpoint.starts == 1:
            self._meter.waits.observe(max(now - claim.task.created_at, 0.0))

    def _count_attempt(self, claim: Claim, outcome: str) -> None:
        if claim.began_at is not None:
            self._meter.attempts[outcome].observe(time.monotonic() - claim.began_at)
            claim.began_at = None

    def _count_end(self, claim: Claim, final: Task) -> None:
        state = str(final.state)
        self._count_attempt(claim, state)
        self._meter.finished(state, final.error.code if final.error else "", final.model)
        if final.state is State.COMPLETED:
            self._meter.images_stored([image.size_bytes for image in final.images if not image.reused])

    def _publish(self, claim: Claim, task: Task) -> None:
        claim.task = task
        self._task_cache.put(task)

    async def _write(self, claim: Claim, checkpoint: Checkpoint, value: bytes) -> bytes | None:
        """Write a checkpoint in place of the stored one; an unreadable one, and an earlier one, is replaced too.

        Return `b''` if it was written, else the existing one; None if the claim is not ours. Raises QueueUnavailable.
        """
        expected = claim.stored_bytes
        while True:
            existing = await self._write_over(claim, checkpoint, value, expected)
            if not existing:
                return existing
            if not is_readable_checkpoint(existing):
                self._unreadable.report("checkpoint", claim.task.id, existing)
            elif claim.lost or not claim.wrote(existing):
                return existing  # else Redis has lost a later one, as in a failover
            expected = existing

    async def _write_job(self, claim: Claim, checkpoint: Checkpoint, value: bytes) -> bytes | None:
        """Write as `_write` does, without a comparison while no other instance can have taken the claim over."""
        if self._is_surely_ours(claim) and claim.stored_bytes is not None:
            item = CompareAndSetItem(claim.task.id, claim.stored_bytes, value)
            try:
                before = await self._verbs.replace_checkpoint(item)
            except ResponseError as error:
                if not wrong_type(error):
                    raise
            else:
                return b"" if claim.wrote(before) and not claim.lost else before
        return await self._write(claim, checkpoint, value)

    def has_lease(self, claim: Claim) -> bool:
        """Return whether the lease of a claim can't be over, as it may be after a pause of this process."""
        return time.monotonic() - claim.confirmed_at <= self._lease_s * SURE_SHARE

    async def renewed(self, claim: Claim) -> bool:
        """Wait until the lease of a claim is renewed. Return False if the claim is lost."""
        while not (claim.lost or self.has_lease(claim)):
            await self._dispatcher.renewals.wait()
        return not claim.lost

    def _is_surely_ours(self, claim: Claim) -> bool:
        """Return whether no other instance can have taken the claim over, nor written back that its task has ended."""
        is_settled = claim.confirmed_at >= self._connection.unsettled_until
        return self.has_lease(claim) and not claim.contested and is_settled

    async def _write_over(
        self, claim: Claim, checkpoint: Checkpoint, value: bytes, expected: bytes | None
    ) -> bytes | None:
        """Write as `_write` does. If the claim may be lost, Redis checks it first, since a paid call may follow."""
        task = claim.task
        if not self._is_surely_ours(claim):
            item = FencedStart(
                task.id,
                task.epoch,
                claim.entry_id,
                expected or b"",
                value,
                checkpoint.billed_again,
                checkpoint.cost or task.cost,
            )
            return await self._verbs.start_fenced(self._dispatcher.instance, item)
        if expected is None:
            try:
                return await self._verbs.create_checkpoint(task.id, value) or b""
            except ResponseError as error:
                if not wrong_type(error):
                    raise
                self._unreadable.report("checkpoint", task.id, "of another type")
        purpose = "start" if checkpoint.phase == "calling" else "retry"
        return await self._verbs.compare_and_set(CompareAndSetItem(task.id, expected or b"", value, purpose))


async def _count_nothing(_claim: Claim) -> int:
    return 0


def _ignore(_claim: Claim, _handle: JobHandle, _price: int) -> None:
    return
