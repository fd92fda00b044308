"""Verb `restore_budgets`: budgets of the last days after Redis lost changes of them.

Values that no living instance has seen stay lost; what was given back since a value was seen stays reserved. So a
budget is too low by the submits of dead instances at most.
"""

from __future__ import annotations

import secrets

from imagegen.queue.verbs.budget_counters import BUDGETS_TTL_S
from imagegen.queue.verbs.context import VerbContext
from imagegen.redis_client.lua import load_script
from imagegen.redis_client.multiplexer import Arg

NAME_TTL_S = 600
"""Life of the name of a loss: instances that notice the loss later do not raise their values."""

_SCRIPT = load_script(__package__, "restore_budgets")


async def restore_budgets(context: VerbContext) -> int:
    """Write back the budgets that this instance has seen. Return the number of days of which something was lost."""
    lost_days = 0
    for day in context.budgets.days:
        count, values = context.budgets.seen(day)
        name, handled = secrets.token_hex(8), context.budgets.handled_losses.get(day, b"")
        args: list[Arg] = [BUDGETS_TTL_S, count, name, handled, NAME_TTL_S]
        args += [number for pair in values.items() for number in pair]
        keys = [context.keys.budgets(day), context.keys.lost_budgets(day)]
        commands, lost, last_loss = await context.run(_SCRIPT, keys, args)
        context.budgets.handled_losses[day] = last_loss
        context.count("restore", 1 + commands)
        lost_days += lost
    return lost_days
