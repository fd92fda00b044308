"""Owns the wiring of the queue room: one connection and the parts that share it."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Coroutine
from dataclasses import dataclass

from imagegen.queue.backlog import Backlog
from imagegen.queue.claim import Claim
from imagegen.queue.claims import Claims
from imagegen.queue.connection import Connection
from imagegen.queue.control import Control
from imagegen.queue.depth import Depth
from imagegen.queue.estimate import Estimates
from imagegen.queue.feed import Feed
from imagegen.queue.holdings import Holdings
from imagegen.queue.hooks import HookCalls
from imagegen.queue.idempotency import IdempotencyKeys
from imagegen.queue.interrupted import Interrupted
from imagegen.queue.keys import Keys
from imagegen.queue.leases import Leases
from imagegen.queue.listing import Listing
from imagegen.queue.memory import Memory
from imagegen.queue.outbox import Outbox
from imagegen.queue.queue import Queue
from imagegen.queue.reader import Reader
from imagegen.queue.reads import Reads
from imagegen.queue.recovery import Recovery
from imagegen.queue.restore import RestoreCalls
from imagegen.queue.scripts import Scripts
from imagegen.queue.takeover import Takeover
from imagegen.queue.watching import Watching


@dataclass(frozen=True, slots=True)
class QueueRules:
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
class QueueRoom:
    """The parts: `queue` for clients' requests, `claims` for the pool."""

    connection: Connection
    keys: Keys
    scripts: Scripts
    memory: Memory
    holdings: Holdings
    claims: Claims
    queue: Queue
    reader: Reader
    leases: Leases
    takeover: Takeover
    control: Control
    feed: Feed
    watching: Watching
    backlog: Backlog
    outbox: Outbox
    recovery: Recovery

    def loops(self) -> dict[str, Coroutine[None, None, None]]:
        """The side loops by name; `reader` is to be stopped before `leave`."""
        return {
            "reader": self.reader.read_forever(),
            "renewal": self.leases.renew_forever(),
            "takeover": self.takeover.take_over_forever(),
            "control": self.control.listen_forever(),
            "watching": self.watching.refresh_forever(),
            "recovery": self.recovery.recover_forever(),
            "outbox": self.outbox.look_forever(),
            "outbox-renewal": self.outbox.renew_forever(),
            "outbox-refill": self.outbox.refill_forever(),
        }

    async def hand_back_idle(self, working: Collection[Claim]) -> None:
        """Hands back all that is held and that no loop works on, also what was read and got lost on the way.

        The reader is to be stopped before. Raises QueueUnavailable.
        """
        await self.takeover.gather_strays()
        await self.claims.hand_back([claim for claim in self.holdings.held.values() if claim not in working])

    async def leave(self) -> None:
        """Hands back all that is held, and our name. Raises QueueUnavailable."""
        await self.takeover.gather_strays()
        await self.claims.hand_back(list(self.holdings.held.values()), leaving=True)
        await self.outbox.release()
        self.control.tell("bye")
        await self.control.said()


def open_queue(
    connection: Connection, rules: QueueRules, *, instance: str, clock: Callable[[], float] | None = None
) -> QueueRoom:
    """Wires the parts; nothing is asked of Redis yet. `instance`: our consumer name, unlike any other's."""
    clock = clock or connection.clock
    keys = Keys(rules.prefix)
    scripts = Scripts(
        connection,
        keys,
        record_life_s=rules.record_life_s,
        result_ttl_s=rules.result_ttl_s,
        lease_s=rules.lease_s,
        depth=Depth(rules.max_queue),
    )
    memory = Memory(clock=clock, monotonic=time.monotonic)
    estimates = Estimates(rules.slots)
    holdings = Holdings(memory, estimates, instance, rules.slots)
    control = Control(connection, keys, instance)
    leases = Leases(connection, scripts, holdings, control, rules.lease_s)
    calls = HookCalls(connection, keys, record_life_s=rules.record_life_s, result_ttl_s=rules.result_ttl_s)
    outbox = Outbox(connection, calls, scripts, memory, control, clock=clock)
    takeover = Takeover(connection, scripts, leases, control, rules.lease_s)
    takeover.on_takeover = outbox.look_soon
    interrupted = Interrupted(
        scripts, memory, control, deadline_s=rules.deadline_s, result_ttl_s=rules.result_ttl_s, clock=clock
    )
    reads = Reads(scripts, memory, holdings, control, elsewhere=outbox.elsewhere, interrupted=interrupted)
    restore = RestoreCalls(connection, keys, lease_s=rules.lease_s, record_life_s=rules.record_life_s)
    recovery = Recovery(restore, scripts, leases, outbox, result_ttl_s=rules.result_ttl_s, clock=clock)
    queue = Queue(scripts, reads, result_ttl_s=rules.result_ttl_s, clock=clock)
    queue.idempotency, queue.listing = IdempotencyKeys(connection, keys), Listing(connection, keys)
    queue.outbox = outbox
    queue.on_gone = recovery.wait_restored
    reads.recovering = lambda: recovery.unsettled
    feed = Feed()
    watching = Watching(reads, feed, scripts.last_delivered)
    watching.on_unstarted = recovery.check_waiting
    reader = Reader(connection, scripts, leases, queue, lambda: control.alone)
    reader.on_loss = lambda: recovery.notice("the stream or its group was deleted", publish=True)
    claims = Claims(connection, scripts, memory, holdings, lease_s=rules.lease_s, clock=clock)
    claims.on_given = leases.look_soon
    return QueueRoom(
        connection,
        keys,
        scripts,
        memory,
        holdings,
        claims,
        queue,
        reader,
        leases,
        takeover,
        control,
        feed,
        watching,
        Backlog(connection, keys, holdings, control, feed, line=estimates.line),
        outbox,
        recovery,
    )
