"""Verb `raise_billed`: the count of calls that may have been paid twice, in a record of another instance."""

from __future__ import annotations

from imagegen.queue.verbs.context import VerbContext
from imagegen.redis_client.lua import load_script

_SCRIPT = load_script(__package__, "billed", "raise_billed")


async def raise_billed(context: VerbContext, task_id: str, epoch: int, count: int) -> bool:
    """Raise the count to at least `count`. Return whether the record was written. Raises QueueUnavailable."""
    written = bool(await context.run(_SCRIPT, [context.keys.record(task_id)], [epoch, count]))
    context.count("restore", 2 + written)
    return written
