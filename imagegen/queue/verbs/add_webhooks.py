"""Verb `add_webhooks`: webhooks of a submit for a task that exists, if its log and state are still as read."""

from __future__ import annotations

from collections.abc import Sequence

from imagegen.queue.verbs.context import VerbContext
from imagegen.queue.verbs.outbox_entry import outbox_due_ms
from imagegen.redis_client.lua import load_script
from imagegen.tasks.task import Task

_SCRIPT = load_script(__package__, "add_webhooks")

_ADDED_COST, _REFUSED_COST = 5, 3


async def add_webhooks(context: VerbContext, task: Task, expected: bytes, log: bytes, names: Sequence[str]) -> bool:
    """Write a delivery log in place of the expected one, empty for none.

    Return False if the log changed meanwhile, or the task was finished or submitted again.

    Args:
        names: the outbox names of the webhooks, if the task is finished.
    """
    keys = [context.keys.outbox, context.keys.record(task.id), context.keys.delivery_log(task.id)]
    is_final = task.state.is_final
    ttl_ms = context.result_ttl_ms if is_final else context.record_ttl_ms
    due_ms = outbox_due_ms(context.connection.clock())
    args = [task.epoch, "1" if is_final else "", expected, log, ttl_ms, due_ms, *names]
    added = bool(await context.run(_SCRIPT, keys, args))
    context.count("hooks", _ADDED_COST if added else _REFUSED_COST)
    return added
