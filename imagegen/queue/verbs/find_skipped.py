"""Verb `find_skipped`: the entries that the group has passed and no consumer holds."""

from __future__ import annotations

from imagegen.queue.verbs.context import VerbContext
from imagegen.redis_client.keys import GROUP
from imagegen.redis_client.lua import load_script

_SCRIPT = load_script(__package__, "find_skipped")

MAX_READ_BYTES = 2**18
"""Bytes after which a script call reads no further entry: Redis reads each with its request."""


async def find_skipped(context: VerbContext) -> list[str]:
    """Return the ids of delivered entries without a claim. Raises QueueUnavailable."""
    skipped: list[str] = []
    low = "-"
    while True:
        ids, following, commands = await context.run(_SCRIPT, [context.keys.stream], [GROUP, low, MAX_READ_BYTES])
        context.count("takeover", commands)
        skipped += [entry_id.decode() for entry_id in ids]
        if not following:
            return skipped
        low = following.decode()
