"""Lists of tasks by a scan of all records, so that no submit pays for an index."""

from __future__ import annotations

import heapq
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator
from typing import cast

from msgspec import Struct

from imagegen.errors import ListRefused
from imagegen.queue.checkpoint import owner_of
from imagegen.queue.codec import NewerRecord, UnreadableRecord, decode_head, decode_record
from imagegen.queue.end_marks import writer_of
from imagegen.redis_client.connection import Connection
from imagegen.redis_client.keys import Keys
from imagegen.redis_client.redis_errors import ScanRefused
from imagegen.tasks.task import TASK_ID, State, Task

SCAN_COUNT = 500

Cursor = tuple[int, str]
"""Place of a task in the list: its epoch, which rises with the time of the submit, and its id."""


class TaskPage(Struct, frozen=True):
    """Page of a list of tasks.

    next: first task of the next page, None at the end.
    """

    task_ids: list[str]
    next: Cursor | None


class TaskList:
    """Tasks by the time of their submit, newest first.

    may_live: whether an instance of this name may be there; the attempt of another has ended with it.
    """

    def __init__(self, connection: Connection, keys: Keys, may_live: Callable[[str], bool]) -> None:
        self._connection = connection
        self._keys = keys
        self._may_live = may_live

    async def page(self, state: State | None, before: Cursor | None, limit: int) -> TaskPage:
        """Return at most `limit` tasks, older than `before`. Reads every record. Raises QueueUnavailable."""
        newest: list[Cursor] = []
        async for ids in self._ids():
            matches = [place for place in await self._places(ids, state) if before is None or place < before]
            newest = heapq.nlargest(limit + 1, {*newest, *matches})
        page = newest[:limit]
        return TaskPage([task_id for _, task_id in page], page[-1] if len(newest) > limit else None)

    async def counted_by(self, writers: Collection[str]) -> AsyncIterator[Task]:
        """Yield each finished task with a mark of these writers, see `end_marks`.

        Reads every record. Raises QueueUnavailable.
        """
        marks, yielded = [f'"{writer}-'.encode() for writer in writers], set[str]()
        async for ids in self._ids():
            fresh = [task_id for task_id in dict.fromkeys(ids) if task_id not in yielded]  # a scan may return one twice
            for record in await self._values(map(self._keys.record, fresh)) if fresh else ():
                if record is not None and any(mark in record for mark in marks):
                    task = _readable(record)
                    if task and task.state.is_final and writer_of(task.counted_in) in writers:
                        yielded.add(task.id)
                        yield task

    async def _ids(self) -> AsyncIterator[list[str]]:
        """Yield the ids of all records, page by page."""
        cursor, begun = 0, False
        while cursor or not begun:
            begun = True
            try:
                cursor, names = await self._connection.scan(cursor, self._keys.records, SCAN_COUNT)
            except ScanRefused as error:
                raise ListRefused from error
            self._connection.meter.redis_commands_sent("list", 1)
            texts = (_text(name).rpartition(":")[2] for name in names)
            if ids := [text for text in texts if TASK_ID.fullmatch(text)]:
                yield ids

    async def _places(self, ids: list[str], state: State | None) -> list[Cursor]:
        records = await self._values(map(self._keys.record, ids))
        heads = dict(_heads(ids, records))
        if state is not None:
            unfinished = [task_id for task_id, (_, stored) in heads.items() if not stored.is_final]
            if not state.is_final and unfinished:
                values = await self._values(map(self._keys.checkpoint, unfinished))
                running = {task_id for task_id, value in zip(unfinished, values, strict=True) if self._calls(value)}
                heads |= {i: (heads[i][0], State.PROCESSING if i in running else State.PENDING) for i in unfinished}
            heads = {task_id: head for task_id, head in heads.items() if head[1] is state}
        return [(epoch, task_id) for task_id, (epoch, _) in heads.items()]

    def _calls(self, stored: bytes | None) -> bool:
        """Return whether an attempt runs, according to its checkpoint."""
        owner = owner_of(stored)
        return owner is not None and self._may_live(owner)

    async def _values(self, names: Iterable[str]) -> list[bytes | None]:
        async with self._connection.deadline():
            values = cast(list[bytes | None], await self._connection.commands.mget(list(names)))
        self._connection.meter.redis_commands_sent("list", 1)
        return values


def _heads(ids: Iterable[str], records: Iterable[bytes | None]) -> Iterator[tuple[str, tuple[int, State]]]:
    for task_id, record in zip(ids, records, strict=True):
        if record is not None:
            try:
                head = decode_head(record)
            except (NewerRecord, UnreadableRecord):
                continue
            yield task_id, (head.epoch, head.state)


def _readable(record: bytes) -> Task | None:
    try:
        return decode_record(record)[1]
    except (NewerRecord, UnreadableRecord):
        return None


def _text(name: bytes | str) -> str:
    return name.decode(errors="replace") if isinstance(name, bytes) else name
