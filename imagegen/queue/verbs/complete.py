"""Verb `complete`: the final record of a task that needs no call."""

from __future__ import annotations

from imagegen.queue.codec import VERSION, encode_task, version_of
from imagegen.queue.verbs.context import VerbContext
from imagegen.queue.verbs.submit import SubmitReply
from imagegen.redis_client.lua import load_script
from imagegen.redis_client.multiplexer import Arg
from imagegen.tasks.task import FINAL_OFFSET, Task

_SCRIPT = load_script(__package__, "lines", "judge", "complete")

_COST = 2
"""The script call and GET; SET if there was no record."""


async def complete(context: VerbContext, final: Task, replaced_epoch: int | None) -> SubmitReply:
    """Write the record of a task that was completed by its submit, unless the task exists; see complete.lua.

    replaced_epoch: of a finished task to replace.
    """
    keys = [context.keys.stream, context.keys.record(final.id)]
    record = encode_task(final, with_request=True)
    args: list[Arg] = [final.epoch, final.digest, record, context.result_ttl_ms, VERSION, version_of(final)]
    args += [FINAL_OFFSET, replaced_epoch or ""]
    kind, epoch, existing = await context.run(_SCRIPT, keys, args)
    context.count("submit", _COST + (kind in (b"new", b"again")))
    return SubmitReply(kind.decode(), "", int(epoch), existing)
