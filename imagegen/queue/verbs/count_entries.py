"""Verb `count_entries`: how many tasks each client has in the stream."""

from __future__ import annotations

from collections import Counter

from imagegen.queue.verbs.context import VerbContext
from imagegen.redis_client.lua import load_script

_SCRIPT = load_script(__package__, "lines", "count_entries")

MAX_READ_BYTES = 2**18
"""Bytes after which a script call reads no further entry: about 500 short ones, which take Redis about 15 ms."""


async def count_entries(context: VerbContext) -> Counter[str]:
    """Return the numbers of entries by client. It reads the whole stream, in parts."""
    counts, start = Counter[str](), b"-"
    while start:
        start, flat, commands = await context.run(_SCRIPT, [context.keys.stream], [start, MAX_READ_BYTES])
        context.count("other", commands)
        for client, count in zip(flat[::2], flat[1::2], strict=True):
            counts[client.decode(errors="replace")] += count
    return counts
