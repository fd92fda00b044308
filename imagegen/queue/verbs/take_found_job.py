"""Verb `take_found_job`: ownership of a provider job that a task found in the provider's list.

A list shows the jobs of all tasks with the same key, and equal calls look alike in it. Each task keeps the ids of its
jobs, in its checkpoint and then in its record; both are read, which is rare: only after a lost response.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from typing import cast

from loguru import logger

from imagegen.queue.verbs.context import VerbContext
from imagegen.redis_client.redis_errors import ScanRefused

OWNED_S = 86_400
"""Longer than a provider lists a job that a search may find."""

SCAN_COUNT = 500


async def take_found_job(context: VerbContext, task_id: str, job_id: str) -> bool:
    """Let a task own a job. Return False if another task has it, or if Redis does not let us look."""
    name = context.keys.found_job(hashlib.sha256(job_id.encode()).hexdigest()[:32])
    async with context.connection.deadline():
        owner = cast(bytes | None, await context.connection.commands.set(name, task_id, nx=True, get=True, ex=OWNED_S))
    context.count("read", 1)
    if owner is not None and owner.decode() != task_id:
        return False
    quoted = f'"{job_id}"'.encode()
    try:
        async for values in _values_of_others(context, task_id):
            if any(value is not None and quoted in value for value in values):
                return False
    except ScanRefused as error:
        logger.warning("A job that the provider lists is not used, since its task can't be looked up: {}", error)
        return False
    return True


async def _values_of_others(context: VerbContext, task_id: str) -> AsyncIterator[list[bytes | None]]:
    """Yield the checkpoints and records of all other tasks, page by page."""
    keys, commands, cursor, begun = context.keys, context.connection.commands, 0, False
    kinds = (keys.checkpoint, keys.record)
    prefixes, own = tuple(kind("") for kind in kinds), {kind(task_id) for kind in kinds}
    while cursor or not begun:
        begun = True
        cursor, key_names = await context.connection.scan(cursor, f"{{{keys.prefix}}}:*", SCAN_COUNT)
        names = [name.decode() for name in key_names]
        names = [name for name in names if name.startswith(prefixes) and name not in own]
        async with context.connection.deadline():
            values = cast(list[bytes | None], await commands.mget(names)) if names else []
        context.count("read", 1 + bool(names))
        yield values
