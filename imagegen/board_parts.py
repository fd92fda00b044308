"""Parts of the board, for the composition root: the history of all instances, and its recorder here."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from imagegen.accounts.ledger import Ledger
from imagegen.history.history_store import HistoryStore
from imagegen.history.recorder import HistoryRecorder, Sample
from imagegen.queue.instance import QueueInstance
from imagegen.queue.unfinished import UnfinishedTasks
from imagegen.supervisor import Supervisor
from imagegen.web.ops.board import Board


@asynccontextmanager
async def open_board(queue: QueueInstance, ledger: Ledger, supervisor: Supervisor) -> AsyncIterator[Board]:
    """Yield the board, while the history is recorded; write its rest at the end."""

    def sample() -> Sample:
        backlog, local, money = queue.monitor.known_backlog(), queue.monitor.local_status(), ledger.total
        saved = money.saved_by_cache + money.saved_by_coalescing
        return Sample(backlog.depth, backlog.oldest_age_s, local.in_flight, money.spent, saved)

    instance = queue.monitor.instance
    store = HistoryStore(queue.connection, queue.keys, instance)
    recorder = HistoryRecorder(queue.connection, store, sample)
    loop = asyncio.create_task(recorder.record_forever(), name="history")
    supervisor.watch([loop])
    try:
        yield Board(
            queue.pause,
            UnfinishedTasks(queue.connection, queue.keys, queue.task_cache, queue.dispatcher, queue.notifier),
            store,
            recorder,
            ledger,
            lambda: [instance, *sorted(queue.notifier.peers)],
        )
    finally:
        await supervisor.stop([loop])
        await recorder.close()
