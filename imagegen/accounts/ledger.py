"""Ledger of this instance: submits, ends of tasks, costs and savings by UTC day, key and model.

It counts in memory and is written at most once a minute, while there is something to write, and at the end. Each report
has a number, and its writer's mark in the hash of a day is the last number that was added: a repeat adds nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable

from loguru import logger

from imagegen.accounts.counts import Counts, RowName, Rows, Usage
from imagegen.accounts.usage_store import UsageStore
from imagegen.errors import QueueUnavailable
from imagegen.queue.client_queue import CacheResult, SubmitResult
from imagegen.queue.end_marks import EndMarks, report_number
from imagegen.redis_client.connection import Connection
from imagegen.redis_client.redis_errors import RedisError, shown
from imagegen.tasks.cost import SECONDS_A_DAY, day_of
from imagegen.tasks.submission import Submission
from imagegen.tasks.task import State, Task

WRITE_INTERVAL_S = 60.0
CLOSE_TIMEOUT_S = 2.5

MAX_MODELS = 300
"""Models of one day with rows of their own, since clients may name any; the others are one row."""

OTHER_MODELS = "other"

_OF_SUBMITS = ("submitted", "cached", "coalesced", "saved_by_cache", "saved_by_coalescing")

MAX_ROWS = 1_000
"""Most rows of a day in one report. One script writes a report; this number of rows takes Redis 10 to 20 ms."""


class Ledger:
    """Counts that are not written yet, by report, and the loop that writes them.

    Attributes:
        unwritten: reports by number.
        on_read: called before a report is read.
        lost: reports of this instance that could not be added.
        total: costs and savings since the start of this process.
    """

    def __init__(
        self, connection: Connection, store: UsageStore, marks: EndMarks, *, interval_s: float = WRITE_INTERVAL_S
    ) -> None:
        self._connection = connection
        self._store = store
        self._marks = marks
        self._clock = connection.clock
        self._interval_s = interval_s
        self._changed = asyncio.Event()
        self._writing = asyncio.Lock()
        self._day, self._models = 0, set[str]()
        self.unwritten: dict[int, Usage] = {}
        self.on_read: Callable[[], None] = lambda: None
        self.lost = 0
        self.total = Counts()

    def on_submitted(self, submission: Submission, submitted: SubmitResult) -> None:
        """Count an accepted submit, and the savings of a hit, a join, or a task that has some of its images already."""
        row = self._row(self._marks.number, int(self._clock() // SECONDS_A_DAY), submission.client, submission.model)
        row.submitted += 1
        saved = (submission.cost.estimated or 0) if submission.cost else 0
        if submitted.cached is CacheResult.COALESCED:
            row.coalesced += 1
            row.saved_by_coalescing += saved
            self.total.saved_by_coalescing += saved
            return
        if submitted.cached is CacheResult.HIT:
            row.cached += 1
        else:
            saved = submitted.task.cost.saved if submitted.task.cost else 0
        row.saved_by_cache += saved
        self.total.saved_by_cache += saved

    def on_ended(self, final: Task) -> None:
        """Count a task that this instance ended: in the report of its mark, and its cost on the day of its budget."""
        number = report_number(final.counted_in) or self._marks.number
        add_end(final, lambda day: self._row(number, day, final.client, final.model))
        if final.cost:
            self.total.spent += final.cost.charged

    def on_taken_back(self, final: Task, amount: int) -> None:
        """Take a call back that was counted with a cancelled task, since it is not paid."""
        day = final.cost.day if final.cost else 0
        row = self._row(self._marks.number, day or day_of(final.finished_at or 0.0), final.client, final.model)
        row.spent -= amount
        row.ambiguous -= amount
        self._connection.meter.taken_back_micro_usd += amount

    def on_charged(self, task: Task, amount: int) -> None:
        """Count calls that may have been paid twice, and that no end of the task charges."""
        day = task.cost.day if task.cost else 0
        row = self._row(self._marks.number, day or day_of(self._clock()), task.client, task.model)
        row.spent += amount
        row.ambiguous += amount
        self.total.spent += amount

    async def write_forever(self) -> None:
        """Write the counts, at most once in an interval."""
        while True:
            await self._changed.wait()
            await asyncio.sleep(self._interval_s)
            self._changed.clear()
            await self._connection.retry_until_available(self.write)

    async def write(self) -> None:
        """Write all reports that are not written. Raises QueueUnavailable; a repeat goes on where it failed."""
        if self._marks.number in self.unwritten:
            self._marks.begin_next()
        lost = self.lost
        for number in sorted(number for number in self.unwritten if number < self._marks.number):
            await self._marks.closed(number)
            usage = self.unwritten[number]
            for day in list(usage):
                await self._write_day(number, day, usage)
                del usage[day]
            del self.unwritten[number]
        if self.lost > lost and self._marks.number in self.unwritten:
            await self.write()  # what is left of a report that was refused

    async def close(self) -> None:
        """Write the rest, if Redis answers in time."""
        if not self.unwritten:
            return
        try:
            health = self._connection.health
            if health.down_since is not None and not health.refused:
                raise QueueUnavailable
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self.write()
        except (QueueUnavailable, TimeoutError):
            logger.warning("Redis did not answer while stopping; the usage report lacks up to a minute of submits")

    async def _write_day(self, number: int, day: int, usage: Usage) -> None:
        try:
            async with self._writing:  # `read` sees the whole report or nothing of it
                before = await self._store.add(day, self._marks.writer, usage[day], below=number, mark=number)
        except RedisError as error:
            self.lost += 1
            logger.error("A part of the usage report of a day can't be written and is left out: {}", shown(error))
            return
        if before > number:
            self.lost += 1
            self._marks.begin_next(at_least=before + 1)
            self._keep_submits(day, usage[day])
            logger.warning("Another instance took this one for dead: up to a minute of its usage report may be missing")

    def _keep_submits(self, day: int, rows: Rows) -> None:
        """Move the counts of submits of a refused report to the next one: no other instance has counted them."""
        for name, counts in rows.items():
            row = self._row(self._marks.number, day, name.key, name.model)
            for field in _OF_SUBMITS:
                setattr(row, field, getattr(row, field) + getattr(counts, field))

    async def read(self, days: Iterable[int]) -> AsyncIterator[tuple[int, Rows]]:
        """Yield the rows of days in parts, with what this instance has not written yet. Raises QueueUnavailable.

        Each part is of one day. If a row is in several parts, its value is their sum.
        """
        self.on_read()
        for day in days:
            async with self._writing:
                mark = 0
                async for part in self._store.read(day):
                    mark = max(mark, part.marks.get(self._marks.writer, 0))
                    yield day, part.rows
                pending = [usage[day] for number, usage in self.unwritten.items() if number > mark and day in usage]
            for rows in pending:
                yield day, rows

    def _row(self, number: int, day: int, key: str, model: str) -> Counts:
        usage = self.unwritten.get(number)
        if usage is None:
            usage = self.unwritten[number] = {}
            self._changed.set()
        rows = usage.get(day)
        if rows is None:
            rows = usage[day] = {}
        name = RowName(key, self._shown_model(day, model))
        counts = rows.get(name)
        if counts is None:
            counts = rows[name] = Counts()
            if len(rows) >= MAX_ROWS and number == self._marks.number:
                self._marks.begin_next()
        return counts

    def _shown_model(self, day: int, model: str) -> str:
        if model in self._models:
            return model
        if day > self._day:
            self._day, self._models = day, set()
        if len(self._models) >= MAX_MODELS:
            return OTHER_MODELS
        self._models.add(model)
        return model


def add_end(final: Task, row_of: Callable[[int], Counts]) -> None:
    """Add the end of a task to the rows of its client and model, and its cost to the row of its budget's day.

    row_of: returns the row of a day.
    """
    ended_on = day_of(final.finished_at or 0.0)
    row = row_of(ended_on)
    if final.state is State.COMPLETED:
        row.completed += 1
        row.images += sum([not image.reused for image in final.images])
    elif final.state is State.FAILED:
        row.failed += 1
    else:
        row.cancelled += 1
    cost = final.cost
    if cost is not None and cost.charged:
        if cost.day and cost.day != ended_on:
            row = row_of(cost.day)
        row.spent += cost.charged
        row.ambiguous += cost.unsure
