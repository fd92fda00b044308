"""Verb `requeue`: waiting tasks are enqueued again after Redis lost their entries or records."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from msgspec import Struct
from msgspec.structs import replace

from imagegen.queue.codec import VERSION, encode_entry, encode_task, version_of
from imagegen.queue.verbs.context import VerbContext
from imagegen.queue.verbs.restore_batch import count_restore
from imagegen.redis_client.lua import load_script
from imagegen.redis_client.multiplexer import Arg
from imagegen.tasks.task import Task

_SCRIPT = load_script(__package__, "lines", "entries", "requeue")
_PAGE_SCRIPT = load_script(__package__, "lines", "page_of_line")

MAX_PAGE_BYTES = 2**19
"""Bytes of a line after which a script call reads no more, which takes Redis 1 to 3 ms."""

WaitingLines = dict[str, set[bytes]]
"""Epoch and id of the tasks in the line of each client that was read."""


class RequeueResult(Struct, frozen=True, gc=False):
    """Result for one waiting task.

    kind: see requeue.lua; record_missing: Redis had no record of the task.
    """

    kind: Literal["queued", "missing", "there", "line", "runs", "over"]
    entry_id: str
    record_missing: bool


async def requeue(context: VerbContext, tasks: Sequence[Task], lines: WaitingLines) -> list[RequeueResult]:
    """Enqueue waiting tasks again if their entry or record is missing.

    lines: of one pass over many tasks, each line is read once. A task that another instance adds to its line meanwhile
    is in it twice; the second time it is dropped when its turn comes.
    """
    return await _requeue(context, tasks, lines, context.record_ttl_ms)


async def check_requeue(context: VerbContext, tasks: Sequence[Task], lines: WaitingLines) -> list[RequeueResult]:
    """Return what `requeue` would do, without a change: kind `missing` in place of `queued`."""
    return await _requeue(context, tasks, lines, "")


async def _requeue(
    context: VerbContext, tasks: Sequence[Task], lines: WaitingLines, record_ttl_ms: int | str
) -> list[RequeueResult]:
    results = await _run(context, tasks, record_ttl_ms, is_absent=False)
    absent = []
    for index, (task, result) in enumerate(zip(tasks, results, strict=True)):
        if result.kind != "line":
            continue
        if await _is_in_line(context, task, lines):
            results[index] = replace(result, kind="there")
        else:
            absent.append(index)
    if absent:
        again = await _run(context, [tasks[index] for index in absent], record_ttl_ms, is_absent=True)
        for index, result in zip(absent, again, strict=True):
            results[index] = result
    return results


async def _is_in_line(context: VerbContext, task: Task, lines: WaitingLines) -> bool:
    if task.client not in lines:
        lines[task.client] = await _read_line(context, task.client)
    return f"{task.epoch} {task.id}".encode() in lines[task.client]


async def _read_line(context: VerbContext, client: str) -> set[bytes]:
    """Return epoch and id of all tasks in a line, which is read in pages."""
    passed, waiting, has_more = 0, set[bytes](), True
    while has_more:
        args: list[Arg] = [passed, MAX_PAGE_BYTES]
        commands, has_more, *names = await context.run(_PAGE_SCRIPT, [context.keys.line(client)], args)
        context.count("restore", commands)
        waiting.update(names)
        passed += len(names)
    return waiting


async def _run(
    context: VerbContext, tasks: Sequence[Task], record_ttl_ms: int | str, *, is_absent: bool
) -> list[RequeueResult]:
    keys = [context.keys.stream, context.keys.lines]
    args: list[Any] = [record_ttl_ms, context.checkpoint_ttl_ms - int(context.owner_life_s * 1000), VERSION]
    for task in tasks:
        keys += (context.keys.record(task.id), context.keys.checkpoint(task.id), context.keys.line(task.client))
        args += (task.entry_id, task.epoch, task.digest, version_of(task), encode_entry(task))
        args += (encode_task(task, with_request=False), task.client, task.id, int(is_absent))
    rows = await context.run(_SCRIPT, keys, args)
    count_restore(context, len(tasks))
    return [
        RequeueResult(kind.decode(), entry_id.decode(), bool(missing))
        for kind, entry_id, missing in zip(rows[::3], rows[1::3], rows[2::3], strict=True)
    ]
