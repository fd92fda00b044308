"""Usage reports in Redis: one hash a day with a row for each key and model, and a mark for each writer."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from typing import Any, NamedTuple, cast

from loguru import logger

from imagegen.accounts.counts import Counts, RowName, Rows
from imagegen.redis_client.connection import Connection
from imagegen.redis_client.keys import Keys
from imagegen.redis_client.lua import load_script

_SCRIPT = load_script(__package__, "add_usage")

LIFE_S = 92 * 86_400
"""Of a day's report."""

_MARK = "@"
"""First character of the fields with marks; no name of a key begins so."""


PAGE_ROWS = 1_000
"""Approximate number of rows that one command reads: they take Redis 2 ms, and the event loop 4 ms to decode."""


class DayReport(NamedTuple):
    """Stored report of a day, or a part of it.

    marks: by writer, the highest number of its reports that the rows include.
    """

    rows: Rows
    marks: Mapping[str, int]


class UsageStore:
    """Reports by day. All methods raise QueueUnavailable."""

    def __init__(self, connection: Connection, keys: Keys) -> None:
        self._connection = connection
        self._keys = keys
        self._days_with_unreadable: set[int] = set()

    async def add(self, day: int, writer: str, rows: Rows, *, below: int, mark: int) -> int:
        """Add rows to a day unless the writer's mark is `below` or higher. Return the mark before, 0 if none.

        mark: the writer's new mark. It costs three commands, four if the writer is new to this day.
        """
        args: list[str | int] = [_MARK + writer, below, mark, LIFE_S]
        for name, counts in rows.items():
            args += (name.encode(), counts.encode())
        async with self._connection.deadline():
            before = int(await self._connection.commands.run_script(_SCRIPT, [self._keys.usage(day)], args))
        added = before < below
        self._connection.meter.redis_commands_sent("usage", 2 + added + (before == 0))
        return before

    async def read(self, day: int) -> AsyncIterator[DayReport]:
        """Yield the report of a day in parts, each with some of its rows and marks; each costs a command."""
        cursor, known = 0, set[bytes]()
        while True:
            async with self._connection.deadline():
                page: Any = await self._connection.commands.hscan(self._keys.usage(day), cursor, count=PAGE_ROWS)
            self._connection.meter.redis_commands_sent("usage", 1)
            cursor, fields = page
            for field in known & fields.keys():
                del fields[field]  # a scan may return a field twice
            if cursor:
                known |= fields.keys()
            report, unreadable = _parse(fields)
            if unreadable and day not in self._days_with_unreadable:
                self._days_with_unreadable.add(day)
                text = "Rows of the usage report of day {} can't be read and do not count: {}, the first of them {!r}"
                logger.warning(text, day, len(unreadable), unreadable[0][:80])
            yield report
            if not cursor:
                return

    async def mark(self, day: int, writer: str) -> int:
        """Return a writer's mark of a day, 0 if there is none that can be read; costs one command."""
        async with self._connection.deadline():
            stored = cast(bytes | None, await self._connection.commands.hget(self._keys.usage(day), _MARK + writer))
        self._connection.meter.redis_commands_sent("usage", 1)
        return _parse({(_MARK + writer).encode(): stored or b"0"})[0].marks.get(writer, 0)

    async def add_dead(self, instances: Sequence[str]) -> None:
        """Record instances that left without a word; costs two commands."""
        async with self._connection.deadline():
            await self._connection.commands.hset(
                self._keys.dead_instances, mapping=dict.fromkeys(instances, int(self._connection.clock()))
            )
            await self._connection.commands.expire(self._keys.dead_instances, LIFE_S)
        self._connection.meter.redis_commands_sent("usage", 2)

    async def dead(self) -> list[str]:
        """Return the recorded instances, without foreign names; costs one command."""
        async with self._connection.deadline():
            fields: dict[Any, Any] = await self._connection.commands.hgetall(self._keys.dead_instances)
        self._connection.meter.redis_commands_sent("usage", 1)
        names = (name.decode(errors="replace") for name in fields)
        return [name for name in names if "\ufffd" not in name]

    async def remove_dead(self, instances: Collection[str]) -> None:
        """Forget recorded instances; costs one command."""
        async with self._connection.deadline():
            await self._connection.commands.hdel(self._keys.dead_instances, *instances)
        self._connection.meter.redis_commands_sent("usage", 1)


def _parse(fields: Mapping[Any, Any]) -> tuple[DayReport, list[bytes]]:
    """Return the report, and the fields that can't be read."""
    rows: Rows = {}
    unreadable: list[bytes] = []
    marks: dict[str, int] = {}
    for field, value in fields.items():
        try:
            name, text = field.decode(), value.decode()
            if name.startswith(_MARK):
                marks[name.removeprefix(_MARK)] = int(text)
            else:
                rows[RowName.decode(name)] = Counts.decode(text)
        except ValueError:
            unreadable.append(field)
    return DayReport(rows, marks), unreadable
