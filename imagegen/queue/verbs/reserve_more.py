"""Verb `reserve_more`: budget for a call beyond the planned ones, with the checkpoint that records it."""

from __future__ import annotations

from msgspec import Struct

from imagegen.queue.verbs.budget_counters import BUDGETS_TTL_S, Limits, extension
from imagegen.queue.verbs.context import VerbContext
from imagegen.redis_client.lua import load_script
from imagegen.redis_client.multiplexer import Arg

_SCRIPT = load_script(__package__, "budget", "reserve_more")


class Extension(Struct, frozen=True, gc=False):
    """Micro-dollars to reserve on a day, and the checkpoint with them.

    expected: the checkpoint that is probably there, empty for none. value: the checkpoint to write.
    """

    task_id: str
    expected: bytes
    value: bytes
    day: int
    amount: int
    limits: Limits


class ExtensionReply(Struct, frozen=True, gc=False):
    """Reply: whether the amount is reserved; else existing is the other checkpoint, empty if a budget is used up."""

    reserved: bool
    existing: bytes


async def reserve_more(context: VerbContext, item: Extension) -> ExtensionReply:
    """Reserve more, unless a budget is used up, or another checkpoint than the expected one is there."""
    keys = [context.keys.checkpoint(item.task_id), context.keys.budgets(item.day)]
    text = extension(item.day, item.amount, item.limits)
    args: list[Arg] = [item.expected, item.value, context.checkpoint_ttl_ms, text, BUDGETS_TTL_S]
    kind, existing, budgets = await context.run(_SCRIPT, keys, args)
    commands = context.budgets.learn(budgets)
    context.count("start", 2 + commands + (kind == b"" and commands > 0))
    return ExtensionReply(kind == b"", existing)
