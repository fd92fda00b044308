"""Outbox: webhooks of finished tasks that are not sent yet, and the instances that own them.

Each destination has its own bounded share of memory. Further webhooks are kept by name (see `delivery_lines`) and read
from Redis later, so that a slow receiver with thousands of webhooks delays no other.

The webhooks of a task that finished here are delivered from memory, for three commands: a name in the outbox, written
with the result; the delivery log; the name's removal. A name that its owner does not reschedule falls due for any
instance.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar, TypeVarTuple

from loguru import logger
from msgspec.structs import replace

from imagegen.queue.codec import (
    NewerRecord,
    UnreadableRecord,
    decode_delivery_log,
    decode_record,
    encode_delivery_log,
    with_delivery_log,
)
from imagegen.queue.delivery_lines import DeliveryLines
from imagegen.queue.delivery_store import RESCHEDULE_BATCH, DeliveryStore
from imagegen.queue.notifier import Message, Notifier
from imagegen.queue.queue_verbs import QueueVerbs
from imagegen.queue.task_cache import TaskCache
from imagegen.queue.verbs.context import batched
from imagegen.queue.verbs.outbox_entry import OUTBOX_GRACE_S, outbox_name
from imagegen.redis_client.connection import Connection
from imagegen.redis_client.redis_errors import ResponseError, wrong_type
from imagegen.tasks.task import Task, pending_deliveries
from imagegen.tasks.webhook import Delivery, Webhook, destination_of, merge_deliveries, with_added_webhooks

_Args = TypeVarTuple("_Args")
_Reply = TypeVar("_Reply")

MAX_HELD = 2_000
"""Entries with their task in memory; the rest waits by name."""

MAX_HELD_EACH = 200
"""Deliveries in memory of one destination."""

FEW_EACH = 2
"""Deliveries that a destination may have in memory though others fill it, up to twice `MAX_HELD`."""

AHEAD_S = 30.0
"""Deliveries with a later next try give their memory to others of their destination."""

TAKEN_AT_ONCE = 500

READ_AT_ONCE = 50
"""Records that are read together: their decoding takes the event loop 5 to 10 ms."""

CHECK_INTERVAL_S = 600.0
RENEW_S = 20.0
PEER_REPLY_S = 1.0
"""Peers answer a hello within this time; without an answer no other instance owns names in the outbox."""

_PAGE_SIZE = 20
PAGE = 1_000


@dataclass(slots=True)
class _OwnedName:
    """Name in the outbox that this instance delivers.

    open: deliveries that are not done, by number; until: when the name falls due for others, Unix time.
    has_end: whether the task's record is kept for it, however the task changes.
    """

    task: Task
    open: dict[int, Delivery]
    until: float
    has_end: bool = False


class Outbox:
    """Queue of deliveries: `next` returns one to make, `record_attempt` stores its result."""

    def __init__(
        self,
        connection: Connection,
        store: DeliveryStore,
        verbs: QueueVerbs,
        task_cache: TaskCache,
        notifier: Notifier,
    ) -> None:
        self._connection = connection
        self._store = store
        self._verbs = verbs
        self.task_cache = task_cache
        self.notifier = notifier
        self._clock = connection.clock
        self._held: dict[str, _OwnedName] = {}
        self._held_by_destination: Counter[str] = Counter()
        self._lines = DeliveryLines()
        self._capacity_freed = asyncio.Event()
        self._reported = False
        self._ready: asyncio.Queue[tuple[Task, Delivery]] = asyncio.Queue()
        self._busy = asyncio.Event()
        self._check = asyncio.Event()
        self._joined = asyncio.Event()

    def check_now(self) -> None:
        """Check for names without an owner, since an instance may have left some."""
        self._check.set()

    def on_peer_left(self, _message: Message) -> None:
        self.check_now()

    def on_joined(self) -> None:
        """Allow takeovers: this instance is subscribed to the channel, so it will receive its peers' replies."""
        self._joined.set()

    @property
    def names(self) -> list[str]:
        """Names that this instance delivers."""
        return list(self._held)

    def is_owned_elsewhere(self, task: Task) -> bool:
        """Return whether another instance has a newer state of a finished task's deliveries."""
        return not all(self._owns(_name(task, delivery)) for delivery in pending_deliveries(task))

    async def next(self) -> tuple[Task, Delivery]:
        """Return a finished task and one of its deliveries, to be made at its `due_at`; each try is returned once."""
        return await self._ready.get()

    async def record_attempt(self, task: Task, delivery: Delivery) -> None:
        """Store the result of a try, and forget the delivery if it is done. Waits until Redis is available."""
        name = _name(task, delivery)
        owned = self._held.get(name)
        if owned is None:
            return
        owned.task = replace(owned.task, deliveries=merge_deliveries(owned.task.deliveries, [delivery]))
        owned.open[delivery.number] = delivery
        self.task_cache.merge_webhooks(owned.task)
        await self._connection.retry_until_available(self._log, owned)
        if delivery.pending and not owned.has_end:
            await self._connection.retry_until_available(self._store.keep_end, name, owned.task)
            owned.has_end = True
        if not delivery.pending:
            del owned.open[delivery.number]
            self._free([delivery])
        if not owned.open:
            remove = partial(self._store.remove, has_end=owned.has_end)
            await self._connection.retry_until_available(self._repaired, remove, name)
            self._held.pop(name, None)
        else:
            owned.until = min(delivery.due_at or self._clock() for delivery in owned.open.values()) + OUTBOX_GRACE_S
            await self._connection.retry_until_available(self._repaired, self._store.reschedule, {name: owned.until})
            if delivery.pending and not self._unload(name, owned, delivery):
                self._ready.put_nowait((owned.task, delivery))
        self._capacity_freed.set()

    async def add_webhooks(self, task: Task, log: bytes | None, webhooks: Sequence[Webhook]) -> Task | None:
        """Add webhooks to a task as it was read, with its log; those of a finished task are called now.

        Return None if the task changed meanwhile. Raises InvalidRequest for too many, QueueUnavailable.
        """
        late = task.state.is_final
        subscribed = [webhook for webhook in webhooks if not late or webhook.subscribes_to(task.state)]
        if not subscribed:
            return task
        deliveries = with_added_webhooks(task.deliveries, subscribed, task.state if late else None)
        task = replace(task, deliveries=deliveries)
        added = deliveries[-len(subscribed) :]
        names = [_name(task, delivery) for delivery in added] if late else []
        delivery_log = encode_delivery_log(task.epoch, deliveries)
        if not await self._repaired(self._store.add_webhooks, task, log or b"", delivery_log, names):
            return None
        self.task_cache.merge_webhooks(task)
        if late:
            for delivery in added:
                self._hold(_name(task, delivery), task, [delivery])
        return task

    async def release(self) -> None:
        """Leave all names to other instances, at the end. Raises QueueUnavailable."""
        try:
            await self._repaired(self._store.reschedule, dict.fromkeys(self._owned_names, self._clock()))
        finally:
            self._held.clear()
            self._held_by_destination.clear()
            self._lines.clear()

    async def renew_forever(self) -> None:
        """Reschedule names that wait for long; costs nothing without any."""
        while True:
            while not self._held and not self._lines.until:
                self._busy.clear()
                await self._busy.wait()
            await asyncio.sleep(RENEW_S)
            now = self._clock()
            before, until = now + OUTBOX_GRACE_S / 2, now + OUTBOX_GRACE_S
            owned = [entry for entry in self._held.items() if entry[1].until < before]
            waiting = [name for name, due_at in self._lines.until.items() if due_at < before]
            if owned or waiting:
                names = [*(name for name, _ in owned), *waiting]
                await self._usable(self._store.reschedule, dict.fromkeys(names, until))
                for _, entry in owned:
                    entry.until = until
                self._lines.until.update((name, until) for name in waiting if name in self._lines)

    async def refill_forever(self) -> None:
        """Read deliveries that wait by name, as soon as their destination has capacity; one command reads many."""
        while True:
            self._capacity_freed.clear()
            due_before = self._clock() + AHEAD_S
            while names := self._lines.take(due_before, self._refill_capacity_of, TAKEN_AT_ONCE):
                for batch in batched(names, READ_AT_ONCE):
                    await asyncio.gather(*(self._connection.retry_until_available(self._load, name) for name in batch))
            wait_s = self._lines.next_due(self._refill_capacity_of) - due_before
            try:
                async with asyncio.timeout(min(max(wait_s, 0.05), CHECK_INTERVAL_S)):
                    await self._capacity_freed.wait()
            except TimeoutError:
                pass

    async def take_over_forever(self) -> None:
        """Take over names without an owner: at the start, when they fall due, after a takeover, now and then."""
        await self._joined.wait()
        await asyncio.sleep(PEER_REPLY_S)
        take = self._take_all if self.notifier.alone else self._take
        while True:
            wait_s = await self._usable(take) or CHECK_INTERVAL_S
            take = self._take
            try:
                async with asyncio.timeout(wait_s):
                    await self._check.wait()
            except TimeoutError:
                pass
            self._check.clear()

    async def _usable(self, call: Callable[[*_Args], Awaitable[_Reply]], *args: *_Args) -> _Reply | None:
        """Repeat a call until Redis is available; return None if a foreign value has the outbox's key."""
        try:
            return await self._connection.retry_until_available(self._repaired, call, *args)
        except ResponseError as error:
            if not self._reported:
                logger.error("The outbox can't be used, webhooks are delivered from memory alone: {}", error)
            self._reported = True
            return None

    async def _repaired(self, call: Callable[[*_Args], Awaitable[_Reply]], *args: *_Args) -> _Reply:
        """Make a call; if the outbox is of another type, put our names into a new one, and make it once more."""
        try:
            return await call(*args)
        except ResponseError as error:
            if not wrong_type(error):
                raise
        await self._verbs.move_aside()
        for names in batched(self._owned_names, RESCHEDULE_BATCH):
            await self._verbs.restore_outbox(names)
        return await call(*args)

    async def _take_all(self) -> float:
        """Take over everything, since no other instance is there. Return the seconds until the next check."""
        names: list[str] = []
        while rows := await self._store.next_due(PAGE, len(names)):
            names += [name for name, _ in rows]
            if len(rows) < PAGE:
                break
        for batch in batched((name for name in names if not self._owns(name)), TAKEN_AT_ONCE):
            await self._store.reschedule(dict.fromkeys(batch, self._clock() + OUTBOX_GRACE_S))
            await self._load_all(batch)
        return CHECK_INTERVAL_S

    async def _take(self) -> float:
        """Take over due names. Return the seconds until the next check."""
        now = self._clock()
        rows = await self._store.next_due(_PAGE_SIZE)
        due_elsewhere = [due_at for name, due_at in rows if not self._owns(name)]
        if not due_elsewhere:
            return OUTBOX_GRACE_S if len(rows) == _PAGE_SIZE else CHECK_INTERVAL_S
        if due_elsewhere[0] > now:
            return min(due_elsewhere[0] - now + 0.01, CHECK_INTERVAL_S)
        names = [name for name in await self._store.claim_due(now, TAKEN_AT_ONCE) if not self._owns(name)]
        await self._load_all(names)
        return 0.1

    async def _load_all(self, names: Sequence[str]) -> None:
        """Hold the deliveries of names that were just taken; those without capacity stay for later."""
        if names:
            logger.info("Took over webhooks of {} tasks from an instance that is gone", len(names))
        loaded: list[bool] = []
        for batch in batched(names, READ_AT_ONCE):
            loaded += await asyncio.gather(*map(self._load, batch))
        if rest := [name for name, is_loaded in zip(names, loaded, strict=True) if not is_loaded]:
            await self._store.reschedule(dict.fromkeys(rest, self._clock() + CHECK_INTERVAL_S))

    async def _load(self, name: str) -> bool:
        """Hold the deliveries of a name; drop it if its task is gone, or was enqueued again before the first try.

        Return False if there is no capacity for it.
        """
        task_id, epoch, *_ = (*name.split(":"), "")
        record, _, log = await self._verbs.read(task_id)
        has_end = False
        try:
            task = _ended(record, epoch)
            if record is not None and task is None:
                task, has_end = _ended(await self._store.read_end(name), epoch), True
            task = with_delivery_log(task, log) if task else None
        except NewerRecord:
            return True
        except (UnreadableRecord, ResponseError) as error:
            logger.bind(taskId=task_id).error("Webhooks are dropped, the record can't be read: {}", error)
            task = None
        waiting = [delivery for delivery in pending_deliveries(task) if _name(task, delivery) == name] if task else []
        if task is None or not waiting:
            await self._store.remove(name)
            return True
        is_held = self._hold(name, task, waiting)
        if has_end and name in self._held:
            self._held[name].has_end = True
        return is_held

    def on_finished_here(self, task: Task) -> None:
        """Hold the deliveries of a task that this instance finished; Redis has its name in the outbox."""
        if waiting := pending_deliveries(task):
            self._hold(outbox_name(task.id, task.epoch), task, waiting)

    @property
    def _owned_names(self) -> list[str]:
        return [*self._held, *self._lines.until]

    def _owns(self, name: str) -> bool:
        return name in self._held or name in self._lines

    def _capacity_of(self, destination: str) -> int:
        """Return how many deliveries of a destination may be loaded now."""
        held, owned = self._held_by_destination[destination], len(self._held)
        if owned < MAX_HELD:
            return min(MAX_HELD_EACH - held, MAX_HELD - owned)
        return FEW_EACH - held if owned < 2 * MAX_HELD else 0

    def _refill_capacity_of(self, destination: str) -> int:
        """Return the same for names: none until half of the capacity is free, so that many are read together."""
        return 0 if self._held_by_destination[destination] > MAX_HELD_EACH // 2 else self._capacity_of(destination)

    def _hold(self, name: str, task: Task, waiting: Sequence[Delivery]) -> bool:
        """Load deliveries, or keep their name if memory is full. Return False if the names are full too."""
        if self._owns(name):
            return True
        destinations, until = _destinations(waiting), self._clock() + OUTBOX_GRACE_S
        first_at = min(task.finished_at or 0.0, self._clock())  # it may be later if the clock went back
        due_at = min(delivery.due_at or first_at for delivery in waiting)
        self._busy.set()
        if self._waits_by_name(due_at, destinations) or not any(
            self._capacity_of(destination) > 0 for destination in destinations
        ):
            self._capacity_freed.set()
            return self._lines.add(name, due_at, destinations, until)
        self._held[name] = _OwnedName(task, {delivery.number: delivery for delivery in waiting}, until)
        for delivery in waiting:
            self._held_by_destination[destination_of(delivery.webhook.url)] += 1
            self._ready.put_nowait((task, delivery))
        return True

    def _waits_by_name(self, due_at: float, destinations: Iterable[str]) -> bool:
        """Return whether the next try is far away, and other deliveries use the memory."""
        if due_at < self._clock() + AHEAD_S:
            return False
        used = max(self._held_by_destination[destination] for destination in destinations)
        return used > MAX_HELD_EACH // 2 or len(self._held) > MAX_HELD // 2

    def _unload(self, name: str, owned: _OwnedName, delivery: Delivery) -> bool:
        """Keep only the name of a delivery that waits for long, if others need its memory."""
        due_at, destinations = delivery.due_at or 0.0, _destinations([delivery])
        if len(owned.open) > 1 or not self._waits_by_name(due_at, destinations):
            return False
        if not self._lines.add(name, due_at, destinations, owned.until):
            return False
        del self._held[name]
        self._free([delivery])
        return True

    def _free(self, deliveries: Iterable[Delivery]) -> None:
        for delivery in deliveries:
            destination = destination_of(delivery.webhook.url)
            self._held_by_destination[destination] -= 1
            if self._held_by_destination[destination] <= 0:
                del self._held_by_destination[destination]

    async def _log(self, owned: _OwnedName) -> None:
        """Write the delivery log, merged with what others wrote meanwhile; one of a newer epoch is not touched."""
        task, existing = owned.task, None
        while True:
            log = encode_delivery_log(task.epoch, task.deliveries)
            try:
                existing = await self._store.write(task.id, existing, log)
                if existing is None:
                    return
                epoch, logged = decode_delivery_log(existing)
            except (NewerRecord, UnreadableRecord, ResponseError) as error:
                logger.bind(taskId=task.id).warning("The delivery log was not written: {}", error)
                return
            if epoch > task.epoch:
                return
            if epoch == task.epoch:
                task = replace(task, deliveries=merge_deliveries(task.deliveries, logged))


def _destinations(deliveries: Iterable[Delivery]) -> set[str]:
    return {destination_of(delivery.webhook.url) for delivery in deliveries}


def _ended(record: bytes | None, epoch: str) -> Task | None:
    """Return the finished task of a record; None if it is unfinished, or of another epoch."""
    task = None if record is None else decode_record(record)[1]
    return task if task and task.state.is_final and str(task.epoch) == epoch else None


def _name(task: Task, delivery: Delivery) -> str:
    return outbox_name(task.id, task.epoch, delivery.number if delivery.added_after_finish else None)
