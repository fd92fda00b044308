"""Verb `raise_billed`: the count of calls that may have been paid twice, in a record of another instance."""

from __future__ import annotations

from imagegen.queue.verbs.budget_counters import BUDGETS_TTL_S, budget_keys
from imagegen.queue.verbs.context import VerbContext
from imagegen.redis_client.lua import load_script

_SCRIPT = load_script(__package__, "billed", "budget", "raise_billed")


async def raise_billed(context: VerbContext, task_id: str, epoch: int, count: int, text: str = "") -> bool:
    """Raise the count to at least `count`. Return whether the record was written. Raises QueueUnavailable.

    text: what budgets get if it was written, as `charge` returns it.
    """
    keys = [context.keys.record(task_id), *budget_keys(context.keys, [text])]
    written, budgets = await context.run(_SCRIPT, keys, [epoch, count, text, BUDGETS_TTL_S])
    context.count("restore", 2 + written + context.budgets.learn(budgets))
    return bool(written)
