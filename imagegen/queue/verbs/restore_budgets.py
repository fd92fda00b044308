"""Verb `restore_budgets`: budgets of the last days after Redis lost changes of them.

Changes that no living instance has seen stay lost; what was given back since a value was seen may stay reserved. So a
budget is too low by the last submits of dead instances at most.
"""

from __future__ import annotations

import secrets

from imagegen.queue.verbs.budget_counters import BUDGETS_TTL_S, LOSS_JUMP
from imagegen.queue.verbs.context import VerbContext
from imagegen.redis_client.lua import load_script
from imagegen.redis_client.multiplexer import Arg

NAME_TTL_S = 600
"""Life of the description of a loss: what instances have seen that notice the loss later is not added."""

_SCRIPT = load_script(__package__, "restore_budgets")


async def restore_budgets(context: VerbContext) -> int:
    """Add what this instance has seen and Redis has lost. Return the number of days of which something was lost."""
    async with context.budgets.restoring:  # else a change after the loss is added twice
        return await _restore(context)


async def _restore(context: VerbContext) -> int:
    lost_days = 0
    for day in context.budgets.days:
        seen = context.budgets.seen(day)
        args: list[Arg] = [BUDGETS_TTL_S, seen.count, secrets.token_hex(8), seen.handled_loss, NAME_TTL_S, LOSS_JUMP]
        args += ("" if seen.first_later is None else seen.first_later, int(seen.is_doubted))
        later = dict(seen.later)
        for slot, (number, value) in seen.values.items():
            args += (slot, number, value, later.get(slot, 0))
        slots = list(seen.values)
        key = context.keys.budgets(day)
        keys = [key, context.keys.lost_budgets(day), f"{key}:aside"]
        commands, lost, last_loss, count, *values = await context.run(_SCRIPT, keys, args)
        seen.handled_loss = last_loss
        seen.restored(int(count), dict(zip(slots, map(int, values), strict=True)), later)
        context.count("restore", 1 + commands)
        lost_days += lost
    return lost_days
