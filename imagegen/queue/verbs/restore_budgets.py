"""Verb `restore_budgets`: budgets of the last days after Redis lost changes of them.

Changes that no living instance has seen stay lost; what was given back since a value was seen may stay reserved. So a
budget is too low by the last submits of dead instances at most.
"""

from __future__ import annotations

import secrets

from imagegen.queue.verbs.budget_counters import BUDGETS_TTL_S, LOSS_JUMP, SeenBudgets
from imagegen.queue.verbs.context import VerbContext
from imagegen.redis_client.lua import load_script
from imagegen.redis_client.multiplexer import Arg

NAME_TTL_S = 600
"""Life of the description of a loss: what instances have seen that notice the loss later is not added."""

MAX_TRIES = 3
"""Scripts for one day: while one is under way, a reply may come to a change that was made before it."""

_SCRIPT = load_script(__package__, "restore_budgets")


async def restore_budgets(context: VerbContext) -> int:
    """Add what this instance has seen and Redis has lost. Return the number of days of which something was lost."""
    async with context.budgets.restoring:  # else a change after the loss is added twice
        lost_days = 0
        for day in context.budgets.days:
            seen, is_lost = context.budgets.seen(day), False
            for _ in range(MAX_TRIES):
                is_lost |= await _restore(context, day, seen)
                if not seen.later:
                    break
            lost_days += is_lost
        return lost_days


async def _restore(context: VerbContext, day: int, seen: SeenBudgets) -> bool:
    attempt, key = seen.begin_restore(), context.keys.budgets(day)
    args: list[Arg] = [BUDGETS_TTL_S, seen.count, secrets.token_hex(8), seen.handled_loss, NAME_TTL_S, LOSS_JUMP]
    args += ("" if attempt.first_later is None else attempt.first_later, int(seen.is_doubted), attempt.name)
    for slot, (number, value) in seen.values.items():
        args += (slot, number, value, attempt.later.get(slot, 0))
    slots = list(seen.values)
    keys = [key, context.keys.lost_budgets(day), f"{key}:aside"]
    commands, is_lost, last_loss, count, values = await context.run(_SCRIPT, keys, args)
    seen.handled_loss = last_loss
    seen.restored(int(count), dict(zip(slots, map(int, values), strict=True)))
    context.count("restore", 1 + commands)
    return bool(is_lost)
