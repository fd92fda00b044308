"""Verb `restore_results`: final records that Redis has lost are written back."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

from imagegen.queue.codec import final_record
from imagegen.queue.verbs.budget_counters import BUDGETS_TTL_S, budget_keys, charge
from imagegen.queue.verbs.context import VerbContext
from imagegen.queue.verbs.restore_batch import count_restore
from imagegen.redis_client.keys import GROUP
from imagegen.redis_client.lua import load_script
from imagegen.tasks.task import Task

_SCRIPT = load_script(__package__, "billed", "budget", "restore_results")


class RestoredResult(IntEnum):
    """State of Redis before a write: the result itself, nothing, the task before its end, or a second result of it."""

    PRESENT = 0
    MISSING = 1
    OUTDATED = 2
    OTHER = 3


async def restore_results(context: VerbContext, tasks: Sequence[Task], now: float) -> list[RestoredResult]:
    """Write final records back that are missing or outdated; now: Unix time."""
    keys = [context.keys.stream]
    texts = [charge(task.cost, task.cost.charged if task.cost else 0) for task in tasks]
    budgets = budget_keys(context.keys, texts)
    args: list[str | bytes | int] = [GROUP, len(budgets), BUDGETS_TTL_S]
    for task, text in zip(tasks, texts, strict=True):
        keys.append(context.keys.record(task.id))
        ttl_ms = max(int(((task.expires_at or now) - now) * 1000), 1)
        args += (task.epoch, final_record(task), ttl_ms, text)
    rows, values = await context.run(_SCRIPT, keys + budgets, args)
    count_restore(context, len(tasks))
    context.count("restore", context.budgets.learn(values))
    return list(map(RestoredResult, rows))
