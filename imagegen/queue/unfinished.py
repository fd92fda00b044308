"""Unfinished tasks of all instances: from memory, and those of the others from the stream now and then."""

from __future__ import annotations

import math
import time
from itertools import islice
from typing import Any, NamedTuple

from loguru import logger
from msgspec.structs import replace

from imagegen.errors import QueueUnavailable
from imagegen.queue.codec import NewerRecord, UnreadableRecord, decode_entry
from imagegen.queue.dispatcher import ClaimDispatcher
from imagegen.queue.notifier import Notifier
from imagegen.queue.task_cache import TaskCache
from imagegen.redis_client.connection import Connection
from imagegen.redis_client.keys import GROUP, Keys
from imagegen.redis_client.redis_errors import RedisError
from imagegen.tasks.task import State, Task

READ_COUNT = 200
MIN_READ_INTERVAL_S = 5.0


class UnfinishedTask(NamedTuple):
    """Unfinished task, and the instance that runs it.

    instance: that has the task's claim, empty if it waits or is unknown.
    """

    task: Task
    instance: str = ""


class UnfinishedTasks:
    """Tasks that wait or run. Without peers they are read once, to learn of those before the start of this process."""

    def __init__(
        self, connection: Connection, keys: Keys, task_cache: TaskCache, dispatcher: ClaimDispatcher, notifier: Notifier
    ) -> None:
        self._connection = connection
        self._stream = keys.stream
        self._task_cache = task_cache
        self._dispatcher = dispatcher
        self._notifier = notifier
        self._in_stream: dict[str, UnfinishedTask] = {}
        self._read_at = -math.inf

    async def list(self, limit: int) -> list[UnfinishedTask]:
        """Return at most `limit` tasks: first those that have a claim here, then by the time of their submit."""
        await self._refresh()
        ours = self._dispatcher.instance
        claimed = (UnfinishedTask(claim.task, ours) for claim in self._dispatcher.held.values() if not claim.lost)
        rows = {row.task.id: row for row in islice(claimed, limit)}
        for task in islice(self._task_cache.live.values(), limit):
            rows.setdefault(task.id, self._with_claim(task))
        for row in self._in_stream.values():
            if row.task.id not in rows and not self._is_over(row.task):
                rows[row.task.id] = row
        return list(islice(rows.values(), limit))

    def _with_claim(self, task: Task) -> UnfinishedTask:
        """Return a task that was submitted here with the claim of another instance."""
        row = self._in_stream.get(task.id)
        if row is None or not row.instance or task.state is State.PROCESSING or row.task.epoch != task.epoch:
            return UnfinishedTask(task)
        return UnfinishedTask(replace(task, state=State.PROCESSING), row.instance)

    def _is_over(self, task: Task) -> bool:
        """Return whether this instance has seen a later state of a task than its entry."""
        ended = self._task_cache.finished(task.id)
        return ended is not None and ended.epoch >= task.epoch

    async def _refresh(self) -> None:
        now = time.monotonic()
        if now - self._read_at < (math.inf if self._is_alone else MIN_READ_INTERVAL_S):
            return
        self._read_at = now
        try:
            await self._read()
        except (QueueUnavailable, RedisError):
            logger.debug("The unfinished tasks of other instances can't be read now")

    @property
    def _is_alone(self) -> bool:
        """Return whether no other instance can have changed a task since the last read."""
        return self._read_at > -math.inf and self._notifier.no_peers_since(
            self._connection.clock() - (time.monotonic() - self._read_at)
        )

    async def _read(self) -> None:
        commands = self._connection.commands
        async with self._connection.deadline():
            entries: Any = await commands.xrange(self._stream, "-", "+", count=READ_COUNT)
            pending: Any = await commands.xpending_range(self._stream, GROUP, "-", "+", READ_COUNT) if entries else []
        self._connection.meter.redis_commands_sent("stats", 1 + bool(entries))
        owners = {row["message_id"]: row["consumer"].decode(errors="replace") for row in pending}
        self._in_stream = {}
        for entry_id, fields in entries:
            try:
                task = decode_entry(fields, entry_id.decode())
            except (NewerRecord, UnreadableRecord):
                continue
            owner = owners.get(entry_id, "")
            if owner and owner != self._dispatcher.instance:
                task = replace(task, state=State.PROCESSING)
            self._in_stream[task.id] = UnfinishedTask(task, owner)
