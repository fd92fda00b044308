"""Counts of instances that died: the final records that no written report of theirs includes are added, once.

The counts of submits in their last minute are lost, and the cost of a task that was submitted again, or had no record
any more, before this.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from functools import partial

from loguru import logger

from imagegen.accounts.counts import Counts, RowName, Rows, Usage
from imagegen.accounts.ledger import Ledger, add_end
from imagegen.accounts.usage_store import UsageStore
from imagegen.queue.end_marks import report_number, writer_name, writer_of
from imagegen.queue.instance import QueueInstance
from imagegen.queue.queue_verbs import QueueVerbs
from imagegen.queue.task_list import TaskList
from imagegen.redis_client.connection import Connection
from imagegen.supervisor import Supervisor
from imagegen.tasks.task import Task

SURE_DEAD_S = 65.0
"""A consumer that is alive reads at least every 57 s, and is in the group again then."""

SKIPPED_NUMBERS = 1_000_000
"""The mark of a dead writer rises by this, so that a frozen one can't add its last report too."""


class LedgerRecovery:
    """Loop that counts what dead instances ended and did not report. sure_dead_s: see `SURE_DEAD_S`."""

    def __init__(
        self,
        connection: Connection,
        store: UsageStore,
        tasks: TaskList,
        verbs: QueueVerbs,
        *,
        sure_dead_s: float,
    ) -> None:
        self._connection = connection
        self._store = store
        self._tasks = tasks
        self._verbs = verbs
        self._sure_dead_s = sure_dead_s
        self._gone: set[str] = set()
        self._changed = asyncio.Event()

    async def on_gone(self, instances: Sequence[str]) -> None:
        """Record instances of which only a consumer is left, so that this or another instance counts for them.

        Raises QueueUnavailable.
        """
        await self._store.add_dead(instances)
        self._gone.update(instances)
        self._changed.set()

    async def recover_forever(self) -> None:
        """Wait until instances are surely dead, and count for them; first for those that others did not get to."""
        self._gone.update(await self._connection.retry_until_available(self._store.dead))
        if self._gone:
            self._changed.set()
        while True:
            await self._changed.wait()
            self._changed.clear()
            instances, self._gone = self._gone, set()
            await asyncio.sleep(self._sure_dead_s)
            await self._connection.retry_until_available(self._recover, instances)

    async def _recover(self, instances: Collection[str]) -> None:
        await self._count(instances)
        await self._store.remove_dead(instances)

    async def _count(self, instances: Collection[str]) -> None:
        living = {consumer.name for consumer in await self._verbs.consumers()}
        writers = {writer_name(instance): instance for instance in instances if instance not in living}
        if not writers:
            return
        ended: dict[str, dict[int, Usage]] = {writer: {} for writer in writers}
        async for task in self._tasks.counted_by(writers):
            add_end(task, partial(_row, ended[writer_of(task.counted_in)], task))
        for writer, instance in writers.items():
            for day, reports in ended[writer].items():
                await self._add(writer, instance, day, reports)

    async def _add(self, writer: str, instance: str, day: int, reports: Usage) -> None:
        """Add the reports of a day, by number, that are higher than the writer's mark."""
        mark = await self._store.mark(day, writer)
        missing: Rows = {}
        for number, rows in reports.items():
            if number > mark:
                for name, counts in rows.items():
                    missing.setdefault(name, Counts()).add(counts)
        if not missing:
            return
        before = await self._store.add(day, writer, missing, below=mark + 1, mark=mark + SKIPPED_NUMBERS)
        if before == mark:
            ended = sum(counts.completed + counts.failed + counts.cancelled for counts in missing.values())
            logger.info("Counted {} tasks in the usage report that {} had ended before it died", ended, instance)


def _row(by_day: dict[int, Usage], task: Task, day: int) -> Counts:
    """Return the row of a task's client and model in the report of its mark, by day."""
    rows = by_day.setdefault(day, {}).setdefault(report_number(task.counted_in), {})
    return rows.setdefault(RowName(task.client, task.model), Counts())


@asynccontextmanager
async def open_ledger(queue: QueueInstance, supervisor: Supervisor) -> AsyncIterator[Ledger]:
    """Yield the ledger of an instance, with its loops; its last report is written at the end."""
    marks, store = queue.verbs.end_marks, UsageStore(queue.connection, queue.keys)
    ledger = Ledger(queue.connection, store, marks)
    listing = queue.client_queue.listing
    recovery = LedgerRecovery(queue.connection, store, listing, queue.verbs, sure_dead_s=SURE_DEAD_S)
    marks.on_ended, queue.takeover.on_gone = ledger.on_ended, recovery.on_gone
    queue.client_queue.canceller.on_taken_back = ledger.on_taken_back
    loops = [
        asyncio.create_task(ledger.write_forever(), name="ledger"),
        asyncio.create_task(recovery.recover_forever(), name="ledger-recovery"),
    ]
    supervisor.watch(loops)
    yield ledger
    await supervisor.stop(loops)
    await ledger.close()
