"""Marks of final records: which instance counts the end of a task, and in which of its reports.

An instance that dies leaves final records that no written report counts. By their marks they are counted later, once.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from itertools import count

from msgspec.structs import replace

from imagegen.formats import parse_digits
from imagegen.tasks.task import Task

_NAME_CHARS = 10


def writer_name(instance: str) -> str:
    """Return the short name of an instance in its marks."""
    return hashlib.sha256(instance.encode()).hexdigest()[:_NAME_CHARS]


def writer_of(mark: str) -> str:
    """Return the short name of the instance in a mark, empty if there is none."""
    return mark.partition("-")[0]


def report_number(mark: str) -> int:
    """Return the number of the report in a mark, 0 if there is none."""
    return parse_digits(mark.partition("-")[2].partition("-")[0]) or 0


class EndMarks:
    """Marks of the tasks that this instance ends: its name, the number of the report, and the number of the end.

    A report is open while the end of one of its tasks is written.

    Attributes:
        writer: short name of the instance.
        number: of the report that counts from now on.
        on_ended: called with each task that this instance ended, before its report may close.
    """

    def __init__(self, instance: str) -> None:
        self.writer = writer_name(instance)
        self.number = 1
        self.on_ended: Callable[[Task], None] = lambda _task: None
        self._ends = count(1)
        self._open: dict[int, int] = {}
        self._waiters: list[tuple[int, asyncio.Future[None]]] = []

    def marked(self, final: Task) -> _OpenEnd:
        """Return a context with the marked final task; its report stays open within the block."""
        return _OpenEnd(self, final)

    def open_end(self, final: Task) -> tuple[Task, int]:
        """Open the present report for an end. Return the marked task, and the number for `close_end`."""
        number = self.number
        self._open[number] = self._open.get(number, 0) + 1
        return replace(final, counted_in=f"{self.writer}-{number}-{next(self._ends)}"), number

    def close_end(self, number: int) -> None:
        """Close a report for one end."""
        open_count = self._open[number] - 1
        if open_count:
            self._open[number] = open_count
        else:
            del self._open[number]
            if self._waiters:
                self._wake()

    def begin_next(self, at_least: int = 0) -> int:
        """Begin the next report; return the number of the one before. at_least: the lowest new number."""
        number, self.number = self.number, max(self.number + 1, at_least)
        return number

    async def closed(self, number: int) -> None:
        """Wait until no end of a report up to this number is being written."""
        if self._is_open(number):
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiters.append((number, waiter))
            await waiter

    def _is_open(self, number: int) -> bool:
        return any(other <= number for other in self._open)

    def _wake(self) -> None:
        waiting, self._waiters = self._waiters, []
        for number, waiter in waiting:
            if waiter.done():
                continue
            if self._is_open(number):
                self._waiters.append((number, waiter))
            else:
                waiter.set_result(None)


class _OpenEnd:
    """Context of one end. A class, since a generator takes twice as long."""

    __slots__ = ("_final", "_marks", "_number")

    def __init__(self, marks: EndMarks, final: Task) -> None:
        self._marks = marks
        self._final = final

    def __enter__(self) -> Task:
        marked, self._number = self._marks.open_end(self._final)
        return marked

    def __exit__(self, *_: object) -> None:
        self._marks.close_end(self._number)
