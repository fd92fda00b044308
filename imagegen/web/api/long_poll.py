"""Long poll: a request waits for the end of a task."""

from __future__ import annotations

import asyncio
import re

from aiohttp import web
from multidict import istr

from imagegen.errors import FieldError, InvalidRequest, Unauthorized
from imagegen.tasks.task import Task
from imagegen.web.context import Services
from imagegen.web.guard import still_admits
from imagegen.web.http.disconnect import is_disconnected, on_disconnect

MAX_WAIT_S = 60

_PREFER_HEADER = istr("Prefer")
_PREFER = re.compile(r"(?:^|[,;\s])wait\s*=\s*\"?([0-9]{1,6})\"?(?=$|[,;\s])", re.IGNORECASE)


def parse_wait_s(request: web.Request) -> int:
    """Return the seconds that the client waits, by `?wait=` or `Prefer: wait=` (RFC 7240); 0 if it does not wait.

    A preference that is no number is ignored, a longer one is cut.

    Raises:
        InvalidRequest: the query is no number from 1 to 60.
    """
    query = request.query.get("wait") if request.rel_url.raw_query_string else None
    if query is not None:
        if not re.fullmatch(r"[1-9][0-9]{0,2}", query) or int(query) > MAX_WAIT_S:
            raise InvalidRequest(details=[FieldError("wait", f"must be a whole number from 1 to {MAX_WAIT_S}")])
        return int(query)
    preferences = request.headers.getall(_PREFER_HEADER, None)
    match = _PREFER.search(",".join(preferences)) if preferences else None
    return min(int(match[1]), MAX_WAIT_S) if match else 0


def preference_applied(wait_s: int) -> dict[str, str]:
    """Return the header that confirms the wait; no header if the client does not wait."""
    return {"Preference-Applied": f"wait={wait_s}"} if wait_s else {}


async def wait_until_final(services: Services, task: Task, within_s: float, request: web.Request | None = None) -> Task:
    """Return the task when it is finished, after `within_s` seconds, or when this service stops.

    With its request, the wait also ends when the client leaves. Raises Unauthorized if its key is revoked meanwhile.
    """
    deadline = asyncio.get_running_loop().time() + within_s
    with services.feed.subscribe([task.id]) as subscription:
        if request is not None:
            on_disconnect(request, subscription.wake)
        task = await services.queue.get(task.id) or task
        while not (
            task.state.is_final or services.readiness.draining or (request is not None and is_disconnected(request))
        ):
            left_s = deadline - asyncio.get_running_loop().time()
            if left_s <= 0:
                break
            for changed in await subscription.changes(left_s):
                task = max(task, changed, key=lambda seen: seen.sequence)
            if request is not None and not still_admits(request):
                raise Unauthorized
    return task
