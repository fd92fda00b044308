"""Recovery from writes that Redis lost: each instance writes back what it has in memory.

Signs of a loss: a reconnect that leads to another server (a failover, a restart), a group or stream that is gone, a
claim that is not pending for us any more, a waiting task without its entry, and a peer's message.

Running claims come first, then results. Waiting tasks come last, after the peers had time for their claims, so that no
task that a peer runs is queued a second time. No paid call begins meanwhile.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterable, Sequence

from loguru import logger
from msgspec.structs import replace

from imagegen.errors import QueueUnavailable
from imagegen.queue.claim import Claim
from imagegen.queue.leases import Leases
from imagegen.queue.notifier import Message
from imagegen.queue.outbox import Outbox
from imagegen.queue.queue_verbs import QueueVerbs
from imagegen.queue.server_mark import ServerMark
from imagegen.queue.verbs.requeue import RequeueResult, WaitingLines
from imagegen.queue.verbs.restore_batch import in_batches
from imagegen.queue.verbs.restore_results import RestoredResult
from imagegen.redis_client.connection import Connection
from imagegen.redis_client.redis_errors import RedisError
from imagegen.redis_client.server_info import ServerInfo
from imagegen.tasks.task import IN_LINE, State, Task
from imagegen.tasks.webhook import merge_deliveries

SETTLE_S, MAX_SETTLE_S = 1.0, 5.0
"""How long peers have to write their running claims back: at least, unless all have done so on a server that is new
here, and at most while one has not answered."""

REST_S = 2.0
"""What a request waits for the rest of a recovery, once its peers had their time: it would fail just before its end."""

ASK_AGAIN_S = 0.4
"""Seconds after which peers that have not answered are asked again."""

NOTICE_S = 0.05
"""How long peers have to notice a loss before the stream exists again. Until then submits wait, since a new task may be
one that an instance runs."""

PEERS_LATER_S = 5.0

SAME_LOSS_S = 0.5
"""Instances notice the same loss within this time of each other; a later notice may be about another loss."""

RECENT_S = 600.0
"""Results of this age are always checked; older ones while some of the newer ones were missing."""

CHECK_AGAIN_S = 10.0
"""A waiting task that has its entry is checked again after this time, then after twice that, and so on."""


class Recovery:
    """Recovery of one instance. on_restored: called after each recovery.

    on_unstarted: called if a task has its entry although it should have been started.

    result_ttl_s: a record that is younger and missing was lost, and did not expire.
    """

    def __init__(
        self,
        connection: Connection,
        verbs: QueueVerbs,
        leases: Leases,
        outbox: Outbox,
        mark: ServerMark,
        *,
        result_ttl_s: float,
    ) -> None:
        self._connection = connection
        self._mark, self._awaited = mark, frozenset[str]()
        self._verbs = verbs
        self._task_cache, self._dispatcher, self._notifier = outbox.task_cache, leases.dispatcher, outbox.notifier
        self._outbox = outbox
        self._result_ttl_s = result_ttl_s
        self._clock = connection.clock
        self._meter = connection.meter
        self._noticed = asyncio.Event()
        self._running, self._group_known = False, asyncio.Event()
        self._publish = self._all_restored = False
        self._began_at = self._ended_at = self._noticed_at = -math.inf
        self._recovered_on = self._settled_on = ""
        self._has_moved = self._were_claims_lost = False
        self._restored_at: dict[str, float] = {}
        self._restored_on: dict[str, object] = {}
        self._check_at: dict[str, tuple[float, float]] = {}
        self._probing: asyncio.Task[None] | None = None
        self._checking_budgets: asyncio.Task[None] | None = None
        self._leases = leases
        self.on_restored: Callable[[], None] = lambda: None
        self.on_unstarted: Callable[[], None] = lambda: None

    def notice(self, cause: str, *, publish: bool = False) -> None:
        """Begin a recovery. publish: peers can't notice the cause themselves."""
        if not self._running:
            return
        logger.debug("Redis may have lost writes: {}", cause)
        if not self._noticed.is_set():
            self._noticed_at = time.monotonic()
        self._publish |= publish
        self._connection.recovered.clear()
        self._connection.unsettled_until = math.inf
        self._noticed.set()

    def on_new_server(self, _known: ServerInfo, _new: ServerInfo) -> None:
        self.notice("another server answers")

    def on_group_known(self) -> None:
        self._group_known.set()

    def on_group_lost(self) -> None:
        self.notice("the stream or its group was deleted", publish=True)

    def on_claims_lost(self) -> None:
        """Begin a recovery, unless one is writing claims back: then a renewal has found the same loss."""
        if self._connection.recovered.is_set() or self._all_restored or self._noticed.is_set():
            self.notice("claims were not pending any more", publish=True)
        else:
            self._were_claims_lost = True

    async def recover_forever(self) -> None:
        """Write back lost data, each time that a loss is noticed."""
        self._running = True
        try:
            await self._check_server()
            while True:
                await self._noticed.wait()
                self._noticed.clear()
                self._connection.recovered.clear()
                try:
                    await self._connection.retry_until_available(self._recover)
                except RedisError as error:
                    logger.error("Lost writes can't be written back: {}", error)
                self._ended_at = time.monotonic()
                if not self._noticed.is_set():
                    self._connection.unsettled_until = self._ended_at + PEERS_LATER_S
                    self._connection.recovered.set()
        finally:
            self._running = False
            self._connection.unsettled_until = self._ended_at + PEERS_LATER_S
            self._connection.recovered.set()

    async def _check_server(self) -> None:
        """Begin a recovery if the server has changed before the start: no call until others have written back to it."""
        self._connection.recovered.clear()
        try:
            self._awaited = await self._connection.retry_until_available(self._mark.awaited_instances)
        except RedisError as error:
            logger.error("The mark of the server can't be read from Redis: {}", error)
        self._settled_on = self._server
        if self._awaited:
            self.notice("the server is another one than before the start", publish=True)
        elif not self._noticed.is_set():
            self._connection.recovered.set()

    async def restore_claims(self, claims: Sequence[Claim]) -> tuple[int, list[Claim]]:
        """Restore claims. Return how many had something missing, and those that are not ours any more."""
        count, lost, written_meanwhile = 0, list[Claim](), list[Claim]()
        for batch in in_batches([self._with_webhooks(claim) for claim in claims]):
            self._dispatcher.restoring = True
            stored = [claim.stored_bytes for claim in batch]
            try:
                replies = await self._verbs.restore_claims(self._dispatcher.instance, batch)
            finally:
                self._dispatcher.restoring = False
            for claim, before, reply in zip(batch, stored, replies, strict=True):
                if self._dispatcher.held.get(claim.entry_id) is not claim:
                    continue
                if reply.kind == "lost":
                    lost.append(claim)
                    continue
                claim.confirmed_at = time.monotonic()
                if reply.kind == "restored":
                    count += 1
                    self._dispatcher.carry(claim, reply.entry_id)
                    if claim.stored_bytes == before:
                        claim.stored_bytes = reply.checkpoint or None
                    else:  # what was restored is older than what was written meanwhile
                        written_meanwhile.append(claim)
        self._meter.written_back["running"] += count
        if written_meanwhile:
            lost += (await self.restore_claims(written_meanwhile))[1]
        return count, lost

    @property
    def unsettled(self) -> bool:
        """Whether missing data may still be written back, here or by a slower peer."""
        return time.monotonic() < self._connection.unsettled_until

    async def wait_restored(self) -> None:
        """Let peers restore their running claims; not again within `MAX_SETTLE_S`. Raises QueueUnavailable."""
        if time.monotonic() - self._ended_at > MAX_SETTLE_S:
            self.notice("an unfinished task has no entry", publish=True)
        await self._within_limit(self._connection.recovered)

    async def wait_stream_restored(self) -> None:
        """Let all instances write back what they have, since the stream is gone. Raises QueueUnavailable."""
        if not self._running:
            await self._verbs.create_group()
            return
        if self._group_known.is_set() and self._connection.recovered.is_set():
            self.notice("the stream was deleted", publish=True)
        # This instance may just have started.
        await self._within_limit(self._group_known, self._connection.recovered)

    async def wait_record_restored(self) -> None:
        """Let all instances write back what they have, since a record is gone. Raises QueueUnavailable."""
        if self._connection.recovered.is_set():
            self.notice("the record of an unfinished task is gone", publish=True)
        await self._within_limit(self._connection.recovered)

    async def _within_limit(self, *events: asyncio.Event) -> None:
        """Wait for events. Raises QueueUnavailable after `MAX_SETTLE_S` and `REST_S`."""
        try:
            async with asyncio.timeout(MAX_SETTLE_S + REST_S):
                for event in events:
                    await event.wait()
        except TimeoutError:
            raise QueueUnavailable(headers={"Retry-After": "2"}) from None

    async def check_waiting(self, tasks: Iterable[Task]) -> None:
        """Begin a recovery if entries of waiting tasks are gone. Each task is checked less and less often.

        Nothing is checked while a recovery is under way: it ends with the entries of waiting tasks.
        """
        if not self._connection.recovered.is_set():
            return
        now, due = time.monotonic(), []
        for task in tasks:
            check_at, wait_s = self._check_at.get(task.id, (0.0, CHECK_AGAIN_S))
            if now >= check_at:
                self._check_at[task.id] = (now + wait_s, wait_s * 2)
                due.append(task)
        if len(self._check_at) > 2 * len(self._task_cache.live):
            self._check_at = {name: at for name, at in self._check_at.items() if name in self._task_cache.live}
        lines = WaitingLines()
        for batch in in_batches(self._restorable(due)):
            for task, reply in zip(batch, await self._verbs.check_requeue(batch, lines), strict=True):
                if reply.kind == "missing":
                    self.notice("waiting tasks have no entry", publish=True)
                else:
                    if reply.kind == "there" and reply.entry_id != IN_LINE:
                        self.on_unstarted()
                    self._take_in(task, reply)

    async def _recover(self) -> None:
        began, self._all_restored, server = time.monotonic(), False, self._server
        self._has_moved, self._recovered_on = bool(self._settled_on) and server != self._settled_on, server
        self._began_at = began
        if self._publish:
            self._publish_loss()
            await asyncio.sleep(NOTICE_S)
        running, lost = await self.restore_claims(list(self._dispatcher.held.values()))
        await self._verbs.create_group()
        await self._restore_budgets()
        await self._leases.lost_claims.abandon(lost)
        finished = await self._restore_results()
        self._all_restored = True
        self._publish_restored()
        if (running or finished or self._were_claims_lost) and not self._publish:
            self._publish_loss()
        self._were_claims_lost = False
        await self._settle(began)
        self._publish = False
        waiting = await self._requeue(self._waiting())
        self._leases.check_now()
        if names := self._outbox.names:
            await self._verbs.restore_outbox(names)
        await self._leases.lost_claims.record_again()
        self._awaited, self._settled_on = frozenset(), server
        await self._mark.write()
        self.on_restored()
        if running or finished or waiting:
            text = "Redis lost writes; written back from memory: {} waiting, {} running and {} finished tasks"
            logger.warning(text, waiting, running, finished)

    async def _restore_results(self) -> int:
        now, count = self._clock(), 0
        for batch in in_batches(self._task_cache.results()):
            replies = await self._verbs.restore_results(batch, now)
            missing = sum(reply in {RestoredResult.MISSING, RestoredResult.OUTDATED} for reply in replies)
            for task, reply in zip(batch, replies, strict=True):
                if reply is RestoredResult.OTHER:
                    self._task_cache.forget(task.id)
                    self._leases.lost_claims.keep(task, 1)
            self._meter.vanished += replies.count(RestoredResult.MISSING)
            self._meter.written_back["finished"] += missing
            count += missing
            if not missing and (batch[-1].finished_at or now) < now - RECENT_S:
                break
        return count

    async def _settle(self, began: float) -> None:
        """Wait until the peers have restored their running claims. Messages may be lost while connections change."""
        ask_at = ASK_AGAIN_S
        while (passed_s := time.monotonic() - began) < MAX_SETTLE_S:
            peers = {*self._notifier.peers, *self._awaited}
            if not self._notifier.silent:
                if self._has_moved and all(self._restored_on.get(peer) == self._recovered_on for peer in peers):
                    return
                if passed_s >= SETTLE_S and all(self._restored_at.get(peer, 0.0) > began - SETTLE_S for peer in peers):
                    return
            if passed_s >= ask_at:
                ask_at = passed_s + ASK_AGAIN_S
                self._publish_restored()
                self._publish_loss()
            await asyncio.sleep(0.05)

    def _waiting(self) -> list[Task]:
        """Return waiting tasks that were submitted here."""
        claimed = self._dispatcher.claimed
        return [task for task in self._task_cache.live.values() if task.id not in claimed]

    async def _requeue(self, tasks: Sequence[Task]) -> int:
        count, lines = 0, WaitingLines()
        for batch in in_batches(self._restorable(tasks)):
            for task, reply in zip(batch, await self._verbs.requeue(batch, lines), strict=True):
                self._meter.vanished += reply.record_missing
                self._take_in(task, reply)
                count += reply.kind == "queued"
        self._meter.written_back["waiting"] += count
        return count

    def _restorable(self, tasks: Iterable[Task]) -> list[Task]:
        """Return tasks that can be queued again: a missing record was lost, and did not finish and expire."""
        oldest = self._clock() - self._result_ttl_s
        waiting = (task for task in tasks if task.request_json and task.state is State.PENDING)
        return [task for task in waiting if task.created_at > oldest]

    def _take_in(self, task: Task, reply: RequeueResult) -> None:
        if reply.kind == "over":
            self._task_cache.forget(task.id)
        elif reply.kind in ("queued", "there"):
            self._moved(task, reply.entry_id, fresh=reply.kind == "queued")

    def _moved(self, task: Task, entry_id: str, *, fresh: bool) -> None:
        """Record the entry that carries a waiting task now."""
        if self._task_cache.live.get(task.id) is not task or task.id in self._dispatcher.claimed:
            return
        waiting = self._dispatcher.estimates.waiting
        if entry_id != task.entry_id:
            waiting.remove(task.entry_id)
            self._task_cache.put(replace(task, entry_id=entry_id))
            if fresh and entry_id != IN_LINE:
                waiting.add(entry_id)

    def _with_webhooks(self, claim: Claim) -> Claim:
        """Copy webhooks that were added later into the claim: their log may be lost too."""
        cached = self._task_cache.live.get(claim.task.id)
        if cached is not None and cached.epoch == claim.task.epoch and cached.deliveries:
            claim.task = replace(claim.task, deliveries=merge_deliveries(claim.task.deliveries, cached.deliveries))
        return claim

    @property
    def _server(self) -> str:
        """The run id of the server that answered last, empty if it is unknown."""
        server = self._connection.server
        return server.run_id if server else ""

    def _publish_loss(self) -> None:
        """Publish the loss, with the server, whether it is new here, and the seconds since the loss was noticed."""
        age_s = time.monotonic() - self._noticed_at
        self._notifier.publish("lost", server=self._server, age_s=age_s, moved=self._has_moved)

    def on_loss_elsewhere(self, message: Message) -> None:
        """Begin a recovery, unless a running or just ended one covers the same loss."""
        if self._covers(message):
            if self._connection.recovered.is_set():
                self._connection.unsettled_until = time.monotonic() + PEERS_LATER_S
                self._publish_restored()
        else:
            self.notice("a peer noticed a loss")

    def _covers(self, message: Message) -> bool:
        """Return whether the last recovery began after the loss, or one is about to begin."""
        if self._noticed.is_set():
            return True
        if message.get("server", self._recovered_on) != self._recovered_on:
            return False
        if (
            message.get("moved") is True and self.unsettled
        ):  # it came to this server later, and claims are still checked
            return True
        age_s = message.get("age_s")
        if isinstance(age_s, int | float):
            return time.monotonic() - age_s < self._began_at + SAME_LOSS_S
        running = not self._connection.recovered.is_set()  # a peer of 0.5.1 or before
        return running or time.monotonic() - self._ended_at <= MAX_SETTLE_S

    def on_peer_joined(self) -> None:
        """Publish again what a new peer may wait for."""
        if self._all_restored and self.unsettled:
            self._publish_restored()

    def _publish_restored(self) -> None:
        self._notifier.publish("restored", server=self._recovered_on)

    def on_restored_elsewhere(self, message: Message) -> None:
        peer = str(message.get("from"))
        self._restored_at[peer], self._restored_on[peer] = time.monotonic(), message.get("server")
        self._leases.check_now()

    def probe(self) -> None:
        """Check the shared connection after the subscription was renewed: it may lead to another server."""
        if self._probing is None or self._probing.done():
            self._probing = asyncio.create_task(self._ping(), name="recovery-probe")

    def on_fewer_changes(self) -> None:
        """Check whether the budgets were lost alone, as by an eviction; then other keys may be lost too."""
        if self._checking_budgets is None or self._checking_budgets.done():
            self._checking_budgets = asyncio.create_task(self._check_budgets(), name="budgets-check")

    async def _check_budgets(self) -> None:
        try:
            if await self._restore_budgets():
                self.notice("the budgets were lost", publish=True)
        except (RedisError, QueueUnavailable, OSError):
            logger.debug("Redis does not answer the check of the budgets")

    async def _restore_budgets(self) -> bool:
        is_lost = await self._verbs.restore_budgets() > 0
        if is_lost:
            logger.warning("Redis lost a part of the budgets; they hold what this instance last saw, or more")
        return is_lost

    async def _ping(self) -> None:
        try:
            await self._connection.multiplexer.execute("PING")
        except (RedisError, QueueUnavailable, OSError):
            logger.debug("Redis does not answer the probe")
