"""Consumer of the stream: the one blocked read of this process, and its recovery."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from loguru import logger

from imagegen.errors import QueueUnavailable
from imagegen.queue.client_queue import ClientQueue
from imagegen.queue.leases import Leases
from imagegen.queue.queue_verbs import QueueVerbs
from imagegen.queue.verbs.consume import Entry
from imagegen.redis_client.connection import BLOCK_S, Connection
from imagegen.redis_client.redis_errors import RedisError, unavailable

OVERDUE_S = 1.5
"""How long a blocked read may leave a waiting entry unread."""

REFUSED_RETRY_S = 3.0
"""Seconds between two reads that Redis refuses permanently."""

_GROUP_GONE = ("NOGROUP", "no longer exists")

_UNBLOCKED = "UNBLOCKED"
"""Also the error of a read that a server ends as it becomes a replica, and of CLIENT UNBLOCK."""


class StreamConsumer:
    """Reader of as many entries as slots are free, so that a crash leaves few and each instance gets its share."""

    def __init__(
        self,
        connection: Connection,
        verbs: QueueVerbs,
        leases: Leases,
        client_queue: ClientQueue,
        *,
        alone: Callable[[], bool],
    ) -> None:
        self._connection = connection
        self._verbs = verbs
        self._dispatcher = leases.dispatcher
        self._leases = leases
        self._client_queue = client_queue
        self._alone = alone
        self._blocked_reads = 0
        self._blocked = False
        self._interrupted = self._replaced = False
        self.on_loss: Callable[[], None] = lambda: None
        self.on_group_known: Callable[[], None] = lambda: None

    def interrupt(self) -> None:
        """End the blocked read, so that entries stay in the stream while claiming is paused."""
        if self._blocked:
            self._interrupted = True
            self._connection.blocking_reads.drop()

    async def read_forever(self) -> None:
        """Read as many entries as slots are free, and pass their claims to the dispatcher."""
        if not await self._connection.retry_until_available(self._verbs.create_group):
            await self._connection.retry_until_available(self._client_queue.refresh_positions)
        self.on_group_known()
        while True:
            while (free := self._dispatcher.free_slots) <= 0:
                self._dispatcher.demand.clear()
                await self._dispatcher.demand.wait()
            try:
                entries = await self._read(free)
            except (RedisError, OSError, TimeoutError, QueueUnavailable) as error:
                if self._interrupted or self._replaced:
                    self._leases.check_now()  # an entry may have been on its way
                else:
                    await self._recover(error)
                continue
            finally:
                self._interrupted = self._replaced = False
            self._connection.health.succeeded()
            await self._deliver(entries, free)

    async def _read(self, count: int) -> list[Entry]:
        """Read entries over the shared connection if any waits here, else by a blocked read."""
        waiting = self._dispatcher.estimates.waiting
        if waiting:
            entries = await self._verbs.read_waiting(self._dispatcher.instance, count)
            if len(entries) < count:
                waiting.replace((), self._connection.clock())
            if entries:
                return entries
        self._blocked, self._blocked_reads = True, self._blocked_reads + 1
        try:
            return await self._verbs.read_entries(self._dispatcher.instance, count, BLOCK_S)
        finally:
            self._blocked = False

    async def replace_overdue_forever(self) -> None:
        """End a read that still blocks after a task was enqueued here: its connection is dead, and no error came.

        With peers, one of them may have read the entry.
        """
        added = self._verbs.submit.added
        while True:
            await added.wait()
            added.clear()
            blocked, number = self._blocked, self._blocked_reads
            await asyncio.sleep(OVERDUE_S)
            if blocked and self._blocked and self._blocked_reads == number and self._alone():
                logger.debug("The blocked read returned nothing though a task waits; it is sent again")
                self._replaced = True
                self._connection.blocking_reads.abort()

    async def _deliver(self, entries: list[Entry], free: int) -> None:
        if len(entries) < free:
            self._verbs.depth.mark_empty()
        else:
            self._verbs.depth.claimed(len(entries))
        fresh = [entry for entry in entries if not self._dispatcher.redelivered(entry)]
        for claim in await self._leases.hold(fresh):
            self._dispatcher.put(claim)

    async def _recover(self, error: BaseException) -> None:
        """Create the group again if it is gone, and check for entries that were lost on the way."""
        is_group_gone, is_unblocked = any(word in str(error) for word in _GROUP_GONE), _UNBLOCKED in str(error)
        if isinstance(error, QueueUnavailable):
            await asyncio.sleep(0.1)
        elif unavailable(error):
            self._connection.health.failed(error)
            await asyncio.sleep(REFUSED_RETRY_S if self._connection.health.refused else 0.1)
        elif not is_group_gone and not is_unblocked:
            logger.error("The stream can't be read: {}", error)
            await asyncio.sleep(1.0)
        is_lost = is_group_gone or is_unblocked
        if is_lost:
            self.on_loss()
            await self._connection.recovered.wait()  # which creates the group
        is_created = await self._connection.retry_until_available(self._verbs.create_group)
        if is_created or is_group_gone:
            is_moving = not is_created and self._connection.servers.clustered  # a moving slot takes the stream along
            if not is_moving:
                logger.warning("The stream or its group was deleted; it is created again")
        if is_created and not is_lost:
            self.on_loss()
        self._leases.check_now()
