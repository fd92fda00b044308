"""Verb `dead_letter`: move of an unreadable entry from the stream to the dead-letter list."""

from __future__ import annotations

from imagegen.queue.verbs.context import VerbContext
from imagegen.redis_client.keys import GROUP
from imagegen.redis_client.lua import load_script

_SCRIPT = load_script(__package__, "dead_letter")

DEAD_LETTERS_TTL_S = 7 * 86_400

_COST = 6
"""The script call, XDEL, LPUSH, LTRIM, EXPIRE and XACK."""


async def dead_letter(context: VerbContext, entry_id: str, content: str) -> None:
    """Move an entry to the dead-letter list."""
    keys = [context.keys.stream, context.keys.dead_letters]
    await context.run(_SCRIPT, keys, [GROUP, entry_id, content, DEAD_LETTERS_TTL_S])
    context.count("other", _COST)
    context.connection.meter.dead_letters += 1
