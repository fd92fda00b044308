"""Mover of the lines: places tasks into them, and moves lines that would stop.

A line moves with each end of a task of its client. It would stop where the instance that ends such a task has not
received that there is a line, or died before it did so. So an instance that begins a line publishes that, and instances
check lines that do not move, less and less often. At a start, and when a peer is gone, the index of the lines is read.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence

from loguru import logger
from msgspec.structs import replace

from imagegen.errors import ApiError, QueueUnavailable
from imagegen.queue.notifier import Message, ids_of
from imagegen.queue.queue_verbs import QueueVerbs
from imagegen.queue.task_lookup import TaskLookup
from imagegen.queue.verbs.context import batched
from imagegen.queue.verbs.list_lines import MAX_LINES, ListedLine
from imagegen.queue.verbs.refill_lines import MAX_MOVED, StoppedLine
from imagegen.redis_client.connection import Connection
from imagegen.redis_client.redis_errors import RedisError
from imagegen.tasks.task import IN_LINE, Task

CHECK_S, MAX_CHECK_S = 5.0, 60.0
"""Seconds after which a line that does not move is checked; doubled with each check that moves nothing."""

PUBLISHED_S = 0.25
"""Seconds after which peers have received a message, or it is lost."""

COUNT_PAUSE, MAX_COUNT_PAUSE_S = 10.0, 30.0
"""A pause follows each count of the stream: this many times as long as the count, so that Redis has time for the rest,
but at most `MAX_COUNT_PAUSE_S`."""

READ_AGAIN_S = 1.0
"""Shortest time between two reads of which tasks of a client have ended elsewhere."""


class LineMover:
    """Mover of the lines for one instance.

    deadline_s: seconds from a task's submit to its end.
    on_vanished: awaited with tasks that neither their line nor the stream may have.
    """

    def __init__(
        self,
        connection: Connection,
        verbs: QueueVerbs,
        lookup: TaskLookup,
        *,
        deadline_s: float,
    ) -> None:
        self._connection = connection
        self._verbs = verbs
        self.lookup = lookup
        self.lines = self._lines = verbs.lines
        self._task_cache, self._dispatcher, self._notifier = lookup.task_cache, lookup.dispatcher, lookup.notifier
        self._deadline_s = deadline_s
        self._clock = connection.clock
        self._wake = asyncio.Event()
        self._is_index_needed = False
        self._reloaded_at = -math.inf
        self._doubted: set[str] = set()
        self._count_after = -math.inf
        self._emptied: dict[str, None] = {}
        self._check_at: dict[str, tuple[float, float]] = {}
        self._read_at: dict[str, float] = {}
        self._looked_at: dict[str, float] = {}
        self.on_vanished: Callable[[Sequence[Task]], Awaitable[None]] = _do_nothing

    # Submits

    async def begin_submit(self, client: str) -> bool:
        """Return whether the next task of a client is to wait in its line; end with `ClientLines.end_submit`."""
        lines = self._lines
        if not lines.has_line(client) and lines.is_full(client) and not self._notifier.alone:
            await self._read_ended(client)
        in_line = lines.has_line(client) or lines.is_full(client)
        lines.begin_submit(client, in_line=in_line)
        if in_line and client not in self._check_at:
            self._check_later(client, CHECK_S)
            self._wake.set()
        return in_line

    async def _read_ended(self, client: str) -> None:
        """Read which tasks of a client, submitted here, other instances have ended."""
        now = time.monotonic()
        if now - self._read_at.get(client, -math.inf) < READ_AGAIN_S:
            return
        self._read_at[client] = now
        await self._read(
            [task_id for task_id in self._lines.in_stream(client) if task_id not in self._dispatcher.claimed]
        )

    async def _read(self, task_ids: Iterable[str]) -> list[Task]:
        """Return the present state of tasks that can be read."""
        results = await asyncio.gather(*map(self.lookup.read, task_ids), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException) and not isinstance(result, ApiError):
                raise result
        return [result for result in results if isinstance(result, Task)]

    # Events

    def reload(self, *_: object) -> None:
        """Read the index of the lines: some may have no instance that moves them."""
        self._is_index_needed = True
        self._wake.set()

    def on_begun(self, client: str) -> None:
        """Publish that a client has a line; check it once the peers have received that: they may end tasks before."""
        self._notifier.publish("line", ids=[client])
        if not self._notifier.alone:
            self._check_later(client, PUBLISHED_S)
            self._wake.set()

    def on_doubt(self, client: str) -> None:
        self._doubted.add(client)
        self._wake.set()

    def on_end_without_line(self) -> None:
        """Read the index now and then if no channel carries which clients have lines."""
        now = time.monotonic()
        if self._notifier.silent and now - self._reloaded_at > CHECK_S:
            self._reloaded_at = now
            self.reload()

    def on_line_elsewhere(self, message: Message) -> None:
        clients = list(ids_of(message))
        self._lines.known(clients)
        for client in clients:
            self._check_later(client, CHECK_S)
        self._wake.set()

    def on_emptied(self, _client: str, task_ids: Sequence[str]) -> None:
        self._emptied.update(dict.fromkeys(task_ids))
        self._wake.set()

    def on_moved(self, moved: Sequence[tuple[str, str]]) -> None:
        """Record the entries of tasks that were moved into the stream."""
        live, waiting = self._task_cache.live, self._dispatcher.estimates.waiting
        for task_id, entry_id in moved:
            if entry_id in self._dispatcher.held:
                continue
            waiting.add(entry_id)
            task = live.get(task_id)
            if task is not None and task.entry_id == IN_LINE:
                task = replace(task, entry_id=entry_id)
                self._task_cache.put(task)
                self._lines.submitted(task)
        self._verbs.submit.added.set()

    # Checks

    async def keep_forever(self) -> None:
        """Move lines that have stopped, and end tasks after their deadline. Costs nothing without lines."""
        while True:
            try:
                async with asyncio.timeout(self._next_check_s()):
                    await self._wake.wait()
            except TimeoutError:
                pass
            self._wake.clear()
            try:
                await self._connection.retry_until_available(self._check)
            except RedisError as error:
                self._verbs.unreadable.report("lines", type(error).__name__, error)
                await asyncio.sleep(CHECK_S)

    def _check_later(self, client: str, wait_s: float) -> None:
        self._check_at[client] = (time.monotonic() + wait_s, wait_s)

    def _next_check_s(self) -> float | None:
        """Return the seconds until the next check, None without one."""
        if not self._check_at and not self._doubted:
            return None
        next_at = min((at for at, _ in self._check_at.values()), default=math.inf)
        if self._doubted or next_at < self._count_after:
            next_at = self._count_after
        next_at -= time.monotonic()
        if (oldest := self._oldest()) is not None:
            next_at = min(next_at, self._deadline(oldest) - self._clock())
        return max(next_at, 0.01)

    async def _check(self) -> None:
        await self._connection.recovered.wait()
        if self._is_index_needed:
            clients = await self._verbs.read_line_index()
            self._is_index_needed = False
            self._lines.known(clients)
            self._doubted.update(clients)
        await self._refill()
        await self._check_emptied()
        await self._end_overdue()

    async def _refill(self) -> None:
        now, lines = time.monotonic(), self._lines
        self._check_at = {client: at for client, at in self._check_at.items() if lines.has_line(client)}
        is_any_due = any(at <= now for at, _ in self._check_at.values())
        for client, (at, wait_s) in self._check_at.items():
            # One count of the stream serves all lines, so those that are due soon are checked too.
            early_s = wait_s / 2 if is_any_due and wait_s >= CHECK_S else 0.0
            if at > now + early_s:
                continue
            if now - lines.moved_at.get(client, -math.inf) < wait_s:
                self._check_later(client, CHECK_S)
            else:
                self._doubted.add(client)
        if self._doubted and now >= self._count_after:
            checked, self._doubted = self._doubted, set()  # a line that stops meanwhile is checked once more
            try:
                await self._move_stopped(sorted(checked))
            except BaseException:
                self._doubted |= checked
                raise

    async def _move_stopped(self, clients: Sequence[str]) -> None:
        """Move tasks of lines until each client has its window of tasks in the stream."""
        listed = await self.read(clients)
        began, window, moved_clients = time.monotonic(), self._lines.window, set[str]()
        in_stream = await self._verbs.count_entries()
        now = time.monotonic()
        self._count_after = now + min(COUNT_PAUSE * (now - began), MAX_COUNT_PAUSE_S)
        stopped = [
            StoppedLine(line.client, window - in_stream[line.client], line.task_ids[0])
            for line in listed
            if line.length and in_stream[line.client] < window
        ]
        for batch in batched(stopped, max(MAX_MOVED // window, 1)):
            while batch:
                rows, left = await self._verbs.refill_lines(batch)
                for line, moved in zip(batch, rows, strict=True):
                    self._lines.left(line.client, moved)
                    if moved.moved:
                        moved_clients.add(line.client)
                batch = left  # noqa: PLW2901 - what the bytes of one call did not allow
        for client in filter(self._lines.has_line, clients):
            _, wait_s = self._check_at.get(client, (0.0, 0.0))
            is_moved = client in moved_clients
            self._check_later(client, CHECK_S if is_moved else min(max(wait_s * 2, CHECK_S), MAX_CHECK_S))

    async def read(self, clients: Sequence[str]) -> list[ListedLine]:
        """Read lines. Raises QueueUnavailable."""
        listed: list[ListedLine] = []
        while len(listed) < len(clients):
            page = await self._verbs.list_lines(clients[len(listed) : len(listed) + MAX_LINES])
            for line in page:
                self._lines.listed(line.client, line.task_ids, line.length)
            listed += page
        return listed

    async def position(self, task: Task, in_stream: int) -> int:
        """Return the position of a task in a line, which is read now and then if it is not in memory.

        in_stream: waiting entries.
        """
        client, now = task.client, time.monotonic()
        if not self._lines.has_line(client) and now - self._looked_at.get(client, -math.inf) > CHECK_S:
            self._looked_at[client] = now
            try:
                await self.read([client])
            except QueueUnavailable:
                logger.debug("The line of a client can't be read now")
        return self._lines.position(task, in_stream)

    async def read_all(self) -> None:
        """Read all lines to compute positions. Raises QueueUnavailable."""
        await self.read(self._lines.clients)

    async def _check_emptied(self) -> None:
        """Find the tasks that were believed to wait in a line that is empty: a peer moved them, or Redis lost them."""
        for task_ids in batched(list(self._emptied), MAX_LINES):
            live = self._task_cache.live
            waiting = [task_id for task_id in task_ids if (task := live.get(task_id)) and task.entry_id == IN_LINE]
            vanished = []
            for task in await self._read(waiting):
                cached = live.get(task.id)
                if cached is None or cached.entry_id != IN_LINE or task.id in self._dispatcher.claimed:
                    continue
                if task.entry_id == IN_LINE:
                    vanished.append(cached)
                elif task.entry_id:
                    self._task_cache.put(replace(cached, entry_id=task.entry_id))
            if vanished:
                await self.on_vanished(vanished)
            for task_id in task_ids:
                self._emptied.pop(task_id, None)

    def _oldest(self) -> Task | None:
        """Return the task in a line, submitted here, that came first."""
        heads = [head for client in self._lines.clients if (head := next(self._in_line_here(client), None)) is not None]
        return min(heads, key=lambda task: task.created_at, default=None)

    def _in_line_here(self, client: str) -> Iterator[Task]:
        """Yield the tasks of a line that were submitted here, in order."""
        live = self._task_cache.live
        for task_id in self._lines.waiting_in(client):
            task = live.get(task_id)
            if task is not None and task.entry_id == IN_LINE:
                yield task

    def _deadline(self, task: Task) -> float:
        return self._connection.clock.after_jumps(task.created_at) + self._deadline_s

    async def _end_overdue(self) -> None:
        """Fail tasks in lines after their deadline."""
        ended = 0
        for client in self._lines.clients:
            for task in list(self._in_line_here(client)):
                if self._clock() < self._deadline(task):
                    break
                ended += (await self.lookup.interrupted.ended(task)).state.is_final
        if ended:
            logger.warning("{} tasks waited in lines until their deadline: they failed", ended)


async def _do_nothing(_tasks: Sequence[Task]) -> None:
    return
