"""Store of webhook deliveries: the delivery log of each task, and the outbox of deliveries that are still due."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

from imagegen.queue.codec import final_record
from imagegen.queue.verbs.add_webhooks import add_webhooks
from imagegen.queue.verbs.claim_due import claim_due
from imagegen.queue.verbs.compare_and_set import SCRIPT, compare_and_set_cost
from imagegen.queue.verbs.context import VerbContext, batched
from imagegen.redis_client.multiplexer import Arg
from imagegen.tasks.task import Task

RESCHEDULE_BATCH = 5_000
"""Names in one command; more would block Redis for longer than a few milliseconds."""


class DeliveryStore:
    """Calls of Redis for the outbox and the logs. All raise QueueUnavailable."""

    def __init__(self, context: VerbContext) -> None:
        self._context = context
        self._outbox = context.keys.outbox

    async def add_webhooks(self, task: Task, expected: bytes, log: bytes, names: Sequence[str]) -> bool:
        return await add_webhooks(self._context, task, expected, log, names)

    async def write(self, task_id: str, expected: bytes | None, log: bytes) -> bytes | None:
        """Write a log in place of the expected one, None for none. Return None if written, else the log in Redis."""
        key, ttl_ms = self._context.keys.delivery_log(task_id), self._context.result_ttl_ms
        if expected is None:
            existing = await self._context.multiplexer.execute("SET", key, log, "NX", "GET", "PX", ttl_ms)
            self._context.count("hooks", 1)
        else:
            with self._context.connection.decoding():
                existing = (await self._context.run(SCRIPT, [key], [ttl_ms, expected, log]))[0] or None
            self._context.count("hooks", 1 + compare_and_set_cost(existing or b""))
        return None if existing == log else cast(bytes | None, existing)

    async def next_due(self, count: int, start: int = 0) -> list[tuple[str, float]]:
        """Return names in the outbox and their due times in Unix seconds, the earliest first, from index `start` on."""
        rows = await self._context.multiplexer.execute("ZRANGE", self._outbox, start, start + count - 1, "WITHSCORES")
        self._context.count("hooks", 1)
        names = await self._readable(rows[::2])
        with self._context.connection.decoding():
            return [(name, float(due_ms) / 1000) for name, due_ms in zip(names, rows[1::2], strict=True)]

    async def claim_due(self, until: float, limit: int) -> list[str]:
        with self._context.connection.decoding():
            return await self._readable(await claim_due(self._context, until, limit))

    async def _readable(self, names: Sequence[bytes]) -> list[str]:
        """Return the names as text. Names that are no text come from another program and are removed."""
        foreign = [name for name in names if not name.isascii()]
        if foreign:
            await self._context.multiplexer.execute("ZREM", self._outbox, *foreign)
            self._context.count("hooks", 1)
        return [name.decode("ascii", "replace") for name in names]

    async def reschedule(self, due_at: Mapping[str, float]) -> None:
        """Change the due times of names that are in the outbox; Unix seconds by name."""
        for rows in batched(due_at.items(), RESCHEDULE_BATCH):
            scores: list[Arg] = []
            for name, at in rows:
                scores += (int(at * 1000), name)
            await self._context.multiplexer.execute("ZADD", self._outbox, "XX", *scores)
            self._context.count("hooks", 1)

    async def remove(self, name: str, *, has_end: bool = False) -> None:
        """Remove a name from the outbox. has_end: remove the record that was kept for it too."""
        await self._context.multiplexer.execute("ZREM", self._outbox, name)
        if has_end:
            await self._context.multiplexer.execute("UNLINK", self._context.keys.end(name))
        self._context.count("hooks", 1 + has_end)

    async def keep_end(self, name: str, task: Task) -> None:
        """Keep a finished task's record for a name, since the task itself may be enqueued again meanwhile."""
        ttl_ms = self._context.result_ttl_ms
        await self._context.multiplexer.execute("SET", self._context.keys.end(name), final_record(task), "PX", ttl_ms)
        self._context.count("hooks", 1)

    async def read_end(self, name: str) -> bytes | None:
        """Return the record that was kept for a name."""
        record = await self._context.multiplexer.execute("GET", self._context.keys.end(name))
        self._context.count("hooks", 1)
        return cast(bytes | None, record)
