"""Owns the calls of Redis for webhooks: the delivery log of a task, and the outbox of all that is to be delivered."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TypeVar, cast

from imagegen.queue import costs
from imagegen.queue.scripts import outbox_due_ms
from imagegen.redis_client.connection import Connection
from imagegen.redis_client.keys import Keys
from imagegen.redis_client.lua import load_script
from imagegen.redis_client.multiplexer import Arg
from imagegen.tasks.task import Task

T = TypeVar("T")


RESCHEDULE_BATCH = 5_000
"""Names in one command; more would hold Redis up for longer than a few milliseconds."""


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield lists of `size` items, the last one shorter (`itertools.batched` is of Python 3.12)."""
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch


class DeliveryStore:
    """record_life_s, result_ttl_s: of an unfinished and of a finished task's log. All calls raise QueueUnavailable."""

    def __init__(self, connection: Connection, keys: Keys, *, record_life_s: float, result_ttl_s: float) -> None:
        self._keys = keys
        self._record_life_ms = int(record_life_s * 1000)
        self._result_ttl_ms = max(int(result_ttl_s * 1000), 1)
        self._wire = connection.multiplexer
        self._join, self._claim_due, self._compare_and_set = (
            load_script(__package__, f"lua/{name}") for name in ("join", "adopt", "swap")
        )
        self._spent = connection.meter.redis_commands_sent
        self._clock = connection.clock

    async def join(self, task: Task, known: bytes, log: bytes, names: Sequence[str]) -> bool:
        """Adds webhooks: the log in place of `known`. False where that, or the task's end, changed meanwhile."""
        keys = [self._keys.outbox, self._keys.record(task.id), self._keys.delivery_log(task.id)]
        final = task.state.is_final
        life_ms = self._result_ttl_ms if final else self._record_life_ms
        args = [task.epoch, "1" if final else "", known, log, life_ms, outbox_due_ms(self._clock()), *names]
        added = bool(await self._wire.evalsha(self._join, keys, args))
        self._spent("hooks", 5 if added else 3)
        return added

    async def write(self, task_id: str, known: bytes | None, log: bytes) -> bytes | None:
        """Writes a log in place of `known`, None for none there. None where it was written, else what stands."""
        key, life_ms = self._keys.delivery_log(task_id), self._result_ttl_ms
        if known is None:
            found = await self._wire.execute("SET", key, log, "NX", "GET", "PX", life_ms)
        else:
            found = (await self._wire.evalsha(self._compare_and_set, [key], [life_ms, known, log]))[0] or None
        self._spent("hooks", 1 if known is None else 1 + costs.swap(found or b""))
        return None if found == log else cast(bytes | None, found)

    async def next_due(self, count: int, start: int = 0) -> list[tuple[str, float]]:
        """Return the names in the outbox that fall due first, from the one numbered `start` on, and when, Unix time."""
        rows = await self._wire.execute("ZRANGE", self._keys.outbox, start, start + count - 1, "WITHSCORES")
        self._spent("hooks", 1)
        names = await self._readable(rows[::2])
        return [(name, float(due_ms) / 1000) for name, due_ms in zip(names, rows[1::2], strict=True)]

    async def claim_due(self, until: float, most: int) -> list[str]:
        """Takes over what falls due by `until`, Unix time; of two takers one gets it."""
        upto = "+inf" if math.isinf(until) else int(until * 1000)
        found = await self._wire.evalsha(
            self._claim_due, [self._keys.outbox], [upto, outbox_due_ms(self._clock()), most]
        )
        self._spent("hooks", 2 + bool(found))
        return await self._readable(found)

    async def _readable(self, names: Sequence[bytes]) -> list[str]:
        """Return the names as text; what is no text is a foreign name, and is removed."""
        foreign = [name for name in names if not name.isascii()]
        if foreign:
            await self._wire.execute("ZREM", self._keys.outbox, *foreign)
            self._spent("hooks", 1)
        return [name.decode("ascii", "replace") for name in names]

    async def reschedule(self, due_at: Mapping[str, float]) -> None:
        """Moves what is in the outbox under these names to another time."""
        for rows in batched(due_at.items(), RESCHEDULE_BATCH):
            scores: list[Arg] = []
            for name, at in rows:
                scores += (int(at * 1000), name)
            await self._wire.execute("ZADD", self._keys.outbox, "XX", *scores)
            self._spent("hooks", 1)

    async def remove(self, name: str) -> None:
        """Takes a name out of the outbox: nothing waits under it any more."""
        await self._wire.execute("ZREM", self._keys.outbox, name)
        self._spent("hooks", 1)
