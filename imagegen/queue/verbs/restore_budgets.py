"""Verb `restore_budgets`: budgets of the last days after Redis lost changes of them.

Values that no living instance has seen stay lost; what was given back since a value was seen stays reserved. So a
budget is too low by the submits of dead instances at most.
"""

from __future__ import annotations

from imagegen.queue.verbs.budget_counters import BUDGETS_TTL_S
from imagegen.queue.verbs.context import VerbContext
from imagegen.redis_client.lua import load_script
from imagegen.redis_client.multiplexer import Arg

_SCRIPT = load_script(__package__, "restore_budgets")


async def restore_budgets(context: VerbContext) -> int:
    """Write back the budgets that this instance has seen. Return the number of days of which something was lost."""
    lost_days = 0
    for day in context.budgets.days:
        count, values = context.budgets.seen(day)
        args: list[Arg] = [BUDGETS_TTL_S, count, *(number for pair in values.items() for number in pair)]
        commands, lost = await context.run(_SCRIPT, [context.keys.budgets(day)], args)
        context.count("restore", 1 + commands)
        lost_days += lost
    return lost_days
