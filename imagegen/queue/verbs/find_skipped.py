"""Verb `find_skipped`: the entries that the group has passed and no consumer holds."""

from __future__ import annotations

from imagegen.queue.verbs.context import VerbContext
from imagegen.redis_client.keys import GROUP
from imagegen.redis_client.lua import load_script

_SCRIPT = load_script(__package__, "find_skipped")

PAGE_SIZE = 100
"""Entries of one script call: Redis reads each with its request."""


async def find_skipped(context: VerbContext) -> list[str]:
    """Return the ids of delivered entries without a claim. Raises QueueUnavailable."""
    skipped: list[str] = []
    low = "-"
    while True:
        ids, last, commands = await context.run(_SCRIPT, [context.keys.stream], [GROUP, low, PAGE_SIZE])
        context.count("takeover", commands)
        skipped += [entry_id.decode() for entry_id in ids]
        if not last:
            return skipped
        low = f"({last.decode()}"
