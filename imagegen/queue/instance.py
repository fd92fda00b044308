"""Owns the wiring of the queue room: one connection and the parts that share it."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Coroutine
from dataclasses import dataclass

from imagegen.queue.change_relay import ChangeRelay
from imagegen.queue.claim import Claim
from imagegen.queue.client_queue import ClientQueue
from imagegen.queue.consumer import StreamConsumer
from imagegen.queue.delivery_store import DeliveryStore
from imagegen.queue.depth import DepthEstimate
from imagegen.queue.dispatcher import ClaimDispatcher
from imagegen.queue.eta import EtaEstimator
from imagegen.queue.feed import Feed
from imagegen.queue.idempotency import IdempotencyKeys
from imagegen.queue.interrupted import Interrupted
from imagegen.queue.leases import Leases
from imagegen.queue.monitor import QueueMonitor
from imagegen.queue.notifier import Notifier
from imagegen.queue.outbox import Outbox
from imagegen.queue.recovery import Recovery
from imagegen.queue.scripts import Scripts
from imagegen.queue.takeover import Takeover
from imagegen.queue.task_cache import TaskCache
from imagegen.queue.task_list import TaskList
from imagegen.queue.task_lookup import TaskLookup
from imagegen.queue.verbs.context import VerbContext
from imagegen.queue.worker_queue import WorkerQueue
from imagegen.redis_client.connection import Connection
from imagegen.redis_client.keys import Keys


@dataclass(frozen=True, slots=True)
class QueueConfig:
    """prefix: of every key; record_life_s: how long an unfinished task's record is kept at most; slots: tasks that are
    worked on at once; deadline_s: from the submit of a task to its end."""

    prefix: str
    lease_s: float
    result_ttl_s: float
    record_life_s: float
    max_queue: int
    slots: int = 5
    deadline_s: float = 3600.0


@dataclass(frozen=True, slots=True)
class QueueInstance:
    """The parts: `queue` for clients' requests, `claims` for the pool."""

    connection: Connection
    keys: Keys
    scripts: Scripts
    task_cache: TaskCache
    dispatcher: ClaimDispatcher
    worker_queue: WorkerQueue
    client_queue: ClientQueue
    consumer: StreamConsumer
    leases: Leases
    takeover: Takeover
    notifier: Notifier
    feed: Feed
    change_relay: ChangeRelay
    monitor: QueueMonitor
    outbox: Outbox
    recovery: Recovery

    def loops(self) -> dict[str, Coroutine[None, None, None]]:
        """The side loops by name; `reader` is to be stopped before `leave`."""
        return {
            "reader": self.consumer.read_forever(),
            "renewal": self.leases.renew_forever(),
            "takeover": self.takeover.take_over_forever(),
            "control": self.notifier.listen_forever(),
            "watching": self.change_relay.refresh_forever(),
            "recovery": self.recovery.recover_forever(),
            "outbox": self.outbox.take_over_forever(),
            "outbox-renewal": self.outbox.renew_forever(),
            "outbox-refill": self.outbox.refill_forever(),
        }

    async def release_idle(self, working: Collection[Claim]) -> None:
        """Hands back all that is held and that no loop works on, also what was read and got lost on the way.

        The reader is to be stopped before. Raises QueueUnavailable.
        """
        await self.takeover.reclaim_undelivered()
        await self.worker_queue.release([claim for claim in self.dispatcher.held.values() if claim not in working])

    async def release_all(self) -> None:
        """Hands back all that is held, and our name. Raises QueueUnavailable."""
        await self.takeover.reclaim_undelivered()
        await self.worker_queue.release(list(self.dispatcher.held.values()), leaving=True)
        await self.outbox.release()
        self.notifier.publish("bye")
        await self.notifier.flush()


def open_queue(
    connection: Connection, rules: QueueConfig, *, instance: str, clock: Callable[[], float] | None = None
) -> QueueInstance:
    """Wires the parts; nothing is asked of Redis yet. `instance`: our consumer name, unlike any other's."""
    clock = clock or connection.clock
    keys = Keys(rules.prefix)
    context = VerbContext.create(
        connection,
        keys,
        record_life_s=rules.record_life_s,
        result_ttl_s=rules.result_ttl_s,
        lease_s=rules.lease_s,
    )
    scripts = Scripts(context, DepthEstimate(rules.max_queue))
    task_cache = TaskCache(clock=clock, monotonic=time.monotonic)
    estimates = EtaEstimator(rules.slots)
    dispatcher = ClaimDispatcher(task_cache, estimates, instance, rules.slots)
    notifier = Notifier(connection, keys, instance)
    leases = Leases(connection, scripts, dispatcher, notifier, rules.lease_s)
    outbox = Outbox(connection, DeliveryStore(context), scripts, task_cache, notifier, clock=clock)
    takeover = Takeover(connection, scripts, leases, notifier, rules.lease_s)
    takeover.on_takeover = outbox.check_now
    interrupted = Interrupted(
        scripts, task_cache, notifier, deadline_s=rules.deadline_s, result_ttl_s=rules.result_ttl_s, clock=clock
    )
    lookup = TaskLookup(
        scripts, task_cache, dispatcher, notifier, elsewhere=outbox.is_owned_elsewhere, interrupted=interrupted
    )
    recovery = Recovery(connection, scripts, leases, outbox, result_ttl_s=rules.result_ttl_s, clock=clock)
    queue = ClientQueue(scripts, lookup, result_ttl_s=rules.result_ttl_s, clock=clock)
    queue.idempotency, queue.listing = IdempotencyKeys(connection, keys), TaskList(connection, keys)
    queue.outbox = outbox
    queue.on_gone = recovery.wait_restored
    lookup.recovering = lambda: recovery.unsettled
    feed = Feed()
    watching = ChangeRelay(lookup, feed, scripts.last_delivered)
    watching.on_unstarted = recovery.check_waiting
    reader = StreamConsumer(connection, scripts, leases, queue, lambda: notifier.alone)
    reader.on_loss = lambda: recovery.notice("the stream or its group was deleted", publish=True)
    claims = WorkerQueue(connection, scripts, task_cache, dispatcher, lease_s=rules.lease_s, clock=clock)
    claims.on_given = leases.check_now
    return QueueInstance(
        connection,
        keys,
        scripts,
        task_cache,
        dispatcher,
        claims,
        queue,
        reader,
        leases,
        takeover,
        notifier,
        feed,
        watching,
        QueueMonitor(connection, keys, dispatcher, notifier, feed, line=estimates.line),
        outbox,
        recovery,
    )
