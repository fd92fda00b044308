"""Verb `list_waiting`: the ids of the first unclaimed entries, and the number of those behind them."""

from __future__ import annotations

from msgspec import Struct

from imagegen.queue.verbs.context import VerbContext
from imagegen.redis_client.keys import GROUP
from imagegen.redis_client.lua import load_script

_SCRIPT = load_script(__package__, "list_waiting")

MAX_LISTED, MAX_READ_BYTES = 200, 2**20
"""Entries that are listed one by one, and bytes after which no more are: Redis reads each with its request."""


class WaitingEntryIds(Struct, frozen=True, gc=False):
    """Ids of the first unclaimed entries, the oldest first; behind: number of entries after them; last: id of the last
    of those, empty if there is none."""

    ids: list[str]
    behind: int
    last: str


async def list_waiting(context: VerbContext) -> WaitingEntryIds:
    """Return the first unclaimed entries."""
    ids, behind, last, commands = await context.run(_SCRIPT, [context.keys.stream], [GROUP, MAX_LISTED, MAX_READ_BYTES])
    context.count("read", commands)
    return WaitingEntryIds([entry_id.decode() for entry_id in ids], behind, last.decode())
