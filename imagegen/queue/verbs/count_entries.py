"""Verb `count_entries`: how many tasks each client has in the stream."""

from __future__ import annotations

from collections import Counter

from imagegen.queue.verbs.context import VerbContext
from imagegen.redis_client.lua import load_script

_SCRIPT = load_script(__package__, "lines", "count_entries")

PAGE_ENTRIES = 500
"""Entries that one script call reads: they take Redis about 15 ms."""


async def count_entries(context: VerbContext) -> Counter[str]:
    """Return the numbers of entries by client. It reads the whole stream, in pages of two commands."""
    counts, start = Counter[str](), b"-"
    while start:
        start, flat = await context.run(_SCRIPT, [context.keys.stream], [start, PAGE_ENTRIES])
        context.count("other", 2)
        for client, count in zip(flat[::2], flat[1::2], strict=True):
            counts[client.decode(errors="replace")] += count
    return counts
