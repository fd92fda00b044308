"""Verb `take_back`: lower cost of a cancelled task with a provider job that was cancelled too."""

from __future__ import annotations

from imagegen.queue.codec import final_record
from imagegen.queue.verbs.budget_counters import BUDGETS_TTL_S, budget_keys, refund
from imagegen.queue.verbs.context import VerbContext
from imagegen.redis_client.lua import load_script
from imagegen.redis_client.multiplexer import Arg
from imagegen.tasks.task import Task

_SCRIPT = load_script(__package__, "budget", "take_back")


async def take_back(context: VerbContext, final: Task, amount: int) -> bool:
    """Write a cancelled task with its lower cost, and give budgets the difference, in micro-dollars.

    Return False if another end of the task is stored, or this was done before.
    """
    text = refund(final.cost, amount)
    keys = [context.keys.record(final.id), *budget_keys(context.keys, [text])]
    args: list[Arg] = [final.epoch, f'{final.counted_in}"', final_record(final), text, BUDGETS_TTL_S]
    written, budgets = await context.run(_SCRIPT, keys, args)
    context.count("cancel", 2 + written + context.budgets.learn(budgets))
    return bool(written)
