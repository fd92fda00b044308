"""Verb `move_aside`: repair of the queue's shared keys if another program wrote another type there."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import TypeVar, TypeVarTuple

from imagegen.queue.verbs.context import VerbContext
from imagegen.queue.verbs.dead_letter import DEAD_LETTERS_TTL_S
from imagegen.redis_client.lua import load_script
from imagegen.redis_client.redis_errors import ResponseError, wrong_type
from imagegen.tasks.cost import day_of

_SCRIPT = load_script(__package__, "move_aside")

_Reply = TypeVar("_Reply")
_Args = TypeVarTuple("_Args")


async def move_aside(context: VerbContext) -> None:
    """Rename shared keys of another type, and report them."""
    types = {context.keys.stream: "stream", context.keys.outbox: "zset", context.keys.dead_letters: "list"}
    types[context.keys.budgets(day_of(context.connection.clock()))] = "string"
    keys = [name for key in types for name in (key, f"{key}:aside")]
    moved = await context.run(_SCRIPT, keys, [DEAD_LETTERS_TTL_S, *types.values()])
    context.count("other", 1 + len(types) + 2 * len(moved))  # TYPE for each; RENAME and EXPIRE for the moved ones
    for key in moved:
        name = f"{key.decode()} ({time.monotonic():.0f} s)"
        context.unreadable.report("key", name, "of another type, moved aside")


async def retry_after_move(context: VerbContext, call: Callable[[*_Args], Awaitable[_Reply]], *args: *_Args) -> _Reply:
    """Call a verb; if a shared key has another type, move it aside and call once more."""
    try:
        return await call(*args)
    except ResponseError as error:
        if not wrong_type(error):
            raise
        await move_aside(context)
    return await call(*args)
