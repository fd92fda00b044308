"""Verb `take_given`: claim of entries that another instance gives away."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from imagegen.queue.eta import entry_order
from imagegen.queue.verbs.consume import Entry, entry_of
from imagegen.queue.verbs.context import VerbContext
from imagegen.redis_client.keys import GROUP
from imagegen.redis_client.lua import load_script

_SCRIPT = load_script(__package__, "owned", "take_given")


async def take_given(context: VerbContext, giver: str, taker: str, entry_ids: Sequence[str]) -> list[Entry]:
    """Claim those of the entries that are still the giver's. Each goes to one consumer only."""
    ordered = sorted(entry_ids, key=entry_order)
    args = [GROUP, giver, taker, ordered[0], ordered[-1], *ordered]
    rows: list[Any] = await context.run(_SCRIPT, [context.keys.stream], args)
    context.count("takeover", 2 + bool(rows))
    return [entry_of(row) for row in rows if row and row[1]]  # a deleted entry has no fields
