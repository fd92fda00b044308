"""Client side of the queue: submit, add webhooks, cancel, and the position of a task. See worker_queue for claims."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from enum import StrEnum
from functools import partial
from typing import Any

from loguru import logger
from msgspec import Struct
from msgspec.structs import replace

from imagegen.errors import BudgetExceeded, InternalError, PriceUnknown, QueueFull, QueueUnavailable, TooManyOpenTasks
from imagegen.formats import rfc3339
from imagegen.queue.canceller import CancelResult, TaskCanceller
from imagegen.queue.checkpoint import calls_under_way
from imagegen.queue.codec import MAX_SKEW_S, decode_record
from imagegen.queue.eta import UNKNOWN_POSITION, QueuePosition
from imagegen.queue.families import FamiliesWithImages
from imagegen.queue.idempotency import IdempotencyKeys
from imagegen.queue.joined_clients import JoinedClients
from imagegen.queue.line_mover import LineMover
from imagegen.queue.notifier import FRESH
from imagegen.queue.open_tasks import OpenTasks
from imagegen.queue.outbox import Outbox
from imagegen.queue.preview import SubmitPreview
from imagegen.queue.queue_verbs import QueueVerbs
from imagegen.queue.task_list import TaskList
from imagegen.queue.task_lookup import check_digest, newer_version_error
from imagegen.queue.verbs.budget_counters import BudgetLimits, Limits
from imagegen.queue.verbs.cancel import cost_at
from imagegen.queue.verbs.submit import SubmitReply
from imagegen.redis_client.connection import CLOCK_TOLERANCE_S
from imagegen.tasks import transitions
from imagegen.tasks.cost import day_end, day_of
from imagegen.tasks.family import ReusedImages, ReuseImages
from imagegen.tasks.image import StoredImage
from imagegen.tasks.submission import Submission
from imagegen.tasks.task import FINAL_OFFSET, IN_LINE, State, Task, WaitReason
from imagegen.tasks.webhook import initial_deliveries

POSITIONS_MAX_AGE_S, POSITIONS_AGE_PER_LINE_S = 10.0, 0.25
"""Positions are read again after this time: a longer one with over 40 lines, since each costs a command."""


class _FirstCancelled(Exception):
    """The submit that others waited for was cancelled; it may have stored the task or not."""


_OF_ONE_CLIENT = (_FirstCancelled, BudgetExceeded, PriceUnknown, TooManyOpenTasks)
"""Failures that concern one client only: an equal submit of another one, with other budgets, may succeed."""


class CacheResult(StrEnum):
    """Result of a submit's lookup; the values are those of the `X-Cache` header."""

    MISS = "MISS"
    COALESCED = "COALESCED"
    HIT = "HIT"
    REFRESH = "REFRESH"


class SubmitResult(Struct, frozen=True, gc=False):
    task: Task
    cached: CacheResult


class ClientQueue:
    """Tasks as clients see them, the idempotency keys of clients, and the list of tasks for operators.

    clock: Unix time of the Redis server, which measures ages of tasks, since this machine's clock may jump.
    on_missing_entry: awaited before an unfinished task without an entry is queued again.
    limits: of budgets. open_tasks: limit of a client's unfinished tasks."""

    def __init__(
        self,
        verbs: QueueVerbs,
        mover: LineMover,
        outbox: Outbox,
        idempotency: IdempotencyKeys,
        listing: TaskList,
        *,
        families: FamiliesWithImages,
    ) -> None:
        lookup = mover.lookup
        self.idempotency, self.listing = idempotency, listing
        self._lookup, self._outbox, self._families = lookup, outbox, families
        self._mover, self._lines = mover, verbs.lines
        self._verbs, self._submits = verbs, verbs.meter.submits
        self._task_cache, self._dispatcher, self._notifier = lookup.task_cache, lookup.dispatcher, lookup.notifier
        self._estimates = lookup.dispatcher.estimates
        self.result_ttl_s = verbs.result_ttl_s
        self.clock = verbs.clock
        self._positions_read_at, self._reading_positions = 0.0, asyncio.Lock()
        self._submitting: dict[str, list[asyncio.Future[SubmitResult]]] = {}
        self.on_missing_entry: Callable[[], Awaitable[None]] = _do_nothing
        self.limits = BudgetLimits()
        self.open_tasks: OpenTasks | None = None
        self.joined = JoinedClients(verbs, lookup.notifier)
        self.canceller = TaskCanceller(verbs, lookup, self.joined)
        self.preview = SubmitPreview(verbs, mover, families)

    def limits_of(self, client: str) -> Limits:
        """Return the budgets that a client's tasks count against, by the name of its key."""
        return self.limits.of_clients.get(client, self.limits.of_others)

    def get(self, task_id: str) -> Coroutine[Any, Any, Task | None]:
        """Return a task, at most some seconds old; None if it is unknown or expired. Raises QueueUnavailable."""
        return self._lookup.get(task_id)

    def fresh(self, task_id: str) -> Coroutine[Any, Any, Task | None]:
        """Return a task in its present state, None if there is none. Raises QueueUnavailable."""
        return self._lookup.fresh(task_id)

    def read(self, task_id: str) -> Coroutine[Any, Any, Task | None]:
        """Return a task as Redis has it, None if it has none. Raises QueueUnavailable."""
        return self._lookup.read(task_id)

    @property
    def has_peers(self) -> bool:
        """Whether there may be other instances."""
        return not self._notifier.alone

    def was_interrupted(self, task: Task) -> bool:
        """Return whether a task was unfinished when the last other instance left, or this one started alone.

        A client that waited for it there has lost its connection.
        """
        since = self._notifier.alone_since
        is_interruption = self._notifier.alone and task.created_at < since
        return is_interruption and (task.finished_at is None or task.finished_at > since)

    def cached(self, task_id: str) -> Task | None:
        """Return the task that `get` returns without a Redis command, None if it needs one."""
        return self._lookup.cached(task_id)

    def may_be_outdated(self, task_id: str) -> bool:
        """Return whether `get` returns an unfinished task that another instance may have finished meanwhile."""
        return self._lookup.may_be_outdated(task_id)

    async def submit(self, submission: Submission, reuse: ReuseImages | None = None) -> SubmitResult:
        """Enqueue a task, join the unfinished one or return the finished one; a failed task is enqueued again.

        reuse: takes images of finished tasks that differ only in `n`; None to generate all.
        Raises QueueFull, QueueUnavailable, StoreUnavailable, BudgetExceeded, PriceUnknown, TooManyOpenTasks; nothing
        is stored then.
        """
        submitted = self._from_cache(submission)
        if submitted is None:
            first = await self._inflight_submit(submission.task_id) if submission.task_id in self._submitting else None
            if first is None:
                submitted = await self._enqueue(submission, reuse=reuse)
            else:
                check_digest(first.task, submission.digest)
                submitted = first if first.cached is CacheResult.HIT else replace(first, cached=CacheResult.COALESCED)
        self._submits[submitted.cached] += 1
        return submitted

    def cancelled_refresh(self, task_id: str) -> Task | None:
        """Return a cached task that still has its images from before a fresh generation, which was cancelled."""
        task = self._task_cache.finished(task_id) if task_id in self._task_cache.finished_tasks else None
        return task if task is not None and task.stale_images else None

    async def replace(
        self, submission: Submission, finished: Task, reuse: ReuseImages | None = None, *, keep: bool
    ) -> SubmitResult:
        """Enqueue a finished task again under its id, or join it if another submit did. Raises as `submit` does.

        keep: whether its images stay, marked as stale, until the new ones are stored.
        """
        if (first := await self._inflight_submit(submission.task_id)) is not None:
            submitted = replace(first, cached=CacheResult.COALESCED)
        else:
            submitted = await self._enqueue(submission, finished, keep=keep, reuse=reuse)
        self._submits[submitted.cached] += 1
        return submitted

    async def add_webhooks(self, submission: Submission, submitted: SubmitResult) -> SubmitResult:
        """Add a submit's webhooks to the task that it joined; those of a finished task are called now.

        Raises InvalidRequest if the task has too many, QueueUnavailable.
        """
        if submitted.cached in (CacheResult.MISS, CacheResult.REFRESH):
            return submitted
        while True:
            rows = await self._verbs.read(submitted.task.id)
            task = self._lookup.decode(submitted.task.id, rows)
            if task is None:
                raise QueueUnavailable(headers={"Retry-After": "2"})
            task = await self._outbox.add_webhooks(task, rows[2], submission.webhooks)
            if task is not None:
                break
        if task.state.is_final:
            self._notifier.publish(FRESH, ids=[task.id])
        return submitted

    async def join(self, task: Task, client: str, *, has_webhook: bool = False) -> bool:
        """Count a client of an unfinished task. Return False if the task is over; then submit again."""
        if await self.joined.join(task, client, has_webhook=has_webhook):
            return True
        self._task_cache.forget(task.id)
        return False

    async def cancel(self, task_id: str) -> Task | None:
        """Cancel an unfinished task for all of its clients. Return its state afterwards, None if it is unknown."""
        return (await self.canceller.cancel(task_id)).task

    async def cancel_by(self, client: str, task_id: str) -> CancelResult:
        """Cancel an unfinished task, or leave it if it has other clients than this one."""
        return await self.canceller.cancel(task_id, client)

    async def position(self, task: Task) -> QueuePosition:
        """Return the position of an unfinished task: exact without peers, else some seconds old."""
        if task.state.is_final:
            return UNKNOWN_POSITION
        waiting = self._estimates.waiting
        doubtful = waiting.vague or waiting.read_at < self._notifier.alone_since
        if doubtful:
            max_age_s = max(POSITIONS_MAX_AGE_S, POSITIONS_AGE_PER_LINE_S * len(self._mover.lines))
            try:
                await self.refresh_positions(max_age_s)
            except QueueUnavailable:
                logger.debug("The positions of waiting tasks can't be read from Redis now")
        position = await self._mover.position(task, len(waiting)) if task.entry_id == IN_LINE else None
        return self._estimates.position_of(task, self.clock(), 1 + len(self._notifier.peers), position)

    async def refresh_positions(self, max_age_s: float = 0.0) -> None:
        """Read which entries wait, unless they were read in the last `max_age_s` seconds; a read under way is awaited.

        Raises QueueUnavailable.
        """
        async with self._reading_positions:
            if (now := self.clock()) - self._positions_read_at >= max_age_s:
                self._positions_read_at = now
                entries = await self._verbs.list_waiting()
                self._estimates.waiting.replace(entries.ids, now, behind=entries.behind, last=entries.last)
                await self._mover.read_all()

    def _from_cache(self, submission: Submission) -> SubmitResult | None:
        task_id, cached = submission.task_id, CacheResult.COALESCED
        task = self._lookup.authoritative_local(task_id) if task_id in self._task_cache.live else None
        if task is None:
            task = self._lookup.finished(task_id) if task_id in self._task_cache.finished_tasks else None
            cached = CacheResult.HIT
            if task is None or task.state is not State.COMPLETED:
                return None
        check_digest(task, submission.digest)
        return SubmitResult(task, cached)

    async def _enqueue(
        self,
        submission: Submission,
        replaced: Task | None = None,
        *,
        keep: bool = False,
        reuse: ReuseImages | None = None,
    ) -> SubmitResult:
        now, limits = self.clock(), self.limits_of(submission.client)
        task = self._task(submission, replaced.images if replaced and keep else (), limits, now)
        waiters: list[asyncio.Future[SubmitResult]] = []
        self._submitting[task.id] = waiters
        in_line = None
        try:
            in_line = await self._mover.begin_submit(task.client) if task.client else None
            if in_line:
                task = replace(task, entry_id=IN_LINE)
            store = partial(self._store, submission, task, replaced, reuse, limits)
            if self.open_tasks is None or not submission.client:
                submitted, _ = await store()
            else:
                submitted = await self.open_tasks.counted(submission.client, task.id, store)
        except BaseException as error:
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_exception(error if isinstance(error, Exception) else _FirstCancelled())
            raise
        finally:
            del self._submitting[task.id]
            if in_line is not None:
                self._lines.end_submit(task.client, in_line=in_line)
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(submitted)
        return submitted

    async def _store(
        self,
        submission: Submission,
        task: Task,
        replaced: Task | None,
        reuse: ReuseImages | None,
        limits: Limits,
    ) -> tuple[SubmitResult, bool]:
        """Return the result of a submit, and whether the task was stored by it."""
        replaced_epoch = replaced.epoch if replaced else None
        family, reused = submission.family if reuse else None, ReusedImages()
        is_limited = submission.max_micro_usd is not None and submission.may_cost_too_much
        if is_limited:
            reused = await self.preview.reused_within_limit(submission, reuse)
        elif replaced and reuse and family and not task.stale_images:
            reused = await reuse(task.id, family, [replaced])  # those that are not gone
        if is_limited or reused.images:
            missing = submission.wanted - len(reused.images)
            task, reply = await self._submit_reused(task, reused, missing, replaced_epoch, limits)
        else:
            siblings, own = self._siblings(submission) if family else (), family is not None
            reply = await self._verbs.submit(task, replaced_epoch, siblings, limits, with_own_images=own)
        if reply.kind == "siblings" and reuse and family:
            finished = [decode_record(row)[1] for row in reply.siblings]
            reused = await reuse(task.id, family, [other for other in finished if not other.stale_images])
            missing = family.request.n - len(reused.images)
            task, reply = await self._submit_reused(task, reused, missing, replaced_epoch, limits)
        if reply.kind == "gone" and not task.state.is_final:
            task, reply = await self._submit_gone(task, reply, limits)
        if reply.kind in ("new", "again"):
            return self._on_stored(task, reply), True
        return self._on_existing(submission, reply), False

    def _siblings(self, submission: Submission) -> tuple[str, ...]:
        """Return the ids of the tasks to read images from; none if certainly none of them is finished."""
        if submission.family is None or not submission.has_siblings:
            return ()
        if not self._families.may_include(submission.request_json, submission.scope):
            return ()
        return submission.family.sibling_ids()

    async def _submit_reused(
        self, task: Task, reused: ReusedImages, missing: int, replaced_epoch: int | None, limits: Limits
    ) -> tuple[Task, SubmitReply]:
        """Store a task that has images before its first call: as a completed one if none is missing.

        Images of other tasks cost nothing.
        """
        wanted = len(reused.images) + missing
        cost = task.cost and task.cost.for_part(missing, wanted).held_by(task.cost.slots, task.cost.day)
        if missing:
            task = replace(task, cost=cost)
            if reused.images:
                task = replace(task, images=reused.images, stale_images=False)
            return task, await self._verbs.submit(task, replaced_epoch, limits=limits)
        now, ttl_s = self.clock(), self.result_ttl_s
        task = replace(task, deliveries=(), cost=cost and cost.ended())
        task = transitions.completed(task, reused.images, reused.warnings, now=now, ttl_s=ttl_s)
        return task, await self._verbs.complete(task, replaced_epoch)

    async def _submit_gone(self, task: Task, reply: SubmitReply, limits: Limits) -> tuple[Task, SubmitReply]:
        """Enqueue a task again that has no entry, unless its owner restores it.

        A call that was in flight on a lost instance may be paid twice. The new epoch takes over what the old one has
        cost.
        """
        await self.on_missing_entry()
        head, lost = decode_record(reply.existing)
        (checkpoint,) = await self._verbs.read_checkpoints([task.id])
        cost = cost_at(checkpoint or b"", head.entry_id, lost.cost)
        task = replace(task, possibly_billed_twice=calls_under_way(checkpoint))
        if cost is not None and task.cost is not None:
            carried = cost.carried_into(task.cost)
            task = replace(task, cost=carried.held_by(carried.slots, carried.day))
        return task, await self._verbs.submit(task, head.epoch, limits=limits, replaced_cost=cost)

    async def _inflight_submit(self, task_id: str) -> SubmitResult | None:
        """Return the result of the submit of this task that is in flight.

        Return None if there is none, or if it failed by what concerns its own client alone.
        """
        while (waiters := self._submitting.get(task_id)) is not None:
            waiter: asyncio.Future[SubmitResult] = asyncio.get_running_loop().create_future()
            waiters.append(waiter)
            try:
                return await waiter
            except _OF_ONE_CLIENT:
                continue
        return None

    def _task(self, submission: Submission, stale: tuple[StoredImage, ...], limits: Limits, now: float) -> Task:
        epoch, cost = int(now * 1e6), submission.cost
        if cost is not None and submission.max_micro_usd is not None:
            cost = replace(cost, most=submission.max_micro_usd)
        if limits and cost is not None:
            cost = cost.held_by(tuple([slot for slot, _ in limits]), day_of(now))
        return Task(
            submission.task_id,
            epoch,
            epoch,
            submission.digest,
            submission.model,
            submission.request_json,
            now,
            reason=WaitReason.QUEUED,
            images=stale,
            stale_images=bool(stale),
            deliveries=initial_deliveries(submission.webhooks) if submission.webhooks else (),
            client=submission.client,
            scope=submission.scope,
            cost=cost,
            sandbox=submission.sandbox,
            submitter=submission.submitter,
        )

    def _on_stored(self, task: Task, reply: SubmitReply) -> SubmitResult:
        """Return the result of a submit that stored its task."""
        epoch = reply.epoch
        if task.state.is_final:
            task = replace(task, epoch=epoch, sequence=epoch + FINAL_OFFSET)
            self._task_cache.put(task)
            self._families.add(task)
            if reply.kind == "again":
                self._notifier.publish(FRESH, ids=[task.id])
            return SubmitResult(task, CacheResult.HIT)
        task = replace(task, epoch=epoch, sequence=epoch, entry_id=reply.entry_id)
        is_in_stream = bool(reply.entry_id) and reply.entry_id != IN_LINE
        skew_s = abs(task.created_at - reply.added_at) if is_in_stream else 0.0
        if skew_s > CLOCK_TOLERANCE_S and reply.entry_id.endswith("-0"):  # else the server's clock may have gone back
            self.clock.learn(reply.added_at)
        if skew_s > MAX_SKEW_S:
            task = replace(task, created_at=reply.added_at)
        if self._task_cache.put(task) and is_in_stream and task.id not in self._dispatcher.claimed:
            self._estimates.waiting.add(task.entry_id)
        if task.client and is_in_stream:
            self._lines.submitted(task)
        if reply.kind == "again":
            self._notifier.publish(FRESH, ids=[task.id])
        return SubmitResult(task, CacheResult.REFRESH if task.stale_images else CacheResult.MISS)

    def _on_existing(self, submission: Submission, reply: SubmitReply) -> SubmitResult:
        if reply.kind == "full":
            self._submits["FULL"] += 1
            raise QueueFull(headers={"Retry-After": "10"})
        if reply.kind == "budget":
            self._submits["OVER_BUDGET"] += 1
            if submission.cost is None or submission.cost.estimated is None:
                raise PriceUnknown(model=submission.model)
            self._verbs.budgets.on_refused(submission.client)
            raise BudgetExceeded(resets_at=rfc3339(day_end(self.clock())))
        if reply.kind == "newer":
            raise newer_version_error(submission.task_id)
        if reply.kind not in ("known", "gone"):
            logger.bind(taskId=submission.task_id).error("Redis has another record under this task id: {}", reply.kind)
            raise InternalError
        _, task = decode_record(reply.existing)
        check_digest(task, submission.digest)
        self._task_cache.store_from_redis(task.id, task)
        return SubmitResult(task, CacheResult.HIT if task.state.is_final else CacheResult.COALESCED)


async def _do_nothing() -> None:
    return
