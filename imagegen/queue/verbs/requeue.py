"""Verb `requeue`: waiting tasks are enqueued again after Redis lost their entries or records."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from msgspec import Struct

from imagegen.queue.codec import VERSION, encode_entry, encode_task, version_of
from imagegen.queue.verbs.context import VerbContext
from imagegen.queue.verbs.restore_batch import count_restore
from imagegen.redis_client.lua import load_script
from imagegen.tasks.task import Task

_SCRIPT = load_script(__package__, "lines", "entries", "requeue")


class RequeueResult(Struct, frozen=True, gc=False):
    """Result for one waiting task.

    kind: see requeue.lua; record_missing: Redis had no record of the task.
    """

    kind: Literal["queued", "missing", "there", "runs", "over"]
    entry_id: str
    record_missing: bool


async def requeue(context: VerbContext, tasks: Sequence[Task]) -> list[RequeueResult]:
    """Enqueue waiting tasks again if their entry or record is missing."""
    return await _requeue(context, tasks, context.record_ttl_ms)


async def check_requeue(context: VerbContext, tasks: Sequence[Task]) -> list[RequeueResult]:
    """Return what `requeue` would do, without a change: kind `missing` in place of `queued`."""
    return await _requeue(context, tasks, "")


async def _requeue(context: VerbContext, tasks: Sequence[Task], record_ttl_ms: int | str) -> list[RequeueResult]:
    keys = [context.keys.stream, context.keys.lines]
    args: list[Any] = [record_ttl_ms, context.checkpoint_ttl_ms - int(context.owner_life_s * 1000), VERSION]
    for task in tasks:
        keys += (context.keys.record(task.id), context.keys.checkpoint(task.id), context.keys.line(task.client))
        args += (task.entry_id, task.epoch, task.digest, version_of(task), encode_entry(task))
        args += (encode_task(task, with_request=False), task.client, task.id)
    rows = await context.run(_SCRIPT, keys, args)
    count_restore(context, len(tasks))
    return [
        RequeueResult(kind.decode(), entry_id.decode(), bool(missing))
        for kind, entry_id, missing in zip(rows[::3], rows[1::3], rows[2::3], strict=True)
    ]
