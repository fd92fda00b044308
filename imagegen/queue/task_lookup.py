"""Lookup of one task: from the cache if its state there is authoritative, else one shared read from Redis."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable

from loguru import logger

from imagegen.errors import InternalError, QueueUnavailable
from imagegen.queue.checkpoint import decode_checkpoint, owner_of, with_checkpoint
from imagegen.queue.codec import NewerRecord, UnreadableRecord, decode_record, with_delivery_log
from imagegen.queue.dispatcher import ClaimDispatcher
from imagegen.queue.interrupted import Interrupted
from imagegen.queue.notifier import Notifier
from imagegen.queue.queue_verbs import QueueVerbs
from imagegen.queue.task_cache import TaskCache
from imagegen.queue.verbs.read import TaskRows
from imagegen.tasks.task import TASK_ID, Task

TRUST_S = 10.0
"""Seconds after the last check in which a waiting task is answered from the cache."""

FINISHED_TRUST_S, UNINFORMED_TRUST_S = 600.0, 20.0
"""Seconds in which a finished task is answered from the cache, though a peer may have enqueued it again.

The peer publishes that, unless Redis refuses the channel. Where a message may be lost, `doubt_finished` is called.
"""

MAX_CONFIRMED = 10_000


class TaskLookup:
    """Lookup of tasks by id.

    Attributes:
        checked_at: Unix time of the last check that no other instance claims the tasks submitted here.
        missing: ids of cached unfinished tasks without a record in Redis.
        is_recovering: whether this instance or a peer is writing lost records back.

    Args:
        is_owned_elsewhere: returns whether another instance delivers the webhooks of a task, so has a newer record.
    """

    def __init__(
        self,
        verbs: QueueVerbs,
        task_cache: TaskCache,
        dispatcher: ClaimDispatcher,
        notifier: Notifier,
        *,
        is_owned_elsewhere: Callable[[Task], bool],
        interrupted: Interrupted,
    ) -> None:
        self._verbs = verbs
        self.task_cache = task_cache
        self.dispatcher = dispatcher
        self.notifier = notifier
        self._is_owned_elsewhere = is_owned_elsewhere
        self.interrupted = interrupted
        self._meter = verbs.meter
        self.is_recovering: Callable[[], bool] = lambda: False
        self.clock = verbs.clock
        self.checked_at = 0.0
        self.missing: set[str] = set()
        self._doubted_at = 0.0
        self._confirmed_at: OrderedDict[str, float] = OrderedDict()
        """Unix time of the last read of cached finished tasks, the latest last."""
        self._reading: dict[str, asyncio.Future[Task | None]] = {}

    async def get(self, task_id: str) -> Task | None:
        """Return a task, from the cache if it is ours or finished; None if it is unknown or expired."""
        task = self.authoritative_local(task_id) or self.finished(task_id)
        if task and not (task.state.is_final and self._is_owned_elsewhere(task)):
            return task
        if not TASK_ID.fullmatch(task_id):
            return None
        is_recent, task = self.task_cache.recent_remote(task_id, self.notifier.no_peers_since)
        if is_recent:
            return task
        reading = self._reading.get(task_id)
        if reading is None:
            reading = asyncio.ensure_future(self._read_later_than_cached(task_id))
            self._reading[task_id] = reading
            reading.add_done_callback(lambda _: self._reading.pop(task_id, None))
        return await asyncio.shield(reading)

    def cached(self, task_id: str) -> Task | None:
        """Return the task that `get` returns without a command of Redis, None if it needs one."""
        return (
            self.authoritative_local(task_id)
            or self.finished(task_id)
            or self.task_cache.recent_remote(task_id, self.notifier.no_peers_since)[1]
        )

    def finished(self, task_id: str) -> Task | None:
        """Return a cached finished task, None if a peer may have enqueued it again since it was read."""
        task = self.task_cache.finished(task_id)
        if task is None:
            return None
        since = max(task.finished_at or 0.0, self._confirmed_at.get(task_id, 0.0))
        trust_s = UNINFORMED_TRUST_S if self.notifier.silent else FINISHED_TRUST_S
        is_recent = since > self._doubted_at and self.clock() - since <= trust_s
        return task if is_recent or self.notifier.no_peers_since(since) else None

    def doubt_finished(self) -> None:
        """Read each cached finished task once more before it is used: messages about it may be lost."""
        self._doubted_at = self.clock()

    def _confirm(self, task_id: str) -> None:
        self._confirmed_at[task_id] = self.clock()
        self._confirmed_at.move_to_end(task_id)
        if len(self._confirmed_at) > MAX_CONFIRMED:
            self._confirmed_at.popitem(last=False)

    async def _read_later_than_cached(self, task_id: str) -> Task | None:
        """Return a task as Redis has it, or the cached end of it if Redis has no later state or can't be used."""
        cached = self.task_cache.finished(task_id)
        if cached is None or self._is_owned_elsewhere(cached):
            return await self.read(task_id)
        try:
            task = self.decode(task_id, await self._verbs.read(task_id))
        except QueueUnavailable:
            return cached
        if self.is_recovering():
            return cached  # it is to be written back, and may be a second result
        if task is not None and task.epoch > cached.epoch:
            self.task_cache.forget(task_id)
            return await self.read(task_id)
        self._confirm(task_id)
        if task is None or task.epoch < cached.epoch or not task.state.is_final:
            return cached  # Redis has lost it
        self.task_cache.store_from_redis(task_id, task)
        return task

    def may_be_outdated(self, task_id: str) -> bool:
        """Return whether `get` returns an unfinished task that another instance may have finished meanwhile."""
        if self.authoritative_local(task_id) or self.task_cache.finished(task_id):
            return False
        task = self.task_cache.recent_remote(task_id, self.notifier.no_peers_since)[1]
        return task is not None and not task.state.is_final

    def authoritative_local(self, task_id: str) -> Task | None:
        """Return an unfinished task that runs here or that no other instance can have claimed."""
        task = self.task_cache.live.get(task_id)
        if task is None or task_id in self.dispatcher.claimed:
            return task
        fresh = self.clock() - max(task.created_at, self.checked_at) <= TRUST_S
        return task if fresh and self.notifier.no_peers_since(task.created_at) else None

    def unclaimed(self) -> list[Task]:
        """Return cached unfinished tasks that do not run here."""
        return [task for task in self.task_cache.live.values() if task.id not in self.dispatcher.claimed]

    def possibly_stale_ids(self) -> list[str]:
        """Return tasks submitted here that another instance may have claimed, the oldest first."""
        sure, claimed = self.notifier.no_peers_since, self.dispatcher.claimed
        return [
            name for name, task in self.task_cache.live.items() if name not in claimed and not sure(task.created_at)
        ]

    async def fresh(self, task_id: str) -> Task | None:
        """Return a task in its present state, read from Redis if it is not ours; None if there is none.

        Raises QueueUnavailable, also while a peer may write the end of an unfinished task back.
        """
        task = self.authoritative_local(task_id)
        if task is not None or not TASK_ID.fullmatch(task_id):
            return task
        task = await self.read(task_id)
        if task is not None and not task.state.is_final and self.is_recovering():
            raise QueueUnavailable(headers={"Retry-After": "2"})
        return task

    async def read(self, task_id: str) -> Task | None:
        """Return a task as Redis has it, regardless of the cache."""
        rows = await self._verbs.read(task_id)
        if owner := owner_of(rows[1]):
            await self.notifier.get_to_know(owner)
        task = self.decode(task_id, rows)
        if task is None and (cached := self.task_cache.live.get(task_id)) is not None:
            self.missing.add(task_id)
            return cached
        if task is None and self.is_recovering():
            raise QueueUnavailable(headers={"Retry-After": "2"})  # a peer may not have written it back yet
        if task is None:
            self._meter.vanished += self.task_cache.vanished(task_id)
        elif not task.state.is_final:
            task = await self.interrupted.ended(task)
        if task is not None and task.state.is_final:
            if self.is_recovering() and self.task_cache.finished(task_id):
                return task  # the cached one is to be written back, and may be a second result
            self._confirm(task_id)
        self.task_cache.store_from_redis(task_id, task)
        return task

    def decode(self, task_id: str, rows: TaskRows) -> Task | None:
        """Return the task of stored rows; None without a readable record, which the next submit replaces.

        Raises QueueUnavailable.
        """
        record, stored, log = rows
        if record is None:
            return None
        try:
            head, task = decode_record(record)
        except NewerRecord as error:
            raise newer_version_error(task_id) from error
        except UnreadableRecord as error:
            self._verbs.unreadable.report("record", task_id, error)
            return None
        task = with_delivery_log(task, log)
        return task if task.state.is_final or stored is None else self._with_stored(task, head.entry_id, stored)

    def _with_stored(self, task: Task, entry_id: str, stored: bytes) -> Task:
        """Return an unfinished task with its stored checkpoint; unchanged if that is of another entry or unreadable."""
        try:
            started_entry, checkpoint = decode_checkpoint(stored)
        except UnreadableRecord as error:
            self._verbs.unreadable.report("checkpoint", task.id, error)
            return task
        if started_entry != entry_id:
            return task
        if not self.notifier.may_live(checkpoint.owner):
            checkpoint = checkpoint.without_owner()
        return with_checkpoint(task, checkpoint)


def newer_version_error(task_id: str) -> QueueUnavailable:
    """Return the error for a task of a newer version: after a retry the client reaches an instance that reads it."""
    logger.bind(taskId=task_id).info("A newer version of this service wrote this task")
    return QueueUnavailable(headers={"Retry-After": "2"})


def check_digest(task: Task, digest: str) -> None:
    """Raise InternalError if another request has the same id: MD5 is not trusted."""
    if task.digest != digest:
        logger.bind(taskId=task.id).error("Two different requests have this id")
        raise InternalError
