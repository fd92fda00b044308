"""Owns the verbs of an attempt: claim, start, checkpoint, progress, and the ends finish, retry and drop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

from msgspec.structs import replace
from redis.exceptions import ResponseError

from imagegen.queue.claim import Claim, Start, adopt, handed_back, inherit
from imagegen.queue.connection import Connection
from imagegen.queue.holdings import Holdings
from imagegen.queue.items import FencedStart, SwapItem, finish_item, raised
from imagegen.queue.memory import Memory
from imagegen.queue.records import Run, decode_record, decode_run, readable_run, shown_images, with_hooks
from imagegen.queue.scripts import Scripts
from imagegen.queue.unreadable import wrong_type
from imagegen.tasks import task as edges
from imagegen.tasks.retry import Retry
from imagegen.tasks.task import Reason, State, Task

SURE_SHARE = 0.8
"""Of a lease: until this time after Redis confirmed a claim, no other instance can have taken it over."""


class Claims:
    """What the pool may say to the queue. Each verb waits for Redis where it is away.

    slots: claims that may be worked on at once; clock: Unix time. on_given: called when a claim went to its owner.
    """

    def __init__(
        self,
        connection: Connection,
        scripts: Scripts,
        memory: Memory,
        holdings: Holdings,
        *,
        lease_s: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._connection = connection
        self._scripts = scripts
        self._memory = memory
        self._holdings = holdings
        self._estimates = holdings.estimates
        self._meter = connection.meter
        self._lease_s = lease_s
        self._unreadable = scripts.unreadable
        self._clock = clock
        self.slots = holdings.slots
        self.claim = holdings.claim
        self.quiet = holdings.quiet
        self.drop = holdings.drop
        self.on_given: Callable[[], None] = lambda: None

    async def start(self, claim: Claim) -> Start:
        """Counts the attempt and sets the owner, before money is spent."""
        await self._connection.recovered.wait()
        run = replace(
            claim.run,
            owner=self._holdings.instance,
            phase="calling",
            starts=claim.run.starts + 1,
            attempts=claim.run.attempts + 1,
            started_at=claim.run.started_at or self._clock(),
            reason=None,
            retry_at=None,
        )
        value = run.encode(claim.entry_id)
        stands = await self._connection.until_back(self._write, claim, run, value)
        if stands is None:
            claim.lose()
            return Start.LOST
        if stands and claim.contested:  # its owner before started it after we took it over
            self._meter.ambiguous += inherit(claim, stands, 0.0, self._lease_s)
            return Start.ADOPTED
        if stands:
            return await self._adopt(claim, stands)
        self._wrote(claim, run, value)
        now = self._clock()
        self._count_start(claim, now)
        self._estimates.started(claim.task, now)
        self._publish(claim, edges.started(claim.task, attempts=run.attempts, starts=run.starts, now=now))
        return Start.STARTED

    async def checkpoint(self, claim: Claim, run: Run) -> bool:
        """Writes how far the attempt has come, before its next paid call. False: the claim is lost."""
        await self._connection.recovered.wait()
        value = run.encode(claim.entry_id)
        if await self._connection.until_back(self._write, claim, run, value) != b"":
            claim.lose()
            return False
        self._wrote(claim, run, value)
        return True

    def progress(self, claim: Claim, percent: int) -> None:
        """Something happened: told from memory, costs no command."""
        if not claim.lost:
            self._publish(claim, edges.progressed(claim.task, percent, shown_images(claim.task, claim.run)))

    async def finish(self, claim: Claim, final: Task) -> Task:
        """Writes a final task; returns the one that stands, which is another's where that came first.

        Its slot is free from now on.
        """
        item = finish_item(claim.entry_id, final)
        self._holdings.leave_slot(claim)
        self._estimates.ended(final, self._clock() if final.state is State.COMPLETED else None)
        answer = await self._connection.until_back(self._scripts.mended, self._scripts.finish, item)
        if answer.stands:
            _, final = decode_record(answer.stands)
        else:
            final = with_hooks(raised(final, answer), answer.hooks)
            self._count_end(claim, final)
        if final.state.final:
            self._holdings.let_go(claim)
            self._memory.put(final)
        else:  # a new generation; its record has no request, so it is no better than what may be known here of it
            self._holdings.drop(claim)
        if not answer.stands:
            self._memory.on_settled(final)
        return final

    async def retry(self, claim: Claim, retry: Retry) -> None:
        """Keeps the claim and holds no slot; the task is offered again when the delay is over."""
        retry_at = self._clock() + retry.delay_s
        attempts = claim.run.attempts - (not retry.counts)
        run = replace(claim.run, phase="waiting", attempts=attempts, reason=retry.reason, retry_at=retry_at)
        if not await self.checkpoint(claim, run):
            self.drop(claim)
            return
        self._count_attempt(claim, "retry")
        self._estimates.ended(claim.task, None)
        waiting = edges.waiting(claim.task, reason=retry.reason, retry_at=retry_at, attempts=attempts)
        self._publish(claim, waiting)
        self._holdings.leave_slot(claim)
        claim.timer = asyncio.get_running_loop().call_later(retry.delay_s, self._holdings.offer, claim)

    def defer(self, claim: Claim, reason: Reason, retry_at: float) -> None:
        """Its turn has not come, and it is not started: told from memory, costs no command."""
        if not claim.lost:
            self._publish(
                claim, edges.waiting(claim.task, reason=reason, retry_at=retry_at, attempts=claim.run.attempts)
            )

    def stall(self, claim: Claim, reason: Reason | None, retry_at: float | None) -> None:
        """Publish from memory why a begun attempt waits in its slot; no reason: it goes on."""
        if not claim.lost:
            self._publish(claim, edges.stalled(claim.task, reason=reason, retry_at=retry_at))

    def park(self, claim: Claim, reason: Reason, retry_at: float, *, until: float) -> None:
        """Defer a claim and hold no slot, until `resume`, or until it is offered again at that Unix time."""
        self.defer(claim, reason, retry_at)
        self._holdings.leave_slot(claim)
        delay_s = max(until - self._clock(), 0.0)
        claim.timer = asyncio.get_running_loop().call_later(delay_s, self._holdings.offer, claim)

    def resume(self, claim: Claim) -> None:
        """Offer a parked claim to the next free slot."""
        if claim.timer is not None:
            claim.timer.cancel()
        claim.timer = None
        if not claim.lost:
            self._holdings.offer(claim)

    async def hand_back(self, claims: Sequence[Claim], *, leaving: bool = False) -> None:
        """Gives claims back, which wakes another instance at once; leaving: this instance goes with them."""
        for claim in claims:
            self._holdings.let_go(claim)
        ours = [claim for claim in claims if not claim.lost]
        self._meter.ambiguous += sum(claim.run.calling and claim.stands is not None for claim in ours)
        await self._scripts.release(self._holdings.instance, [handed_back(claim) for claim in ours], leaving=leaving)

    async def _adopt(self, claim: Claim, stands: bytes) -> Start:
        """Look at the run that stands. An entry that was delivered twice goes back to the owner of the run."""
        adopted = adopt(claim, stands)
        entry_id, run = decode_run(stands)
        if adopted is Start.LOST and entry_id == claim.entry_id and run.owner:
            await self._connection.until_back(self._scripts.give_to, run.owner, entry_id)
            self.on_given()
        return adopted

    def _wrote(self, claim: Claim, run: Run, value: bytes) -> None:
        claim.run = claim.written = run
        claim.stands = value

    def _count_start(self, claim: Claim, now: float) -> None:
        claim.began_at = time.monotonic()
        if claim.run.starts == 1:
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
            self._meter.stored([image.size_bytes for image in final.images])

    def _publish(self, claim: Claim, task: Task) -> None:
        claim.task = task
        self._memory.put(task)

    async def _write(self, claim: Claim, run: Run, value: bytes) -> bytes | None:
        """Write a run in place of the one that we know; an unreadable one is replaced too.

        Return `b''` if it was written, else the run that is there; None if the claim is not ours.
        Raises QueueUnavailable.
        """
        known = claim.stands
        while True:
            stands = await self._write_over(claim, run, value, known)
            if not stands or readable_run(stands):
                return stands
            self._unreadable.report("run", claim.task.id, stands)
            known = stands

    async def _write_over(self, claim: Claim, run: Run, value: bytes, known: bytes | None) -> bytes | None:
        """Write as `_write` does. If the claim may be lost, Redis checks that it is ours: a paid call may follow."""
        task = claim.task
        if claim.contested or time.monotonic() - claim.confirmed_at > self._lease_s * SURE_SHARE:
            item = FencedStart(task.id, task.generation, claim.entry_id, known or b"", value, run.ambiguous)
            return await self._scripts.start_fenced(self._holdings.instance, item)
        if known is None:
            try:
                return await self._scripts.first_run((task.id, value)) or b""
            except ResponseError as error:
                if not wrong_type(error):
                    raise
                self._unreadable.report("run", task.id, "of another type")
        purpose = "start" if run.phase == "calling" else "retry"
        return await self._scripts.swap(SwapItem(task.id, known or b"", value, purpose))
