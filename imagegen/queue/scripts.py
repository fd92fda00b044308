"""Owns the calls of Redis: one typed function for each script in lua/ and for each plain command, batched by turn."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar, TypeVarTuple, cast

from redis.exceptions import ResponseError

from imagegen.errors import QueueUnavailable
from imagegen.queue import costs
from imagegen.queue.claim import checkpoint_ttl_s, owner_life_s
from imagegen.queue.codec import VERSION, final_record
from imagegen.queue.depth import DepthEstimate
from imagegen.queue.eta import entry_order
from imagegen.queue.items import (
    CompareAndSetItem,
    Consumer,
    FencedStart,
    Finished,
    FinishItem,
    PendingEntry,
    ReleaseItem,
    SubmitItem,
    SubmitReply,
    WaitingEntryIds,
)
from imagegen.queue.unreadable import Unreadable, wrong_type
from imagegen.redis_client.batcher import Batcher, batched
from imagegen.redis_client.connection import Connection
from imagegen.redis_client.keys import GROUP, Keys
from imagegen.redis_client.lua import load_script
from imagegen.redis_client.multiplexer import CommandBatch
from imagegen.tasks.task import Task, pending_deliveries

Entry = tuple[str, dict[bytes, bytes]]

TaskRows = tuple[bytes | None, bytes | None, bytes | None]
"""Record, run and hooks of a task."""

_Reply = TypeVar("_Reply")
_Args = TypeVarTuple("_Args")

DEAD_LIST_LIFE_S = 7 * 86_400

PAGE = 1_000
"""Claimed entries that one command lists."""

MAX_WAITING_SHOWN = 200
"""Waiting entries that are known one by one: each is read with its request."""

MAX_RENEWED, MAX_RELEASED, MAX_RETIRED = 500, 100, 100
"""What one script handles at most, so that Redis answers others within some ms."""

START_BATCH = 3
"""From so many at once a script is worth its own price: it takes a third of the time."""

BLOCK_GRACE_S = 5.0
"""How long after its time a blocked read may still answer, before the way to Redis counts as lost."""

OUTBOX_GRACE_S = 60.0
"""How long what is in the outbox is left to the instance that put it there, or took it, before another may."""


class Scripts:
    """record_life_s: of an unfinished task's record; result_ttl_s: of a finished one's; lease_s: of a claim."""

    def __init__(
        self,
        connection: Connection,
        keys: Keys,
        *,
        record_life_s: float,
        result_ttl_s: float,
        lease_s: float,
        depth: DepthEstimate,
    ) -> None:
        self._connection = connection
        self._keys = keys
        self._record_life_ms = int(record_life_s * 1000)
        self._result_ttl_ms = max(int(result_ttl_s * 1000), 1)
        self._run_life_ms = int(checkpoint_ttl_s(lease_s) * 1000)
        self.owner_life_s = owner_life_s(lease_s)
        self._wire = connection.multiplexer
        self._scripts = {
            name: load_script(__package__, f"lua/{name}")
            for name in ("submit", "start", "swap", "bury", "waiting", "retire", "aside")
        }
        self._scripts |= {
            name: load_script(__package__, "lua/billed", f"lua/{name}") for name in ("finish", "cancel", "start_fenced")
        }
        self._scripts |= {name: load_script(__package__, "lua/owned", f"lua/{name}") for name in ("renew", "release")}
        self.depth = depth
        self.on_added: Callable[[], None] = lambda: None
        self.meter = connection.meter
        self.clock = connection.clock
        self.unreadable = Unreadable(connection.meter)
        self._spent = connection.meter.redis_commands_sent
        self.submit = Batcher[SubmitItem, SubmitReply](
            self._wire, self._submit, self._submitted, lambda item: len(item.entry)
        )
        self.finish = Batcher[FinishItem, Finished](
            self._wire, self._finish, self._finished, lambda item: len(item.record)
        )
        self.compare_and_set = Batcher[CompareAndSetItem, bytes](self._wire, self._swap, self._swapped)
        self.create_checkpoint = Batcher[tuple[str, bytes], bytes | None](self._wire, self._first_run, self._first_ran)
        self.read = Batcher[str, TaskRows](self._wire, self._read, self._found)

    async def _run(self, name: str, keys: list[str], args: Sequence[Any]) -> Any:
        return await self._wire.evalsha(self._scripts[name], keys, args)

    def _submit(self, items: list[SubmitItem]) -> CommandBatch:
        keys = [self._keys.stream]
        measure = self.depth.limit if self.depth.stale else ""
        args: list[Any] = [GROUP, self.depth.capacity, measure, self._record_life_ms]
        for item in items:
            keys.append(self._keys.record(item.task_id))
            args += (item.generation, item.digest, item.entry, item.record, item.replaced or "", VERSION)
        return self._scripts["submit"].asked(keys, args)

    def _submitted(self, _items: list[SubmitItem], replies: list[Any]) -> list[SubmitReply]:
        room, ((measured, rows),) = self.depth.capacity, replies
        told = [SubmitReply(kind.decode(), entry.decode(), int(gen or 0), known) for kind, entry, gen, known in rows]
        added = sum(bool(answer.entry_id) for answer in told)
        if told and (entry_id := told[-1].entry_id):
            self._connection.clock.learn(int(entry_id.partition("-")[0]) / 1000)
        if measured >= 0:
            room = self.depth.limit - measured
            self._spent("submit", costs.MEASURED)
        self._spent("submit", costs.submit([(answer.kind, answer.entry_id, answer.known) for answer in told], room))
        self.depth.submitted(added, measured if measured >= 0 else None)
        if added:
            self.on_added()
        return told

    def _finish(self, items: list[FinishItem]) -> CommandBatch:
        keys = [self._keys.stream, self._keys.outbox]
        args: list[Any] = [GROUP, self._result_ttl_ms, outbox_due_ms(self._connection.clock())]
        for item in items:
            final = item.final
            keys += (self._keys.record(final.id), self._keys.delivery_log(final.id))
            name = outbox_name(final.id, final.epoch)
            args += (item.entry_id, final.epoch, item.record, name, "1" if pending_deliveries(final) else "")
        return self._scripts["finish"].asked(keys, args)

    def _finished(self, items: list[FinishItem], replies: list[Any]) -> list[Finished]:
        answers = [Finished(*answer) for answer in replies[0]]
        self._spent("finish", costs.finish(len(items)))
        joined = sum(bool(answer.hooks) for answer in answers)
        self._spent("hooks", joined + (joined > 0 or any(pending_deliveries(item.final) for item in items)))
        return answers

    def _swap(self, items: list[CompareAndSetItem]) -> CommandBatch:
        args: list[Any] = [self._run_life_ms]
        for item in items:
            args += (item.known, item.value)
        return self._scripts["swap"].asked([self._keys.checkpoint(item.task_id) for item in items], args)

    def _swapped(self, items: list[CompareAndSetItem], replies: list[Any]) -> list[bytes]:
        """`b''` where it was written, else the run that stands."""
        answers = cast(list[bytes], replies[0])
        self._spent(items[0].purpose, 1)
        for item, answer in zip(items, answers, strict=True):
            self._spent(item.purpose, costs.swap(answer))
        return answers

    def _first_run(self, items: list[tuple[str, bytes]]) -> CommandBatch:
        """The start of first attempts: one plain conditional command each, or a script for many."""
        keys = [self._keys.checkpoint(task_id) for task_id, _ in items]
        values = [value for _, value in items]
        if len(items) >= START_BATCH:
            return self._scripts["start"].asked(keys, [self._run_life_ms, *values])
        life = ("NX", "GET", "PX", self._run_life_ms)
        return CommandBatch([("SET", key, value, *life) for key, value in zip(keys, values, strict=True)])

    def _first_ran(self, items: list[tuple[str, bytes]], replies: list[Any]) -> list[bytes | None]:
        """The run that stands, None where it was written."""
        answers = cast(list[bytes | None], replies[0] if len(items) >= START_BATCH else replies)
        self._spent("start", costs.start(len(items), START_BATCH))
        return [None if answer == value else answer for answer, (_, value) in zip(answers, items, strict=True)]

    async def start_fenced(self, consumer: str, item: FencedStart) -> bytes | None:
        """Write a run if the entry is ours. Return `b''` if written, else the run that is there; None: not ours."""
        keys = [self._keys.stream, self._keys.record(item.task_id), self._keys.checkpoint(item.task_id)]
        args = [GROUP, consumer, item.entry_id, item.generation, self._run_life_ms, item.known, item.value, item.billed]
        kind, stands, commands = await self._run("start_fenced", keys, args)
        self._spent("takeover", costs.start_fenced(commands))
        return None if kind == b"lost" else cast(bytes, stands)

    def _read(self, ids: list[str]) -> CommandBatch:
        kinds = (self._keys.record, self._keys.checkpoint, self._keys.delivery_log)
        return CommandBatch([("MGET", *(key(task_id) for task_id in ids for key in kinds))])

    def _found(self, _ids: list[str], replies: list[Any]) -> list[TaskRows]:
        self._spent("read", 1)
        found = cast(list[bytes | None], replies[0])
        return list(zip(found[::3], found[1::3], found[2::3], strict=True))

    async def runs(self, ids: Sequence[str]) -> list[bytes | None]:
        keys = [self._keys.checkpoint(task_id) for task_id in ids]
        async with self._connection.deadline():
            found = cast(list[bytes | None], await self._connection.commands.mget(keys))
        self._spent("takeover", 1)
        return found

    async def read_waiting(self, consumer: str, count: int) -> list[Entry]:
        """The next entries for us that wait already, asked for on the connection that all calls share.

        Raises QueueUnavailable, RedisError.
        """
        command = ("XREADGROUP", "GROUP", GROUP, consumer, "COUNT", count, "STREAMS", self._keys.stream, ">")
        (answer,) = await self._wire.execute_batch(CommandBatch([command], no_resend=True))
        self._spent("claim", 1)
        return _delivered(answer)

    async def read_entries(self, consumer: str, count: int, block_s: float) -> list[Entry]:
        """The next entries for us, waiting for the first up to `block_s`. Raises RedisError."""
        block = ("COUNT", count, "BLOCK", int(block_s * 1000))
        command = ("XREADGROUP", "GROUP", GROUP, consumer, *block, "STREAMS", self._keys.stream, ">")
        lookup = self._connection.blocking_reads
        try:
            answer = await lookup.execute(*command, within_s=block_s + BLOCK_GRACE_S)
        except asyncio.CancelledError:
            await lookup.close()  # else the server would give entries to nobody
            raise
        self._spent("claim", 1)
        return _delivered(answer)

    async def create_group(self) -> bool:
        """Makes stream and group; False where they were there."""
        async with self._connection.deadline():
            try:
                await self._connection.commands.xgroup_create(self._keys.stream, GROUP, id="0", mkstream=True)
            except ResponseError as error:
                if wrong_type(error):
                    await self._put_aside()
                    raise QueueUnavailable from error  # the caller comes again
                if "BUSYGROUP" not in str(error):
                    raise
                self._spent("other", 1)
                return False
        self._spent("other", 1)
        return True

    async def mended(self, call: Callable[[*_Args], Awaitable[_Reply]], *given: *_Args) -> _Reply:
        """Make a call; once more if a key that all tasks share was of another type, after it was moved aside."""
        try:
            return await call(*given)
        except ResponseError as error:
            if not wrong_type(error):
                raise
            await self._put_aside()
        return await call(*given)

    async def _put_aside(self) -> None:
        """Move shared keys of another type aside."""
        shared = {self._keys.stream: "stream", self._keys.outbox: "zset", self._keys.dead_letters: "list"}
        keys = [name for key in shared for name in (key, f"{key}:aside")]
        moved = await self._run("aside", keys, [DEAD_LIST_LIFE_S, *shared.values()])
        self._spent("other", 1 + len(shared) + 2 * len(moved))
        for key in moved:
            self.unreadable.report("key", f"{key.decode()} ({time.monotonic():.0f} s)", "of another type, moved aside")

    async def pending(self) -> list[PendingEntry]:
        """Return all claimed entries, of every instance, in order. One command for each thousand of them."""
        entries: list[PendingEntry] = []
        low = "-"
        while True:
            rows = await self._pending_page(low)
            entries += [
                PendingEntry(entry_id.decode(), consumer.decode(errors="replace"), idle_ms / 1000)
                for entry_id, consumer, idle_ms, _ in rows
            ]
            if len(rows) < PAGE:
                return entries
            low = f"({entries[-1].entry_id}"

    async def _pending_page(self, low: str) -> list[tuple[bytes, bytes, int, int]]:
        try:
            rows = await self._wire.execute("XPENDING", self._keys.stream, GROUP, low, "+", PAGE)
        except ResponseError as error:
            if "NOGROUP" not in str(error):
                raise
            rows = []
        self._spent("takeover", 1)
        return cast(list[tuple[bytes, bytes, int, int]], rows)

    async def consumers(self) -> list[Consumer]:
        """Return the consumers of the group; none where there is no group."""
        try:
            rows = await self._wire.execute("XINFO", "CONSUMERS", self._keys.stream, GROUP)
        except ResponseError as error:
            if "NOGROUP" not in str(error) and "no such key" not in str(error):
                raise
            rows = []
        self._spent("takeover", 1)
        fields = [dict(zip(row[::2], row[1::2], strict=True)) for row in rows]
        return [Consumer(of[b"name"].decode(errors="replace"), of[b"pending"], of[b"idle"] / 1000) for of in fields]

    async def retire(self, consumers: Sequence[str]) -> int:
        """Remove those of the consumers that hold nothing. Returns how many were removed."""
        removed = cast(int, await self._run("retire", [self._keys.stream], [GROUP, *consumers[:MAX_RETIRED]]))
        self._spent("takeover", costs.retire(min(len(consumers), MAX_RETIRED), removed))
        return removed

    async def claim_expired(self, consumer: str, entry_ids: Sequence[str], min_idle_s: float) -> list[Entry]:
        """Claims those of the entries that nobody renewed for `min_idle_s`; two takers never both get one."""
        async with self._connection.deadline():
            found = await self._connection.commands.xclaim(
                self._keys.stream, GROUP, consumer, int(min_idle_s * 1000), list(entry_ids)
            )
        self._spent("takeover", 1)
        return _entries(found)

    async def renew(self, consumer: str, claims: Sequence[tuple[str, str]]) -> tuple[set[str], list[str]]:
        """Renews (task id, entry id)s; without a task id there is no run to renew, and no command is spent on one.

        Returns the entry ids that were lost, and those held but not named.
        """
        lost: set[str] = set()
        unnamed: list[str] = []
        pages = list(batched(sorted(claims, key=_entry_order), MAX_RENEWED)) or [[]]
        low = "-"
        for number, page in enumerate(pages, 1):
            high = "+" if number == len(pages) else page[-1][1]
            stream = self._keys.stream
            keys = [stream, *(self._keys.checkpoint(task_id) if task_id else stream for task_id, _ in page)]
            args = [GROUP, consumer, self._run_life_ms, low, high, *(entry_id for _, entry_id in page)]
            gone, strange = await self._run("renew", keys, args)
            held = [task_id for task_id, entry_id in page if entry_id.encode() not in gone]
            self._spent("renew", costs.renew(len(held), sum(map(bool, held))))
            lost |= {entry.decode() for entry in gone}
            unnamed += [entry.decode() for entry in strange]
            low = f"({high}"
        return lost, unnamed

    async def release(self, consumer: str, items: Sequence[ReleaseItem], *, leaving: bool = False) -> int:
        """Hands entries of a consumer back, which itself may be leaving. Returns how many were its to give."""
        given = 0
        ordered = sorted(items, key=lambda item: entry_order(item.entry_id))
        pages = list(batched(ordered, MAX_RELEASED, lambda item: len(item.entry))) or [[]]
        for number, page in enumerate(pages, 1):
            given += await self._release(consumer, page, leaving=leaving and number == len(pages))
        return given

    async def _release(self, consumer: str, items: Sequence[ReleaseItem], *, leaving: bool) -> int:
        keys = [self._keys.stream]
        args: list[Any] = [GROUP, consumer, "1" if leaving else "", self._record_life_ms]
        args += (items[0].entry_id, items[-1].entry_id) if items else ("-", "+")
        for item in items:
            keys += (self._keys.record(item.task_id), self._keys.checkpoint(item.task_id))
            args += (item.entry_id, VERSION, item.generation, item.entry, item.run)
        given = cast(int, await self._run("release", keys, args))
        self._spent("release", costs.release([item.run for item in items], given, leaving=leaving))
        return given

    async def last_delivered(self) -> str:
        """Return the id of the last entry that the group delivered to any instance; `0-0` if there is no group."""
        try:
            groups = await self._wire.execute("XINFO", "GROUPS", self._keys.stream)
        except ResponseError as error:
            if "no such key" not in str(error):
                raise
            groups = []
        self._spent("read", 1)
        for flat in groups:
            fields = dict(zip(flat[::2], flat[1::2], strict=True))
            if fields.get(b"name") == GROUP.encode():
                return str(fields[b"last-delivered-id"].decode())
        return "0-0"

    async def give_to(self, consumer: str, entry_id: str) -> None:
        """Make a pending entry pending for another consumer, which has started its task."""
        try:
            await self._wire.execute("XCLAIM", self._keys.stream, GROUP, consumer, 0, entry_id, "JUSTID")
        except ResponseError as error:
            if "NOGROUP" not in str(error):
                raise
        self._spent("restore", 1)

    async def cancel(self, final: Task, tombstone: bytes) -> Finished | None:
        """Cancels this generation; None where there is no record."""
        of_task = (self._keys.record, self._keys.checkpoint, self._keys.delivery_log)
        keys = [self._keys.stream, self._keys.outbox, *(key(final.id) for key in of_task)]
        args = [GROUP, final.epoch, final_record(final), self._result_ttl_ms, tombstone, self._run_life_ms]
        args += [
            outbox_due_ms(self._connection.clock()),
            outbox_name(final.id, final.epoch),
            "1" if pending_deliveries(final) else "",
        ]
        answer = await self._run("cancel", keys, args)
        finished = None if answer is None else Finished(*answer)
        self._spent("cancel", costs.cancel(finished.stands if finished else None))
        return finished

    async def entry(self, entry_id: str) -> dict[bytes, bytes] | None:
        """What an entry carries; None where it is gone."""
        async with self._connection.deadline():
            found: Any = await self._connection.commands.xrange(self._keys.stream, entry_id, entry_id)
        self._spent("read", 1)
        return found[0][1] if found else None

    async def waiting_entry_ids(self) -> WaitingEntryIds:
        """Return the first unclaimed entries, the oldest first, and how many are behind them."""
        found, behind, last, commands = await self._run("waiting", [self._keys.stream], [GROUP, MAX_WAITING_SHOWN])
        self._spent("read", commands)
        return WaitingEntryIds([entry_id.decode() for entry_id in found], behind, last.decode())

    async def dead_letter(self, entry_id: str, held: str) -> None:
        """Moves an entry that nobody can read to the dead-letter list."""
        await self._run("bury", [self._keys.stream, self._keys.dead_letters], [GROUP, entry_id, held, DEAD_LIST_LIFE_S])
        self._spent("other", costs.BURY)
        self.meter.dead_letters += 1


def _entry_order(claim: tuple[str, str]) -> int:
    return entry_order(claim[1])


def outbox_name(task_id: str, generation: int, number: int | None = None) -> str:
    """The webhooks that waited for the end of a generation; with a number, the one that came later."""
    return f"{task_id}:{generation}" if number is None else f"{task_id}:{generation}:{number}"


def outbox_due_ms(now: float) -> int:
    """When another instance may care for what goes into the outbox now."""
    return int((now + OUTBOX_GRACE_S) * 1000)


def _delivered(answer: Any) -> list[Entry]:
    return [] if answer is None else [(entry_id.decode(), _pairs(flat)) for entry_id, flat in answer[0][1]]


def _pairs(flat: list[bytes]) -> dict[bytes, bytes]:
    return dict(zip(flat[::2], flat[1::2], strict=True))


def _entries(answer: Any) -> list[Entry]:
    """Only entries with fields: one that was deleted while it was pending comes without."""
    return [(entry_id.decode(), fields) for entry_id, fields in answer if fields]
