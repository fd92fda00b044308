"""Verb `raise_billed`: the count of calls that may have been paid twice, in a record of another instance."""

from __future__ import annotations

from msgspec import Struct

from imagegen.queue.verbs.budget_counters import BUDGETS_TTL_S, budget_keys
from imagegen.queue.verbs.context import VerbContext
from imagegen.redis_client.lua import load_script
from imagegen.redis_client.multiplexer import Arg
from imagegen.redis_client.redis_errors import RIGHTS_REMEDY, ResponseError, remedy

_SCRIPT = load_script(__package__, "billed", "budget", "raise_billed")

MARK_LIFE_S = 86_400
"""How long a call that was recorded is known, since the answer may be lost, and the call repeated."""


async def raise_billed(context: VerbContext, task_id: str, epoch: int, count: int) -> None:
    """Raise the count to at least `count`. Raises QueueUnavailable."""
    keys = [context.keys.record(task_id)] * 2
    written, *_ = await context.run(_SCRIPT, keys, [epoch, count, "", BUDGETS_TTL_S, "", 0])
    context.count("restore", 2 + written)


class LostCall(Struct, frozen=True):
    """Call of a claim that another instance has, to be recorded once.

    name: which no other call has. count: to which the count is raised; 0 of a cancelled task, which gets none, or to
    look only for a try before.
    charged: what it costs, in micro-dollars. text: what budgets get, as `charge` returns it.
    """

    name: str
    count: int
    charged: int
    text: str


async def record_call(context: VerbContext, task_id: str, epoch: int, call: LostCall) -> tuple[int, int] | None:
    """Raise the count for a call, once. Raises QueueUnavailable.

    Return the count and the cost that are recorded for this call, also by a try before; None if nothing is. A user of
    Redis without the right to the mark goes without it.
    """
    try:
        return await _record(context, task_id, epoch, call, context.keys.recorded_call(call.name))
    except ResponseError as error:
        if remedy(error) != RIGHTS_REMEDY:
            raise
        return await _record(context, task_id, epoch, call, context.keys.record(task_id))


async def _record(
    context: VerbContext, task_id: str, epoch: int, call: LostCall, mark_key: str
) -> tuple[int, int] | None:
    keys = [context.keys.record(task_id), mark_key, *budget_keys(context.keys, [call.text])]
    args: list[Arg] = [epoch, call.count, call.text, BUDGETS_TTL_S, f"{call.count} {call.charged}", MARK_LIFE_S]
    written, budgets, mark = await context.run(_SCRIPT, keys, args)
    context.count("restore", 3 + 2 * written + context.budgets.learn(budgets))
    if not written:
        return None
    count, charged = map(int, mark.split())
    return count, charged
