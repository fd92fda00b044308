"""Verb `join`: one more client of an unfinished task, which is cancelled when the last of its clients cancels it."""

from __future__ import annotations

from collections.abc import Iterable

from imagegen.queue.verbs.context import VerbContext
from imagegen.redis_client.lua import load_script
from imagegen.redis_client.multiplexer import Arg
from imagegen.tasks.clients import first_clients
from imagegen.tasks.task import Task

_SCRIPT = load_script(__package__, "joined", "join")

MAX_BYTES = 16_000
"""Of the names of a task's clients: about a thousand. With more, the task can't be cancelled but for all."""

_COSTS = {0: 2, 1: 3, 2: 4}
"""Commands by the result, with the call of the script."""


async def join(context: VerbContext, task: Task, names: Iterable[str]) -> bool:
    """Add names to the clients of a task. Return False if this epoch of the task is over."""
    keys = [context.keys.record(task.id), context.keys.joined(task.id)]
    args: list[Arg] = [task.epoch, " ".join(first_clients(task)), " ".join(names), MAX_BYTES, context.record_ttl_ms]
    result = await context.run(_SCRIPT, keys, args)
    context.count("submit", _COSTS[result])
    return bool(result)
