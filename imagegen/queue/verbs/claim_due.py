"""Verb `claim_due`: claim of outbox entries that are due, so that one instance delivers each."""

from __future__ import annotations

import math
from typing import cast

from imagegen.queue.verbs.context import VerbContext
from imagegen.queue.verbs.outbox_entry import outbox_due_ms
from imagegen.redis_client.lua import load_script

_SCRIPT = load_script(__package__, "claim_due")


async def claim_due(context: VerbContext, until: float, limit: int) -> list[bytes]:
    """Claim up to `limit` names that are due by `until`, Unix time, and postpone them. Return the names."""
    until_ms = "+inf" if math.isinf(until) else int(until * 1000)
    args = [until_ms, outbox_due_ms(context.connection.clock()), limit]
    names = cast(list[bytes], await context.run(_SCRIPT, [context.keys.outbox], args))
    context.count("hooks", 2 + bool(names))  # the script call, ZRANGEBYSCORE, and one ZADD
    return names
