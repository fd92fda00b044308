"""Leases of the claims that this instance holds, and their renewal."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence

from loguru import logger

from imagegen.queue.claim import Claim
from imagegen.queue.dispatcher import ClaimDispatcher
from imagegen.queue.lost_claims import LostClaims
from imagegen.queue.notifier import Notifier
from imagegen.queue.queue_verbs import QueueVerbs
from imagegen.queue.verbs.consume import Entry
from imagegen.queue.verbs.restore_results import RestoredResult
from imagegen.redis_client.connection import Connection
from imagegen.redis_client.redis_errors import RedisError, shown
from imagegen.tasks.task import Task


class Leases:
    """Claims of this instance and their renewal. look: set when there may be claims to take over.

    lease_s: how long a claim lives unrenewed. restore: awaited with claims of which Redis has lost something; returns
    the number of restored ones, and the lost ones. on_loss: called if any was restored.
    """

    def __init__(
        self, connection: Connection, verbs: QueueVerbs, dispatcher: ClaimDispatcher, notifier: Notifier, lease_s: float
    ) -> None:
        self._connection = connection
        self._verbs = verbs
        self.dispatcher = dispatcher
        self._lease_s = lease_s
        self.lost_claims = LostClaims(verbs, dispatcher, notifier)
        self.look = asyncio.Event()
        self._notifier = notifier
        self._published_busy_at = -math.inf
        self.restore: Callable[[Sequence[Claim]], Awaitable[tuple[int, list[Claim]]]] | None = None
        self.on_loss: Callable[[], None] = lambda: None

    def check_now(self) -> None:
        """Check for claims to take over."""
        self.look.set()

    async def hold(self, entries: Iterable[Entry]) -> list[Claim]:
        """Return claims of entries; move unreadable ones to the dead-letter list."""
        claims, unreadable = self.dispatcher.hold(entries)
        if ended := {claim: result for claim in claims if (result := self.dispatcher.result_of(claim.task))}:
            claims = [claim for claim in claims if claim not in ended]
            await self._end_again(ended)
        for entry_id, error in unreadable:
            self._verbs.unreadable.report_entry(entry_id, error)
            await self._connection.retry_until_available(
                self._verbs.with_key_repair, self._verbs.dead_letter, entry_id, error
            )
        if claims:
            self._publish_busy()
        return claims

    async def _end_again(self, ended: Mapping[Claim, Task]) -> None:
        """Write back the results of tasks that ended here, and delete their entries: Redis may have an older state.

        If it has their results, they ended while the reply with their entries was on its way, as by a cancel.
        """
        for claim in ended:
            self.dispatcher.forget(claim)
        now = self._connection.clock()
        retry = self._connection.retry_until_available
        replies = await retry(self._verbs.restore_results, list(ended.values()), now)
        await retry(self._verbs.delete_entries, [claim.entry_id for claim in ended])
        if lost := sum(reply is not RestoredResult.PRESENT for reply in replies):
            logger.warning("Redis would have run {} finished tasks once more; their results are kept", lost)
            self.on_loss()

    async def record_lost(self, claim: Claim) -> None:
        """Record the calls of a lost claim that are not counted elsewhere, once Redis is available."""
        try:
            await self._connection.retry_until_available(self.lost_claims.record, claim)
        except RedisError as error:
            fault = shown(error)
            logger.bind(taskId=claim.task.id).error("A call that may be paid twice can't be recorded: {}", fault)

    def _publish_busy(self) -> None:
        """Publish once a lease that this instance has claims, so that peers check a lease later."""
        now = time.monotonic()
        if now - self._published_busy_at > self._lease_s * 0.8:
            self._published_busy_at = -math.inf if self._notifier.alone else now
            self._notifier.publish("busy")

    def on_peer_joined(self) -> None:
        """Publish to a new peer that this instance has claims."""
        if self.dispatcher.held:
            self._published_busy_at = -math.inf
            self._publish_busy()

    async def renew_forever(self) -> None:
        """Renew all claims three times a lease; costs nothing without claims."""
        dispatcher = self.dispatcher
        while True:
            while not dispatcher.held:
                dispatcher.non_empty.clear()
                await dispatcher.non_empty.wait()
            await asyncio.sleep(self._lease_s / 3)
            if dispatcher.held:
                try:
                    await self._connection.retry_until_available(self._verbs.with_key_repair, self._renew)
                except RedisError as error:
                    self._verbs.unreadable.report("renewal", type(error).__name__, error)

    async def _renew(self) -> None:
        claims, sent_at = self.dispatcher.held, time.monotonic()
        renewed = list(claims.values())
        renewal = await self._verbs.renew(self.dispatcher.instance, self.dispatcher.ids())
        for claim in renewed:
            if claim.entry_id not in renewal.lost:
                claim.confirmed_at = sent_at
        lost = [claim for claim in renewed if claim.entry_id in renewal.lost and not claim.ending]
        evicted = [claims[entry_id] for entry_id in renewal.without_checkpoint if entry_id in claims]
        if lost and self.restore is not None:
            restored, lost = await self.restore(lost)
            if restored:
                self.on_loss()
        if evicted and self.restore is not None:  # no sign of another loss: Redis evicts single keys
            lost += (await self.restore(evicted))[1]
        await self.lost_claims.abandon(lost)
        self.dispatcher.renewals.set()
        self.dispatcher.renewals.clear()
        if set(renewal.unlisted) - self.dispatcher.skipped_entry_ids:
            self.look.set()
