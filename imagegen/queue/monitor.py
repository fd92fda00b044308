"""Numbers of the whole queue for operators and their monitoring: depth, oldest age, and instances.

A scraper may read them every few seconds for months. So Redis is queried only if this process lacks the numbers: while
all its slots are busy and there are other instances; and at most once in `MIN_QUERY_INTERVAL_S`.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, Generic, TypeVar

from msgspec import Struct

from imagegen.errors import QueueUnavailable
from imagegen.queue.dispatcher import ClaimDispatcher
from imagegen.queue.feed import Feed
from imagegen.queue.notifier import Notifier
from imagegen.queue.queue_verbs import QueueVerbs
from imagegen.redis_client.connection import Connection
from imagegen.redis_client.keys import GROUP, Keys
from imagegen.redis_client.redis_errors import ResponseError
from imagegen.tasks.task import State, Task

MIN_QUERY_INTERVAL_S = 10.0

KEPT_ENDED = 100
"""Ended tasks that the monitor keeps."""

Value = TypeVar("Value")


class BacklogSize(Struct, frozen=True):
    """Size of the backlog.

    depth: tasks that no instance has claimed yet, in the stream and in lines.

    oldest_age_s: age of the first one in the stream, 0 without any.
    """

    depth: int = 0
    oldest_age_s: float = 0.0


class InstanceStatus(Struct, frozen=True):
    """Status of this instance.

    Attributes:
        in_flight: running attempts.
        retrying: claims that wait for their next attempt or their turn.
        free: slots that wait for a task.
        waiters: clients that wait for a change of a task.
        redis_program: name and version of the Redis server, empty if unknown.
        open_tasks: unfinished tasks that were submitted or run here. lines: of clients; line_tasks: tasks in them.
    """

    in_flight: int
    retrying: int
    free: int
    waiters: int
    instances: int
    redis_up: bool
    eviction_policy: str = ""
    redis_program: str = ""
    open_tasks: int = 0
    lines: int = 0
    line_tasks: int = 0


class QueueMonitor:
    """Queries that cost no command, or few of them rarely. ended: the last tasks that ended here."""

    def __init__(
        self,
        connection: Connection,
        keys: Keys,
        dispatcher: ClaimDispatcher,
        notifier: Notifier,
        feed: Feed,
        *,
        verbs: QueueVerbs,
    ) -> None:
        self._connection = connection
        self._keys = keys
        self._dispatcher = dispatcher
        self._notifier = notifier
        self._feed = feed
        self._waiting, self._lines = dispatcher.estimates.waiting, verbs.lines
        self._depth = verbs.depth
        self.ended: deque[Task] = deque(maxlen=KEPT_ENDED)
        self._backlog = _TtlCached(BacklogSize(), self._query)
        self._dead = _TtlCached(0, self._count_dead)

    @property
    def instance(self) -> str:
        return self._dispatcher.instance

    def local_status(self) -> InstanceStatus:
        """Return the status of this instance; costs no command."""
        claims = self._dispatcher.held.values()
        return InstanceStatus(
            sum(self._dispatcher.runs(claim) and claim.task.state is State.PROCESSING for claim in claims),
            sum(claim.task.state is not State.PROCESSING for claim in claims),
            self._dispatcher.free_slots,
            self._feed.count,
            1 + len(self._notifier.peers),
            self._connection.health.down_since is None,
            self._connection.server.eviction_policy if self._connection.server else "",
            self._connection.server.program if self._connection.server else "",
            self._dispatcher.open_tasks,
            len(self._lines),
            self._lines.waiting,
        )

    async def waiting(self) -> BacklogSize:
        """Return the tasks that wait for any instance; the last numbers if Redis is unavailable."""
        in_stream, in_lines = await self._waiting_in_stream(), self._lines.waiting
        return BacklogSize(in_stream.depth + in_lines, in_stream.oldest_age_s) if in_lines else in_stream

    async def _waiting_in_stream(self) -> BacklogSize:
        if self._connection.health.down_since is None:
            if self._dispatcher.free_slots and not self._waiting:
                return BacklogSize()  # a free slot here waits for the next entry, so none waits
            if self._notifier.no_peers_since(self._waiting.read_at):
                first_at = self._waiting.first_at
                return (
                    BacklogSize(len(self._waiting), _age_s(first_at, self._connection.clock()))
                    if first_at is not None
                    else BacklogSize()
                )
        return await self._backlog.get()

    def known_backlog(self) -> BacklogSize:
        """Return the waiting tasks by the memory of this instance; costs no command, and is an estimate with peers."""
        if self._dispatcher.free_slots and not self._waiting:
            return BacklogSize()
        first_at, in_stream = self._waiting.first_at, len(self._waiting)
        if not self._notifier.alone:
            in_stream = max(in_stream, self._depth.waiting)
        age_s = 0.0 if first_at is None else _age_s(first_at, self._connection.clock())
        return BacklogSize(in_stream + self._lines.waiting, age_s)

    async def dead_letters(self) -> int:
        """Return the number of unreadable entries that are kept."""
        return await self._dead.get()

    async def _query(self) -> BacklogSize:
        commands = self._connection.commands
        async with self._connection.deadline():
            length = await commands.xlen(self._keys.stream)
            claimed, last = await self._claimed()
            first: Any = await commands.xrange(self._keys.stream, f"({last}" if last else "-", "+", count=1)
            age_s = _age_s(int(first[0][0].partition(b"-")[0]) / 1000, self._connection.clock()) if first else 0.0
        self._connection.meter.redis_commands_sent("stats", 3)
        return BacklogSize(max(length - claimed, 0), age_s)

    async def _claimed(self) -> tuple[int, str]:
        """Return how many entries are claimed, and the last of them; all waiting entries come after it."""
        try:
            summary: Any = await self._connection.commands.xpending(self._keys.stream, GROUP)
        except ResponseError as error:
            if "NOGROUP" in str(error):
                return 0, ""
            raise
        return summary["pending"], summary["max"].decode() if summary["pending"] else ""

    async def _count_dead(self) -> int:
        async with self._connection.deadline():
            count = await self._connection.commands.llen(self._keys.dead_letters)
        self._connection.meter.redis_commands_sent("stats", 1)
        return count


def _age_s(since: float, now: float) -> float:
    return max(now - since, 0.0)


class _TtlCached(Generic[Value]):
    """Value that is queried at most once in `MIN_QUERY_INTERVAL_S`, and kept while Redis is unavailable."""

    def __init__(self, value: Value, query: Callable[[], Awaitable[Value]]) -> None:
        self._value = value
        self._query = query
        self._queried_at = -math.inf
        self._lock = asyncio.Lock()

    async def get(self) -> Value:
        async with self._lock:
            if time.monotonic() - self._queried_at >= MIN_QUERY_INTERVAL_S:
                self._queried_at = time.monotonic()
                try:
                    self._value = await self._query()
                except QueueUnavailable:
                    return self._value
            return self._value
