"""Owns the waiting of a client for the end of a task."""

from __future__ import annotations

import asyncio
import re

from aiohttp import web

from imagegen.errors import FieldFault, InvalidRequest
from imagegen.tasks.task import Task
from imagegen.web.context import Context

MAX_WAIT_S = 60

_PREFER = re.compile(r"(?:^|[,;\s])wait\s*=\s*\"?(\d{1,6})\"?(?=$|[,;\s])", re.IGNORECASE)


def wanted_wait_s(request: web.Request) -> int:
    """Seconds the client wants to wait, by `?wait=` or `Prefer: wait=` (RFC 7240); 0 for not at all.

    Raises InvalidRequest for a query that is no number from 1 to 60; a preference that is none is just not applied,
    and a longer one is cut.
    """
    query = request.query.get("wait")
    if query is not None:
        if not re.fullmatch(r"\d{1,3}", query) or not 1 <= int(query) <= MAX_WAIT_S:
            raise InvalidRequest(details=[FieldFault("wait", f"must be a whole number from 1 to {MAX_WAIT_S}")])
        return int(query)
    found = _PREFER.search(",".join(request.headers.getall("Prefer", ())))
    return min(int(found[1]), MAX_WAIT_S) if found else 0


async def wait_until_final(context: Context, task: Task, within_s: float) -> Task:
    """The task when it is finished, or as it is after `within_s`, or when this service stops."""
    deadline = asyncio.get_running_loop().time() + within_s
    with context.feed.subscribe([task.id]) as subscription:
        task = await context.queue.get(task.id) or task
        while not task.state.final and not context.readiness.draining:
            left_s = deadline - asyncio.get_running_loop().time()
            if left_s <= 0:
                break
            for changed in await subscription.changes(left_s):
                task = changed
    return task
