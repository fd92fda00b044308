"""Cancels of tasks: the task ends at once, then its provider job, and what that saves is taken back."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from loguru import logger
from msgspec import Struct
from msgspec.structs import replace

from imagegen.errors import QueueUnavailable
from imagegen.queue.checkpoint import decode_checkpoint, is_readable_checkpoint
from imagegen.queue.claim import Claim
from imagegen.queue.codec import NewerRecord, UnreadableRecord, broadcast_record, decode_entry, decode_record
from imagegen.queue.joined_clients import JoinedClients
from imagegen.queue.queue_verbs import QueueVerbs
from imagegen.queue.task_lookup import TaskLookup
from imagegen.queue.verbs.cancel import CancelledTask, KnownProgress
from imagegen.tasks import transitions
from imagegen.tasks.cost import UNKNOWN
from imagegen.tasks.provider_job import JobHandle
from imagegen.tasks.task import IN_LINE, State, Task

UPSTREAM_S = 3.0
"""How long the provider may take to confirm a cancel. The slot of the task is free before that."""

_T = TypeVar("_T")


class CancelResult(Struct, frozen=True, gc=False):
    """A task after a cancel, None if it is unknown. left: it goes on for its other clients."""

    task: Task | None
    left: bool = False


class TaskCanceller:
    """Cancels of one instance.

    Attributes:
        cancel_upstream: requests the end of a provider job; returns True if the provider confirmed it.
        lists_jobs: returns whether a task may find a job of a channel in the provider's list.
        on_left: called with each task that was cancelled here, as soon as that is stored.
        on_ended: called with such a task once its cost is final.
        on_taken_back: called with a task, if another instance may have counted its cost, and the amount.
        on_missing_record: awaited before a task is cancelled of which Redis has lost the record.
    """

    def __init__(self, verbs: QueueVerbs, lookup: TaskLookup, joined: JoinedClients) -> None:
        self._verbs = verbs
        self._joined = joined
        self._lookup = lookup
        self._task_cache, self._dispatcher = lookup.task_cache, lookup.dispatcher
        self._notifier = lookup.notifier
        self._running: set[asyncio.Future[Any]] = set()
        self.cancel_upstream: Callable[[JobHandle], Awaitable[bool | None]] = _unknown
        self.lists_jobs: Callable[[str], bool] = lambda _channel: False
        self.on_left: Callable[[Task], None] = lambda _task: None
        self.on_ended: Callable[[Task], None] = lambda _task: None
        self.on_taken_back: Callable[[Task, int], None] = lambda _task, _amount: None
        self.on_missing_record: Callable[[], Awaitable[None]] = _do_nothing

    async def cancel(self, task_id: str, client: str = "") -> CancelResult:
        """Cancel a task that is not finished, or leave it if it has other clients. client: '' to cancel for all.

        A running call is dropped: here now, on another instance when it receives the message. It goes on if the
        client does not wait for it.
        """
        return await asyncio.shield(self._begin(self._cancel(task_id, client)))

    def cancel_late(self, claim: Claim, handle: JobHandle, price: int) -> None:
        """Cancel a job of a claim that was lost, or ended without its images, as by a cancel or the deadline.

        It is kept for a task that goes on, or was submitted again, if that has it in its checkpoint, or may find it in
        the provider's list.

        price: of its call, as the task's cost had it in `calling`.
        """
        _ = self._begin(self._cancel_late(claim, handle, price))

    async def close(self) -> None:
        """Wait for the cancels that still run."""
        if self._running:
            await asyncio.wait(self._running, timeout=UPSTREAM_S)

    def _begin(self, work: Coroutine[Any, Any, _T]) -> asyncio.Future[_T]:
        """Begin work that goes on if its caller is cancelled."""
        running = asyncio.ensure_future(work)
        self._running.add(running)
        running.add_done_callback(self._running.discard)
        running.add_done_callback(_mark_retrieved)
        return running

    async def _cancel_late(self, claim: Claim, handle: JobHandle, price: int) -> None:
        try:
            stored, value, _ = await self._verbs.read(claim.task.id)
            task = decode_record(stored)[1] if stored else None
        except (NewerRecord, UnreadableRecord, QueueUnavailable):
            return
        if task is None or task.epoch < claim.task.epoch:
            return
        if task.state is not State.CANCELLED or task.epoch > claim.task.epoch:
            if task.state.is_final or not (self.lists_jobs(handle.channel) or _has_job(value, handle)):
                await self._request_cancel(handle)  # its price stays charged
            return
        with suppress(QueueUnavailable):
            if (ended := await self._cancel_job(CancelledTask(task, handle, price))) is not task:
                self.on_taken_back(ended, max(price, 0))

    async def _cancel(self, task_id: str, client: str) -> CancelResult:
        has_waited = False
        while (task := await self._lookup.fresh(task_id)) is not None and not task.state.is_final:
            if not task.request_json:
                task = await self._with_request(task)
            final = transitions.cancelled(task, now=self._verbs.clock(), ttl_s=self._verbs.result_ttl_s)
            by = self._joined.cancel_by(task, client)
            with self._verbs.end_marks.marked(final) as marked:
                ended = await self._verbs.cancel(marked, task.entry_id, self.known_progress(task), by=by)
                if ended is not None and not ended.left:
                    return CancelResult(await self._end(task, ended))
            if ended is not None:
                self._joined.left(task, published=ended.published)
                return CancelResult(task, left=True)
            if not has_waited and await self._is_lost(task_id):
                has_waited = True
                await self.on_missing_record()
                continue
            self._task_cache.forget(task_id)
        return CancelResult(task)

    async def _is_lost(self, task_id: str) -> bool:
        """Return whether Redis has no record of a task that this instance, which alone has it, will write back."""
        return task_id in self._task_cache.live and (await self._verbs.read(task_id))[0] is None

    async def _end(self, task: Task, ended: CancelledTask) -> Task:
        """Announce the end of a task, then cancel its provider job. Return the task as stored then."""
        self._left(task, ended.task)
        try:
            final = await self._cancel_job(ended)
        except QueueUnavailable:
            final = ended.task
        self.on_ended(final)
        return final

    def _left(self, task: Task, final: Task) -> None:
        """Announce the end of a task, here and to the other instances."""
        self._verbs.meter.finished(final.state.value, "", final.model)
        self._dispatcher.mark_finished_elsewhere(final)
        self._dispatcher.estimates.waiting.remove(task.entry_id)
        self._task_cache.put(final)
        self.on_left(final)
        self._publish(final)

    async def _cancel_job(self, ended: CancelledTask) -> Task:
        """Cancel the provider job of a task. Return the task as stored then."""
        handle, task = ended.handle, ended.task
        if handle is None or await self._request_cancel(handle) is not True:
            return task
        cost = task.cost and task.cost.taken_back(ended.price)
        final = replace(task, cancelled_upstream=True, cost=cost, sequence=task.sequence + 1)
        amount = 0 if ended.price == UNKNOWN else ended.price
        if not await self._verbs.take_back(final, amount):
            return task
        self._task_cache.put(final)
        self._publish(final)
        return final

    async def _request_cancel(self, handle: JobHandle) -> bool | None:
        try:
            async with asyncio.timeout(UPSTREAM_S):
                return await self.cancel_upstream(handle)
        except TimeoutError:
            logger.warning("The provider did not answer the cancel of its job {}", handle.id)
            return None

    def _publish(self, final: Task) -> None:
        self._notifier.publish("change", record=broadcast_record(final).decode())

    def known_progress(self, task: Task) -> KnownProgress | None:
        """Return the progress of a task that runs here; None if another instance may run it."""
        claim = self._dispatcher.claimed.get(task.id)
        if claim is None or claim.task.epoch != task.epoch or claim.lost:
            return None
        return KnownProgress(claim.stored_bytes or b"", claim.cost)

    async def _with_request(self, task: Task) -> Task:
        """Return the task with its request: from memory if it was submitted here, else from its entry or line."""
        cached = self._task_cache.live.get(task.id)
        if cached is not None and cached.epoch == task.epoch and cached.request_json:
            return replace(task, request_json=cached.request_json)
        if task.entry_id == IN_LINE:
            entry = await self._verbs.read_in_line(task)
            return task if entry is None else replace(task, request_json=decode_entry(entry).request_json)
        fields = await self._verbs.read_entry(task.entry_id) if task.entry_id else None
        return task if fields is None else replace(task, request_json=decode_entry(fields).request_json)


def _has_job(value: bytes | None, handle: JobHandle) -> bool:
    """Return whether a stored checkpoint has a job: the reply to its write may be lost, and another instance waits."""
    job = decode_checkpoint(value)[1].job if value and is_readable_checkpoint(value) else None
    return job is not None and job.handle.id == handle.id


async def _unknown(_handle: JobHandle) -> bool | None:
    return None


def _mark_retrieved(work: asyncio.Future[Any]) -> None:
    """Read the error of work with a caller that may be cancelled, so that it is not reported as unread."""
    if not work.cancelled():
        work.exception()


async def _do_nothing() -> None:
    return
