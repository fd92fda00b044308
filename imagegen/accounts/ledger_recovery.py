"""Counts of instances that died: the final records that no written report of theirs includes are added, once.

The counts of submits in their last minute are lost, and the cost of a task that was submitted again, or had no record
any more, before this.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from functools import partial

from loguru import logger

from imagegen.accounts.counts import Counts, RowName, Rows, Usage
from imagegen.accounts.ledger import Ledger, add_end
from imagegen.accounts.usage_store import UsageStore
from imagegen.errors import ListRefused
from imagegen.queue.end_marks import report_number, writer_name, writer_of
from imagegen.queue.instance import QueueInstance
from imagegen.redis_client.redis_errors import RedisError, shown
from imagegen.supervisor import Supervisor
from imagegen.tasks.task import Task

SURE_DEAD_S = 65.0
"""A consumer that is alive reads at least every 57 s, and is in the group again then."""

ABSENT_S = 6.0
"""Time between two greetings. An instance that lives has subscribed again by then.

An instance counts as dead if it answers neither, while every subscribed instance does, and has sent no command between.
"""

ROUND_GAP_S, MAX_ROUNDS = 5.0, 6
"""Seconds between two searches for instances that do not answer; searches that follow each other without a result."""

SKIPPED_NUMBERS = 1_000_000
"""The mark of a dead writer rises by this, so that a frozen one can't add its last report too."""


class LedgerRecovery:
    """Loops that count what dead instances ended and did not report.

    sure_dead_s, absent_s: see `SURE_DEAD_S`, `ABSENT_S`.
    """

    def __init__(
        self,
        queue: QueueInstance,
        store: UsageStore,
        *,
        sure_dead_s: float = SURE_DEAD_S,
        absent_s: float = ABSENT_S,
    ) -> None:
        self._connection = queue.connection
        self._tasks = queue.client_queue.listing
        self._verbs = queue.verbs
        self._notifier = queue.notifier
        self._store = store
        self._sure_dead_s = sure_dead_s
        self._absent_s = absent_s
        self._gone: set[str] = set()
        self._changed = asyncio.Event()
        self._suspected = asyncio.Event()
        self._counted: set[str] = set()

    async def on_gone(self, instances: Sequence[str]) -> None:
        """Record instances of which only a consumer is left, so that this or another instance counts for them.

        Raises QueueUnavailable.
        """
        await self._store.add_dead(instances)
        self._gone.update(instances)
        self._changed.set()
        self._suspected.set()

    async def recover_forever(self) -> None:
        """Wait until instances are surely dead, and count for them; first for those that others did not get to."""
        self._gone.update(await self._connection.retry_until_available(self._store.dead))
        if self._gone:
            self._changed.set()
            self._suspected.set()
        while True:
            await self._changed.wait()
            self._changed.clear()
            if not (instances := frozenset(self._gone)):
                continue
            await asyncio.sleep(self._sure_dead_s)
            await self._connection.retry_until_available(self._recover, instances)
            self._gone -= instances

    def suspect(self) -> None:
        """Search soon for instances that do not answer: one may have died."""
        self._suspected.set()

    def on_read(self) -> None:
        """Search soon if there are others, since their last minute is of interest now."""
        if self._notifier.peers:
            self._suspected.set()

    async def search_forever(self) -> None:
        """Count for instances that are seen to be dead, without the long wait for those that may live."""
        rounds = 0
        while True:
            await self._suspected.wait()
            self._suspected.clear()
            try:
                is_certain = await self._connection.retry_until_available(self._count_absent)
            except RedisError as error:
                logger.debug("Redis refuses the search for instances that died: {}", shown(error))
                is_certain = True
            rounds = 0 if is_certain else rounds + 1
            await asyncio.sleep(ROUND_GAP_S)
            if 0 < rounds < MAX_ROUNDS:
                self._suspected.set()

    async def _count_absent(self) -> bool:
        """Return whether it was certain which instances are there."""
        if not (first := await self._absent()):
            return first is not None
        began = time.monotonic()
        await asyncio.sleep(self._absent_s)
        passed_s = time.monotonic() - began
        if (last := await self._absent()) is None:
            return False
        dead = [name for name in first.keys() & last.keys() if last[name] >= passed_s]
        await self._count(dead)
        self._counted.update(dead)
        return True

    async def _absent(self) -> dict[str, float] | None:
        """Return the instances with a consumer that do not answer, and their seconds without a command.

        None if an instance that receives the greeting does not answer it, or that is unknown.
        """
        own, suspects = self._notifier.instance, dict.fromkeys(self._gone, math.inf)
        suspects |= {consumer.name: consumer.idle_s for consumer in await self._verbs.consumers()}
        for name in (own, *self._counted):
            suspects.pop(name, None)
        if not suspects:
            return {}
        attending = await self._notifier.attending()
        return None if attending is None else {name: at for name, at in suspects.items() if name not in attending}

    async def _recover(self, instances: Collection[str]) -> None:
        living = {consumer.name for consumer in await self._verbs.consumers()}
        await self._count([instance for instance in instances if instance not in living])
        await self._store.remove_dead(instances)

    async def _count(self, instances: Collection[str]) -> None:
        writers = {writer_name(instance): instance for instance in instances}
        if not writers:
            return
        ended: dict[str, dict[int, Usage]] = {writer: {} for writer in writers}
        try:
            async for task in self._tasks.counted_by(writers):
                add_end(task, partial(_row, ended[writer_of(task.counted_in)], task))
        except ListRefused as error:
            logger.warning("The usage report lacks what {} had ended last: {}", ", ".join(writers.values()), error)
            return
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
    recovery = LedgerRecovery(queue, store)
    marks.on_ended, queue.takeover.on_gone, ledger.on_read = ledger.on_ended, recovery.on_gone, recovery.on_read
    queue.notifier.on_join.append(recovery.suspect)
    queue.notifier.on_silence = recovery.suspect
    queue.client_queue.canceller.on_taken_back = ledger.on_taken_back
    queue.leases.lost_claims.on_charged = ledger.on_charged
    loops = [
        asyncio.create_task(ledger.write_forever(), name="ledger"),
        asyncio.create_task(recovery.recover_forever(), name="ledger-recovery"),
        asyncio.create_task(recovery.search_forever(), name="ledger-search"),
    ]
    supervisor.watch(loops)
    yield ledger
    await supervisor.stop(loops)
    await ledger.close()
