"""Reads of tasks: records, checkpoints, delivery logs, and the entries that carry requests."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, cast

from imagegen.queue.verbs.context import VerbContext
from imagegen.redis_client.lua import load_script
from imagegen.redis_client.multiplexer import Arg, Batcher, CommandBatch
from imagegen.tasks.task import Task

TaskRows = tuple[bytes | None, bytes | None, bytes | None]
"""Record, checkpoint and delivery log of a task."""


class ReadTasks:
    """Batcher of reads by task id, one MGET for a batch."""

    def __init__(self, context: VerbContext) -> None:
        self._context = context
        self._batcher = Batcher[str, TaskRows](context.multiplexer, self._encode, self._decode)

    def __call__(self, task_id: str) -> asyncio.Future[TaskRows]:
        """Read the stored values of a task with the next batch."""
        return self._batcher(task_id)

    def _encode(self, ids: list[str]) -> CommandBatch:
        keys = self._context.keys
        kinds = (keys.record, keys.checkpoint, keys.delivery_log)
        return CommandBatch([("MGET", *(key(task_id) for task_id in ids for key in kinds))])

    def _decode(self, _ids: list[str], results: list[Any]) -> list[TaskRows]:
        self._context.count("read", 1)
        values = cast(list[bytes | None], results[0])
        return list(zip(values[::3], values[1::3], values[2::3], strict=True))


_FIND_IN_LINE = load_script(__package__, "find_in_line")

MAX_READ_BYTES = 2**19
"""Bytes of a line after which a script call reads no further element: they take Redis 2 to 5 ms."""


async def read_in_line(context: VerbContext, task: Task) -> dict[bytes, bytes] | None:
    """Return the fields of the entry that a task in a line will have, None if it is not there.

    The line is read from its end, where no task leaves it, in parts.
    """
    passed = 0
    while passed >= 0:
        args: list[Arg] = [task.id, task.epoch, passed, MAX_READ_BYTES]
        commands, passed, *fields = await context.run(_FIND_IN_LINE, [context.keys.line(task.client)], args)
        context.count("read", commands)
        if fields:
            return dict(zip((b"v", b"g", b"d"), fields, strict=True))
    return None


async def read_checkpoints(context: VerbContext, ids: Sequence[str]) -> list[bytes | None]:
    """Return the checkpoint of each task, None if there is none."""
    keys = [context.keys.checkpoint(task_id) for task_id in ids]
    async with context.connection.deadline():
        checkpoints = cast(list[bytes | None], await context.connection.commands.mget(keys))
    context.count("takeover", 1)
    return checkpoints


async def read_budgets(context: VerbContext, day: int) -> None:
    """Read what the budgets of a day hold into `context.budgets`.

    The connection of the scripts is used: on another one the reply could overtake those of changes that it includes.
    """
    async with context.connection.deadline():
        stored = cast(bytes | None, await context.multiplexer.execute("GET", context.keys.budgets(day)))
    context.count("stats", 1)
    context.budgets.learn_all(day, stored or b"")


async def read_entry(context: VerbContext, entry_id: str) -> dict[bytes, bytes] | None:
    """Return the fields of an entry, None if it is not in the stream."""
    async with context.connection.deadline():
        rows: Any = await context.connection.commands.xrange(context.keys.stream, entry_id, entry_id)
    context.count("read", 1)
    return rows[0][1] if rows else None
