"""Calls of Redis that write lost data back: claims, results and waiting tasks, each conditional and safe to repeat."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

from msgspec import Struct

from imagegen.queue.claim import Claim, checkpoint_ttl_s, owner_life_s
from imagegen.queue.codec import VERSION, encode_entry, encode_task, final_record
from imagegen.queue.scripts import outbox_due_ms
from imagegen.redis_client.batcher import MAX_BYTES, MAX_ITEMS
from imagegen.redis_client.connection import Connection
from imagegen.redis_client.keys import GROUP, Keys
from imagegen.redis_client.lua import load_script
from imagegen.redis_client.multiplexer import Script
from imagegen.tasks.task import Task

PURPOSE = "restore"

COMMANDS_PER_TASK = 4
"""Estimate for each task that is looked at; these calls are rare, so they are not counted exactly."""

Item = TypeVar("Item", bound=Task | Claim)


class RestoredClaim(Struct, frozen=True, gc=False):
    """kind: `held` (nothing was missing), `restored`, or `lost`; run: the bytes in Redis, empty if there are none."""

    kind: str
    entry_id: str
    run: bytes


class RequeueResult(Struct, frozen=True, gc=False):
    """kind: `queued` or `missing`, `there` (nothing was missing), `runs` or `over`.

    record_missing: Redis had no record of the task.
    """

    kind: str
    entry_id: str
    record_missing: bool


class RestoreCalls:
    """lease_s: life of a claim; record_life_s: of an unfinished task's record. All calls raise QueueUnavailable."""

    def __init__(self, connection: Connection, keys: Keys, *, lease_s: float, record_life_s: float) -> None:
        self.connection = connection
        self._keys = keys
        self._run_life_ms = int(checkpoint_ttl_s(lease_s) * 1000)
        self._ownerless_ms = self._run_life_ms - int(owner_life_s(lease_s) * 1000)
        self._record_life_ms = int(record_life_s * 1000)
        self._wire = connection.multiplexer
        self._spent = connection.meter.redis_commands_sent
        self._claims, self._requeue = (
            load_script(__package__, "lua/entries", f"lua/{name}") for name in ("restore_claims", "requeue")
        )
        self._results = load_script(__package__, "lua/restore_results")

    async def claims(self, consumer: str, claims: Sequence[Claim]) -> list[RestoredClaim]:
        """Restore the entry, pending entry, run and record of claims that `consumer` holds."""
        keys = [self._keys.stream]
        args: list[Any] = [GROUP, consumer, self._run_life_ms, self._record_life_ms]
        for claim in claims:
            task = claim.task
            keys += (self._keys.record(task.id), self._keys.checkpoint(task.id))
            run = b"" if claim.stored_bytes is None else claim.stored_bytes.partition(b" ")[2]
            args += (claim.entry_id, task.epoch, task.digest, VERSION, encode_entry(task), _record(task), run)
        rows = await self._call(self._claims, keys, args, len(claims))
        return [RestoredClaim(kind.decode(), entry.decode(), run) for kind, entry, run in _threes(rows)]

    async def results(self, tasks: Sequence[Task], now: float) -> list[int]:
        """Write results back. Returns one a task: 0 if nothing was missing, 1 if it was, 2 if an older state stood."""
        keys, args = [self._keys.stream], [GROUP]
        for task in tasks:
            keys.append(self._keys.record(task.id))
            life_ms = max(int(((task.expires_at or now) - now) * 1000), 1)
            args += (task.epoch, final_record(task), life_ms)  # type: ignore[arg-type]
        return list(await self._call(self._results, keys, args, len(tasks)))

    async def requeue(self, tasks: Sequence[Task]) -> list[RequeueResult]:
        """Queue waiting tasks again whose entry or record is missing."""
        return await self._waiting(tasks, self._record_life_ms)

    async def check(self, tasks: Sequence[Task]) -> list[RequeueResult]:
        """Return what `requeue` would do, without a change: what would be queued is `missing`."""
        return await self._waiting(tasks, "")

    async def _waiting(self, tasks: Sequence[Task], record_life_ms: int | str) -> list[RequeueResult]:
        keys, args = [self._keys.stream], [record_life_ms, self._ownerless_ms]
        for task in tasks:
            keys += (self._keys.record(task.id), self._keys.checkpoint(task.id))
            args += (task.entry_id, task.epoch, task.digest, VERSION, encode_entry(task), _record(task))  # type: ignore[arg-type]
        rows = await self._call(self._requeue, keys, args, len(tasks))
        return [RequeueResult(kind.decode(), entry.decode(), bool(missing)) for kind, entry, missing in _threes(rows)]

    async def outbox(self, names: Sequence[str]) -> None:
        """Put names into the outbox again that are missing there."""
        scores = [word for name in names for word in (outbox_due_ms(self.connection.clock()), name)]
        await self._wire.execute("ZADD", self._keys.outbox, "NX", *scores)
        self._spent(PURPOSE, 1)

    async def _call(self, script: Script, keys: list[str], args: list[Any], tasks: int) -> Any:
        rows = await self._wire.evalsha(script, keys, args)
        self._spent(PURPOSE, 1 + tasks * COMMANDS_PER_TASK)
        return rows


def in_batches(items: Iterable[Item]) -> list[list[Item]]:
    """Split into batches that one script may take: limited in count and in bytes."""
    batches: list[list[Item]] = []
    size = 0
    for item in items:
        if not batches or len(batches[-1]) >= MAX_ITEMS or size >= MAX_BYTES:
            batches.append([])
            size = 0
        size += 2 * len((item.task if isinstance(item, Claim) else item).request_json)
        batches[-1].append(item)
    return batches


def _record(task: Task) -> bytes:
    return encode_task(task, with_request=False)


def _threes(rows: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
    return zip(rows[::3], rows[1::3], rows[2::3], strict=True)
