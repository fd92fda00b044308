"""Takeover of claims that their owners stopped to renew, and removal of consumers that are gone.

The idle time of an entry is measured by Redis, also while no instance can reach Redis, or while Redis refuses writes.
So an expired entry is taken only after Redis has accepted writes for `CONFIRM_S`: a living owner renews within that
time. After an outage that this instance noticed, owners have a whole lease.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from itertools import islice

from loguru import logger

from imagegen.errors import QueueUnavailable
from imagegen.line_limit import LineLimit
from imagegen.queue.claim import Claim, lease_of, take_over_state
from imagegen.queue.leases import Leases
from imagegen.queue.notifier import Message, Notifier
from imagegen.queue.queue_verbs import QueueVerbs
from imagegen.queue.skipped import SkippedEntries
from imagegen.queue.verbs.compare_and_set import CompareAndSetItem
from imagegen.queue.verbs.consume import Entry
from imagegen.queue.verbs.group import Consumer, PendingEntry
from imagegen.redis_client.connection import Connection
from imagegen.redis_client.redis_errors import RedisError

EARLY_S, FIRST_CHECK_S, EARLY_CHECK_S, CHECK_S = 120.0, 6.0, 30.0, 180.0
"""Orphans are likely just after a start; later checks cover lost messages of peers."""

UNDELIVERED_AFTER_S = 1.0
"""An entry that is pending for us for this time, and that we do not hold, was lost on its way to us."""

CONFIRM_S = 3.5
"""A try to renew that gets no answer takes 2 s, and the next one follows within 1 s."""

GONE_S, SILENT_S = 5.0, 65.0
"""Seconds without a command after which a consumer without claims is gone: if no peer has its name, and always.

A living one reads every 57 s.
"""

LENGTH_CHECKS = 3
"""Of this number of regular checks one counts the entries, not the consumers, to find those that nothing delivers."""

UNPROMPTED_CHECK_S = 10.0
"""Shortest interval of checks if Redis refuses the channel of the instances; else a lease."""

FIRST_TAKEN, MAX_TAKEN, MAX_TAKEN_BYTES = 16, 100, 2**21
"""Entries that one command takes over, since their requests come with them: at first; at most; and their bytes, as far
as the entries before show their size."""


class Takeover:
    """Loop that takes over expired claims.

    lease_s: how long a claim of this instance lives unrenewed. on_takeover: called when claims of another instance
    were taken.
    on_gone: awaited with the names of consumers before they are removed, since their instances seem to be gone.
    """

    def __init__(
        self, connection: Connection, verbs: QueueVerbs, leases: Leases, notifier: Notifier, lease_s: float
    ) -> None:
        self._connection = connection
        self._verbs = verbs
        self._leases = leases
        self._dispatcher = leases.dispatcher
        self._notifier = notifier
        self._lease_s = lease_s
        self._skipped = SkippedEntries(verbs, connection.health, lease_s)
        self._checks = 0
        self._confirm_s = min(CONFIRM_S, lease_s)
        self._answering_since = self._answered_at = -math.inf
        self._expired: dict[str, float] = {}
        """Monotonic time of the last renewal by entry id; the oldest entry first."""
        self._owners: dict[str, str] = {}
        """The consumer of each expired claim."""
        self._proven: set[str] = set()
        self._renewed_at: dict[str, float] = {}
        """Monotonic time of the last renewal of entries that we tried to take, since Redis forgets it then."""
        self._begun: set[str] = set()
        """Entries of tasks that were begun, by the last check."""
        self._never_idle: dict[str, str] = {}
        """Consumer by id of the entries that had no idle time at the last look."""
        self._peer_timer: asyncio.TimerHandle | None = None
        self._peer_until = -math.inf
        self._lines = LineLimit(lambda _, count: logger.info("Took over {} more tasks", count))
        self.on_takeover: Callable[[], None] = lambda: None
        self.on_gone: Callable[[Sequence[str]], Awaitable[None]] = _do_nothing

    async def take_over_forever(self) -> None:
        """Check for expired claims: at the start, when the earliest lease ends, and now and then."""
        began = time.monotonic()
        check_s, step = FIRST_CHECK_S, self._check
        while True:
            try:
                next_s = await self._connection.retry_until_available(self._verbs.with_key_repair, step)
            except RedisError as error:
                self._verbs.unreadable.report("takeover", type(error).__name__, error)
                next_s = EARLY_CHECK_S
            step = self._look
            next_s = min(next_s, await self._take_skipped())
            if self._notifier.silent:  # no peer publishes that it is busy
                check_s = min(check_s, max(self._lease_s, UNPROMPTED_CHECK_S))
            try:
                async with asyncio.timeout(min(next_s, check_s)):
                    await self._leases.look.wait()
            except TimeoutError:
                if next_s >= check_s:
                    step = self._check
                    check_s = EARLY_CHECK_S if time.monotonic() - began < EARLY_S else CHECK_S
                elif self._expired:
                    step = self._continue_check
            self._leases.look.clear()

    async def reclaim_undelivered(self) -> None:
        """Claim entries that were read for us and lost on the way, so that they can be released."""
        renewal = await self._verbs.renew(self._dispatcher.instance, self._dispatcher.ids())
        await self.take(dict.fromkeys(renewal.unlisted, 0.0), min_idle_s=0.0)

    async def take(self, idle_s: dict[str, float], *, min_idle_s: float) -> list[Claim]:
        """Claim those of the entries that were not renewed for `min_idle_s`, with what their owners had done.

        Args:
            idle_s: seconds since the last renewal, by entry id.
        """
        now = time.monotonic()
        for entry_id, idle in idle_s.items():
            self._renewed_at[entry_id] = min(now - idle, self._renewed_at.get(entry_id, math.inf))
        taken: list[Claim] = []
        try:
            async for entries in self._claim(list(idle_s), min_idle_s):
                taken += await self._hold_entries(entries)
        except BaseException:
            for claim in taken:  # no loop will run them; the next check finds them again
                self._dispatcher.forget(claim)
            raise
        return taken

    async def take_given(self, giver: str, entry_ids: Sequence[str]) -> list[Claim]:
        """Claim entries that another instance gives to this one, at most `MAX_TAKEN`, with its state of them."""
        now = time.monotonic()
        for entry_id in entry_ids:
            self._renewed_at[entry_id] = now
        claims = await self._hold_entries(await self._verbs.take_given(giver, self._dispatcher.instance, entry_ids))
        for entry_id in entry_ids:
            self._renewed_at.pop(entry_id, None)
        return claims

    async def _hold_entries(self, entries: Sequence[Entry]) -> list[Claim]:
        """Hold entries that are ours now. No other instance checks them, so retry until the checkpoints are read.

        If that is interrupted nothing is held: a claim that is released without its checkpoint would be paid for again.
        """
        try:
            claims = await self._leases.hold(entries)
            ids = [claim.task.id for claim in claims]
            retry = self._connection.retry_until_available
            checkpoints = await retry(self._verbs.read_checkpoints, ids) if ids else []
            await asyncio.gather(*map(self._inherit, claims, checkpoints))
        except BaseException:
            for entry_id, _ in entries:
                if claim := self._dispatcher.held.get(entry_id):
                    self._dispatcher.forget(claim)
            raise
        return claims

    async def _inherit(self, claim: Claim, existing: bytes | None) -> None:
        """Write the previous owner's progress as our checkpoint, so that it survives our death before the start."""
        idle_s = time.monotonic() - self._renewed_at.pop(claim.entry_id, math.inf)
        begun = claim.entry_id in self._begun
        cut_off = take_over_state(claim, existing, idle_s, self._lease_s, begun=begun)
        self._count(claim, cut_off=cut_off)
        while cut_off or existing is not None:
            checkpoint = claim.checkpoint
            value = checkpoint.encode(claim.entry_id)
            item = CompareAndSetItem(claim.task.id, existing or b"", value, "takeover")
            existing = await self._connection.retry_until_available(self._verbs.compare_and_set, item)
            if not existing:
                claim.stored_bytes, claim.stored_checkpoint = value, checkpoint
                return
            self._count(claim, cut_off=take_over_state(claim, existing, idle_s, self._lease_s))

    def _count(self, claim: Claim, *, cut_off: bool) -> None:
        """Count a call that may have been paid, unless its job is searched for first."""
        self._connection.meter.ambiguous += cut_off and claim.checkpoint.sent is None

    async def _check(self) -> float:
        """Check the consumers, and their claims only if another one has some, or ours were lost."""
        self._checks += 1
        length = await self._verbs.length() if self._checks % LENGTH_CHECKS == 2 else None
        if length == 0:
            return CHECK_S
        consumers = await self._verbs.consumers()
        if length is not None and length > sum(consumer.pending for consumer in consumers):
            self._skipped.suspect()
        peers = [consumer for consumer in consumers if consumer.name != self._dispatcher.instance]
        gone_names = [consumer.name for consumer in peers if self._is_gone(consumer)]
        if gone_names:
            await self.on_gone(gone_names)
            await self._verbs.retire(gone_names)
        own_pending = sum(consumer.pending for consumer in consumers if consumer.name == self._dispatcher.instance)
        if any(consumer.pending for consumer in peers) or own_pending > len(self._dispatcher.held):
            return await self._look()
        return CHECK_S

    def _is_gone(self, consumer: Consumer) -> bool:
        if consumer.pending:
            return False
        silent_s = SILENT_S if consumer.name in self._notifier.peers else GONE_S
        return consumer.idle_s >= silent_s

    async def _look(self) -> float:
        """Check all claimed entries. Return the seconds until there may be one to take over."""
        dispatcher = self._dispatcher
        sent_at = time.monotonic()
        rows = [row for row in await self._verbs.pending_entries() if row.entry_id not in dispatcher.skipped_entry_ids]
        self._begun = {row.entry_id for row in rows if row.begun}
        strays = [row for row in rows if row.consumer == dispatcher.instance and row.entry_id not in dispatcher.held]
        peer_rows = [row for row in rows if row.consumer != dispatcher.instance]
        self._renewed_at = {row.entry_id: at for row in rows if (at := self._renewed_at.get(row.entry_id))}
        self._offer(
            await self.take(
                _idle(row for row in strays if row.idle_s >= UNDELIVERED_AFTER_S), min_idle_s=UNDELIVERED_AFTER_S
            )
        )
        self._owners = {row.entry_id: row.consumer for row in peer_rows if row.idle_s >= self._lease_of(row.consumer)}
        self._expired = {row.entry_id: sent_at - row.idle_s for row in peer_rows if row.entry_id in self._owners}
        self._proven &= self._expired.keys()
        await self._renew_ahead(peer_rows)
        if self._expired:
            if not self._proven.issuperset(self._expired):
                await self._connection.learn_time()
            return await self._prove_and_take(sent_at)
        if strays:
            return UNDELIVERED_AFTER_S
        left_s = (self._lease_of(row.consumer) - row.idle_s for row in peer_rows)
        return max(min(left_s, default=CHECK_S), 0.0) + 0.02

    def _lease_of(self, consumer: str) -> float:
        return lease_of(consumer, self._lease_s)

    async def _renew_ahead(self, rows: Sequence[PendingEntry]) -> None:
        """Renew claims that had no idle time twice in a row: the server's clock went back behind their last renewal.

        Else their lease would end when the clock has caught up. A live owner's claim gets idle time between renewals.
        """
        fresh = {row.entry_id: row.consumer for row in rows if row.idle_s <= 0.0}
        for entry_id, consumer in fresh.items():
            if self._never_idle.get(entry_id) == consumer:
                await self._verbs.transfer_entry(consumer, entry_id)
        self._never_idle = fresh

    async def _continue_check(self) -> float:
        """Continue with the expired entries. Return the seconds until the next step."""
        sent_at = time.monotonic()
        if not self._proven.issuperset(self._expired):
            await self._verbs.probe_claim(self._dispatcher.instance, next(iter(self._expired)))
        return await self._prove_and_take(sent_at)

    async def _prove_and_take(self, sent_at: float) -> float:
        if not self._proven.issuperset(self._expired):
            left_s = self._until_proven_s(sent_at)
            if left_s > 0:
                return self._probe_in_s(left_s)
            self._proven = set(self._expired)
        try:
            return await self._take_expired()
        except QueueUnavailable:
            self._proven.clear()  # the owners could not renew either
            raise

    def _until_proven_s(self, sent_at: float) -> float:
        """Return for how many seconds Redis must still answer, after the reply to a command of `sent_at`."""
        health = self._connection.health
        back_at = health.back_at
        if sent_at - self._answered_at > self._confirm_s / 2 or back_at > self._answering_since:
            self._answering_since = sent_at
        self._answered_at = now = time.monotonic()
        if now - sent_at > self._confirm_s / 2 or health.down_since is not None:
            self._answering_since = now
        jumped_at = self._connection.clock.jumped_at  # then all claims look as old as the jump
        lease_s = max(self._lease_s, *map(self._lease_of, self._owners.values()))
        return max(self._answering_since + self._confirm_s, back_at + lease_s, jumped_at + lease_s) - now

    def _probe_in_s(self, left_s: float) -> float:
        """Return when to ping Redis again: often in the last seconds, and not before."""
        return max(left_s - self._confirm_s * 1.25, min(self._confirm_s / 4, left_s))

    async def _take_expired(self) -> float:
        """Take as many expired entries as there is capacity for. Return the seconds until the next step."""
        if capacity := self._capacity:
            await self._forget_taken()
        now = time.monotonic()
        taken = {entry_id: now - renewed_at for entry_id, renewed_at in islice(self._expired.items(), capacity)}
        leases = {entry_id: self._lease_of(self._owners[entry_id]) for entry_id in taken}
        for lease_s in sorted(set(leases.values())):
            of_lease = {entry_id: idle for entry_id, idle in taken.items() if leases[entry_id] == lease_s}
            claims = await self.take(of_lease, min_idle_s=lease_s)
            for entry_id in of_lease:
                del self._expired[entry_id]
            self._offer(claims)
            if claims:
                self.on_takeover()
        if self._expired:
            return UNDELIVERED_AFTER_S / 10 if capacity else UNDELIVERED_AFTER_S / 2
        return 0.0

    async def _forget_taken(self) -> None:
        """Forget expired claims that another instance has taken meanwhile.

        Redis does not move a claim that was renewed within the lease of its former owner. A new owner with a longer
        lease renews less often, so its claim would be taken. If all leases are equal, this costs no command.
        """
        consumers = {self._dispatcher.instance, *self._notifier.peers, *self._owners.values()}
        if len(set(map(self._lease_of, consumers))) == 1 and not self._notifier.silent:
            return
        owners = {row.entry_id: row.consumer for row in await self._verbs.pending_entries()}
        for entry_id in list(self._expired):
            if owners.get(entry_id) != self._owners[entry_id]:
                del self._expired[entry_id]

    def suspect_skipped(self) -> None:
        """Search for entries that nothing delivers: a task was delivered long ago, and is not started."""
        self._skipped.suspect()
        self._leases.check_now()

    async def _take_skipped(self) -> float:
        """Claim entries that nothing delivers, if any are suspected. Return the seconds until the next search."""
        skipped, dispatcher = self._skipped, self._dispatcher
        if skipped.look_at > time.monotonic():
            return skipped.look_at - time.monotonic()
        try:
            entry_ids = await self._connection.retry_until_available(skipped.find)
        except RedisError as error:
            self._verbs.unreadable.report("skipped", type(error).__name__, error)
            return CHECK_S
        capacity = max(dispatcher.free_slots, dispatcher.slots - dispatcher.ready)
        if entry_ids[capacity:]:
            skipped.keep()
        claims = (
            await self._connection.retry_until_available(self._take_unheld, entry_ids[:capacity])
            if capacity > 0
            else []
        )
        if claims:
            logger.warning("Redis would not have delivered {} waiting tasks any more; they run now", len(claims))
        self._offer(claims)
        return max(skipped.look_at - time.monotonic(), 0.0)

    async def _take_unheld(self, entry_ids: Sequence[str]) -> list[Claim]:
        """Claim entries that have no claim, with what their last owners had done."""
        now = time.monotonic()
        claims: list[Claim] = []
        self._renewed_at |= dict.fromkeys(entry_ids, now - self._lease_s)
        async for entries in self._claim(entry_ids, self._lease_s, force=True):
            claims += await self._hold_entries(entries)
        return claims

    async def _claim(
        self, entry_ids: Sequence[str], min_idle_s: float, *, force: bool = False
    ) -> AsyncIterator[list[Entry]]:
        """Claim entries by commands of about `MAX_TAKEN_BYTES`; yield those of each command."""
        first, most = 0, FIRST_TAKEN
        while page := entry_ids[first : first + most]:
            entries = await self._verbs.claim_expired(self._dispatcher.instance, page, min_idle_s, force=force)
            size = sum(len(value) for _, fields in entries for value in fields.values())
            first += most
            most = max(min(2 * most, MAX_TAKEN, MAX_TAKEN_BYTES * len(entries) // max(size, 1)), 1) if size else most
            yield entries

    @property
    def _capacity(self) -> int:
        """Entries to take: for free slots; if none was free for a while, some for the next ones."""
        dispatcher = self._dispatcher
        now = time.monotonic()
        waited_s = max(now - at - self._lease_of(self._owners[entry_id]) for entry_id, at in self._expired.items())
        if waited_s < self._confirm_s * 2:
            return dispatcher.free_slots
        return max(dispatcher.free_slots, dispatcher.slots - dispatcher.ready)

    def _offer(self, claims: Sequence[Claim]) -> None:
        for claim in claims:
            if self._lines.admits():
                logger.bind(taskId=claim.task.id).info("Took over a task whose owner did not renew its lease")
            self._connection.meter.takeovers += 1
            self._dispatcher.put(claim)

    def on_peer_busy(self, message: Message) -> None:
        """Schedule a check after one lease of the peer. An earlier check stays, and another one follows it."""
        loop = asyncio.get_running_loop()
        until = loop.time() + self._lease_of(str(message["from"]))
        self._peer_until = max(self._peer_until, until)
        if self._peer_timer is None or self._peer_timer.when() > until:
            if self._peer_timer is not None:
                self._peer_timer.cancel()
            self._peer_timer = loop.call_at(until, self._look_at_peers)

    def _look_at_peers(self) -> None:
        self._peer_timer = None
        self._leases.look.set()
        loop = asyncio.get_running_loop()
        if self._peer_until > loop.time():
            self._peer_timer = loop.call_at(self._peer_until, self._look_at_peers)


def _idle(rows: Iterable[PendingEntry]) -> dict[str, float]:
    return {row.entry_id: row.idle_s for row in rows}


async def _do_nothing(_names: Sequence[str]) -> None:
    return
