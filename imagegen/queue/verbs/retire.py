"""Verb `retire`: removal of consumers that hold nothing from the group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from imagegen.queue.verbs.context import VerbContext
from imagegen.redis_client.keys import GROUP
from imagegen.redis_client.lua import load_script

_SCRIPT = load_script(__package__, "retire")

MAX_RETIRED = 100
"""Consumers of one script call; the rest stays for the next check."""


async def retire(context: VerbContext, consumers: Sequence[str]) -> int:
    """Remove those of the consumers that hold nothing. Return how many were removed."""
    page = consumers[:MAX_RETIRED]
    removed = cast(int, await context.run(_SCRIPT, [context.keys.stream], [GROUP, *page]))
    context.count("takeover", 1 + len(page) + removed)  # XPENDING for each, XGROUP DELCONSUMER for the removed ones
    return removed
