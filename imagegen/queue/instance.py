"""Parts of the queue in one instance, and how they are connected."""

from __future__ import annotations

import time
from collections.abc import Collection, Coroutine
from functools import partial

from msgspec import Struct, field

from imagegen.queue.change_relay import ChangeRelay
from imagegen.queue.claim import Claim, consumer_name
from imagegen.queue.client_queue import ClientQueue
from imagegen.queue.consumer import StreamConsumer
from imagegen.queue.delivery_store import DeliveryStore
from imagegen.queue.dispatcher import ClaimDispatcher
from imagegen.queue.end_marks import EndMarks
from imagegen.queue.eta import EtaEstimator
from imagegen.queue.families import FamiliesWithImages
from imagegen.queue.feed import Feed
from imagegen.queue.handover import Handover
from imagegen.queue.idempotency import IdempotencyKeys
from imagegen.queue.interrupted import Interrupted
from imagegen.queue.leases import Leases
from imagegen.queue.line_mover import LineMover
from imagegen.queue.lines import ClientLines
from imagegen.queue.lost_calls import LostCalls
from imagegen.queue.monitor import QueueMonitor
from imagegen.queue.notifier import FRESH, MISSED, Message, Notifier
from imagegen.queue.open_calls import OpenCalls
from imagegen.queue.open_tasks import OpenLimitOf, OpenTasks
from imagegen.queue.outbox import Outbox
from imagegen.queue.pause import PAUSE_MESSAGE, ClaimingPause
from imagegen.queue.queue_verbs import QueueVerbs
from imagegen.queue.recovery import Recovery
from imagegen.queue.server_mark import ServerMark
from imagegen.queue.takeover import Takeover
from imagegen.queue.task_cache import TaskCache
from imagegen.queue.task_list import TaskList
from imagegen.queue.task_lookup import TaskLookup
from imagegen.queue.verbs.budget_counters import BudgetLimits
from imagegen.queue.verbs.context import VerbContext
from imagegen.queue.verbs.submit import DepthEstimate
from imagegen.queue.worker_queue import WorkerQueue
from imagegen.redis_client.connection import Connection
from imagegen.redis_client.keys import Keys
from imagegen.tasks.task import Task


class QueueConfig(Struct, frozen=True):
    """Limits and lifetimes of a queue.

    Args:
        prefix: of every key.
        record_life_s: how long Redis keeps the record of an unfinished task at most.
        slots: tasks that one instance runs at once.
        deadline_s: seconds from the submit of a task to its end.
        limits: of budgets. open_limit_of: how many unfinished tasks a client may have.
        window: tasks of one client in the stream; its others wait in its line.
    """

    prefix: str
    lease_s: float
    result_ttl_s: float
    record_life_s: float
    max_queue: int
    slots: int = 5
    deadline_s: float = 3600.0
    limits: BudgetLimits = field(default_factory=BudgetLimits)
    window: int = 10
    open_limit_of: OpenLimitOf = lambda _client: None


class QueueInstance(Struct, frozen=True):
    """All parts of one instance: `client_queue` for requests of clients, `worker_queue` for the pool."""

    connection: Connection
    keys: Keys
    verbs: QueueVerbs
    task_cache: TaskCache
    task_lookup: TaskLookup
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
    lost_calls: LostCalls
    open_calls: OpenCalls
    families: FamiliesWithImages
    lines: ClientLines
    mover: LineMover
    open_tasks: OpenTasks
    pause: ClaimingPause
    handover: Handover

    def loops(self) -> dict[str, Coroutine[None, None, None]]:
        """Return the background loops by name. Stop `reader` before `release_all`."""
        return {
            "reader": self.consumer.read_forever(),
            "overdue-read": self.consumer.replace_overdue_forever(),
            "renewal": self.leases.renew_forever(),
            "takeover": self.takeover.take_over_forever(),
            "control": self.notifier.listen_forever(),
            "pause": self.pause.read_forever(),
            "watching": self.change_relay.refresh_forever(),
            "recovery": self.recovery.recover_forever(),
            "outbox": self.outbox.take_over_forever(),
            "outbox-renewal": self.outbox.renew_forever(),
            "outbox-refill": self.outbox.refill_forever(),
            "families": self.families.load_forever(),
            "lines": self.mover.keep_forever(),
        }

    async def release_idle(self, working: Collection[Claim]) -> None:
        """Release the claims that no loop works on, and entries that were read but never received.

        Stop the reader first. Raises QueueUnavailable.
        """
        await self.handover.stop()
        await self.takeover.reclaim_undelivered()
        await self.worker_queue.release([claim for claim in self.dispatcher.held.values() if claim not in working])

    async def release_all(self) -> None:
        """Release all claims and webhooks, and remove our consumer. Raises QueueUnavailable."""
        await self.handover.stop()
        await self.takeover.reclaim_undelivered()
        await self.verbs.take_found_job.stop()
        await self.worker_queue.release(list(self.dispatcher.held.values()), leaving=True)
        await self.outbox.release()
        self.notifier.publish("bye")
        await self.notifier.flush()


def open_queue(connection: Connection, config: QueueConfig, *, instance: str) -> QueueInstance:
    """Return the parts of one instance, connected; nothing is sent to Redis yet. instance: its unique name."""
    keys, feed, instance = Keys(config.prefix), Feed(), consumer_name(instance, config.lease_s)
    context = _context(connection, keys, config)
    task_cache = TaskCache(clock=connection.clock, monotonic=time.monotonic)
    lines = ClientLines(task_cache, window=config.window, slots=config.slots)
    verbs = QueueVerbs(context, DepthEstimate(config.max_queue, lines.by_client), lines, EndMarks(instance))
    dispatcher = ClaimDispatcher(task_cache, EtaEstimator(config.slots), instance, config.slots)
    notifier = Notifier(connection, keys, instance)
    leases = Leases(connection, verbs, dispatcher, notifier, config.lease_s)
    takeover = Takeover(connection, verbs, leases, notifier, config.lease_s)
    outbox = Outbox(connection, DeliveryStore(context), verbs, task_cache, notifier)
    lookup = _lookup(verbs, dispatcher, notifier, outbox, config)
    families = FamiliesWithImages(connection, keys, notifier, ttl_s=config.result_ttl_s)
    listing, mark = TaskList(connection, keys, notifier.may_live), ServerMark(connection, keys, verbs, instance)
    mover = LineMover(connection, verbs, lookup, deadline_s=config.deadline_s)
    client_queue = ClientQueue(verbs, mover, outbox, IdempotencyKeys(connection, keys), listing, families=families)
    parts = QueueInstance(
        connection=connection,
        keys=keys,
        verbs=verbs,
        task_cache=task_cache,
        task_lookup=lookup,
        dispatcher=dispatcher,
        worker_queue=WorkerQueue(connection, verbs, task_cache, dispatcher, lease_s=config.lease_s),
        client_queue=client_queue,
        consumer=StreamConsumer(connection, verbs, leases, client_queue, alone=lambda: notifier.alone),
        leases=leases,
        takeover=takeover,
        notifier=notifier,
        feed=feed,
        change_relay=ChangeRelay(lookup, feed, verbs.last_delivered),
        monitor=QueueMonitor(connection, keys, dispatcher, notifier, feed, verbs=verbs),
        outbox=outbox,
        recovery=Recovery(connection, verbs, leases, outbox, mark, result_ttl_s=config.result_ttl_s),
        lost_calls=LostCalls(connection, keys),
        open_calls=OpenCalls(notifier, verbs),
        families=families,
        lines=lines,
        mover=mover,
        open_tasks=_open_tasks(connection, keys, lookup, config),
        pause=ClaimingPause(connection, keys, notifier),
        handover=Handover(leases, takeover, notifier),
    )
    return _connected(parts, config)


def _context(connection: Connection, keys: Keys, config: QueueConfig) -> VerbContext:
    lives = {"record_life_s": config.record_life_s, "result_ttl_s": config.result_ttl_s, "lease_s": config.lease_s}
    return VerbContext.create(connection, keys, **lives)


def _lookup(
    verbs: QueueVerbs, dispatcher: ClaimDispatcher, notifier: Notifier, outbox: Outbox, config: QueueConfig
) -> TaskLookup:
    cache, life_s = outbox.task_cache, {"deadline_s": config.deadline_s, "result_ttl_s": config.result_ttl_s}
    interrupted = Interrupted(verbs, cache, notifier, **life_s)
    return TaskLookup(
        verbs, cache, dispatcher, notifier, is_owned_elsewhere=outbox.is_owned_elsewhere, interrupted=interrupted
    )


def _open_tasks(connection: Connection, keys: Keys, lookup: TaskLookup, config: QueueConfig) -> OpenTasks:
    limit_of, life_s = config.open_limit_of, config.record_life_s
    return OpenTasks(connection, keys, limit_of, lookup.read, life_s=life_s)


def _connected(parts: QueueInstance, config: QueueConfig) -> QueueInstance:
    """Return the parts with every callback between them; no part sets one itself."""
    parts.client_queue.limits, parts.client_queue.open_tasks = config.limits, parts.open_tasks
    leases, outbox, recovery = parts.leases, parts.outbox, parts.recovery
    relay, takeover = parts.change_relay, parts.takeover
    # Events inside this process
    parts.task_cache.on_change, parts.task_cache.audiences = relay.on_task_changed, (parts.feed.waiters, relay.watched)
    parts.task_cache.on_finished_here = partial(_on_finished_here, parts)
    canceller = parts.client_queue.canceller
    canceller.on_left, canceller.on_ended = partial(_on_left, parts), partial(_on_ended, parts)
    parts.worker_queue.on_job_dropped = canceller.cancel_late
    parts.feed.on_first_subscriber = relay.request_changes
    parts.pause.on_change = partial(_on_pause, parts)
    parts.worker_queue.on_transferred = leases.check_now
    parts.worker_queue.on_refused = leases.lost_claims.record
    parts.dispatcher.on_lost = leases.record_lost
    takeover.on_takeover = partial(_on_takeover, parts)
    # Losses of data, and the recovery from them
    parts.connection.on_new_server += [recovery.on_new_server, parts.families.on_new_server]
    parts.connection.on_new_server.append(lambda _known, _new: _on_new_server(parts))
    parts.consumer.on_loss, parts.consumer.on_group_known = recovery.on_group_lost, recovery.on_group_known
    leases.on_loss, leases.restore = recovery.on_claims_lost, recovery.restore_claims
    parts.verbs.budgets.on_fewer_changes = recovery.on_fewer_changes
    relay.on_unstarted, recovery.on_unstarted = recovery.check_waiting, takeover.suspect_skipped
    parts.client_queue.on_missing_entry = recovery.wait_restored
    canceller.on_missing_record = recovery.wait_record_restored
    parts.verbs.submit.on_loss = recovery.wait_stream_restored
    # Messages of other instances
    parts.notifier.on_join += [outbox.on_joined, recovery.probe, relay.on_joined, parts.families.on_joined]
    parts.notifier.on_join += [parts.pause.read_soon, parts.client_queue.joined.doubt_all]
    parts.notifier.on_peer += [leases.on_peer_joined, recovery.on_peer_joined, parts.client_queue.joined.doubt_all]
    parts.notifier.handlers |= {
        "hello": relay.on_hello,
        "bye": partial(_on_peer_left, parts),
        "busy": takeover.on_peer_busy,
        "watch": relay.on_watch,
        "change": relay.on_change,
        FRESH: relay.on_resubmitted,
        "lost": recovery.on_loss_elsewhere,
        "restored": recovery.on_restored_elsewhere,
        PAUSE_MESSAGE: parts.pause.on_message,
    }
    _connect_lookup(parts)
    _connect_lines(parts)
    return parts


def _connect_lookup(parts: QueueInstance) -> None:
    """Set the callbacks of the lookup: finished tasks are read again once messages about them may be lost."""
    recovery, doubt = parts.recovery, parts.task_lookup.doubt_finished
    parts.task_lookup.is_recovering = lambda: recovery.unsettled
    parts.connection.on_new_server.append(lambda _known, _new: doubt())
    parts.notifier.on_join.append(doubt)
    parts.notifier.handlers[MISSED] = lambda _message: doubt()


def _connect_lines(parts: QueueInstance) -> None:
    """Set the callbacks of the lines of clients."""
    lines, mover, notifier = parts.lines, parts.mover, parts.notifier
    lines.instances = lambda: 1 + len(notifier.peers)
    lines.on_moved, lines.on_begun = mover.on_moved, mover.on_begun
    lines.on_doubt, lines.on_emptied = mover.on_doubt, mover.on_emptied
    lines.on_end_without_line = mover.on_end_without_line
    mover.on_vanished = parts.recovery.check_waiting
    parts.recovery.on_restored = mover.reload
    notifier.on_join.append(mover.reload)
    notifier.handlers["line"] = mover.on_line_elsewhere


def _on_new_server(parts: QueueInstance) -> None:
    """Doubt what was seen of another server, before anything is sent to the new one."""
    parts.notifier.on_new_server()
    parts.verbs.budgets.on_new_server()
    parts.pause.read_soon()
    parts.client_queue.joined.doubt_all()


def _on_pause(parts: QueueInstance, *, paused: bool) -> None:
    """Hold the claims of this instance, or let them start."""
    if paused != parts.dispatcher.paused:
        parts.dispatcher.pause(paused=paused)
        if paused:
            parts.consumer.interrupt()


def _on_peer_left(parts: QueueInstance, message: Message) -> None:
    parts.outbox.on_peer_left(message)
    parts.mover.reload()


def _on_takeover(parts: QueueInstance) -> None:
    parts.outbox.check_now()
    parts.mover.reload()
    parts.notifier.on_silence()


def _on_finished_here(parts: QueueInstance, task: Task) -> None:
    _on_ended(parts, task)
    _on_left(parts, task)


def _on_left(parts: QueueInstance, task: Task) -> None:
    parts.monitor.ended.append(task)
    parts.families.add(task)
    parts.open_tasks.on_finished(task)
    parts.lines.finished(task)


def _on_ended(parts: QueueInstance, task: Task) -> None:
    parts.outbox.on_finished_here(task)
    parts.verbs.end_marks.on_ended(task)
