"""Owns the list of tasks: GET /api/images, for the operator."""

from __future__ import annotations

import asyncio
import re

from aiohttp import web

from imagegen.errors import FieldError, InvalidRequest
from imagegen.queue.task_list import Cursor
from imagegen.tasks.task import State
from imagegen.web.api.schemas import TaskListView
from imagegen.web.api.tasks import render_task
from imagegen.web.context import SERVICES
from imagegen.web.http.middleware import json_response

DEFAULT_LIMIT, MAX_LIMIT = 20, 100

_CURSOR = re.compile(r"(0|[1-9][0-9]{0,17})-([0-9a-f]{32})")


async def list_tasks(request: web.Request) -> web.Response:
    """A page of tasks, newest first, each as its own route shows it. Raises InvalidRequest, QueueUnavailable."""
    context, query, faults = request.app[SERVICES], request.query, []
    status, cursor, limit = query.get("status"), query.get("cursor"), query.get("limit", str(DEFAULT_LIMIT))
    if status is not None and status not in tuple(State):
        faults.append(FieldError("status", f"must be one of {', '.join(State)}"))
    if not re.fullmatch(r"[1-9][0-9]{0,2}", limit) or int(limit) > MAX_LIMIT:
        faults.append(FieldError("limit", f"must be a whole number from 1 to {MAX_LIMIT}"))
    found = None if cursor is None else _CURSOR.fullmatch(cursor)
    if cursor is not None and found is None:
        faults.append(FieldError("cursor", "must be the nextCursor of an answer"))
    if faults:
        raise InvalidRequest(details=faults)
    before: Cursor | None = (int(found[1]), found[2]) if found else None
    page = await context.queue.listing.page(State(status) if status else None, before, int(limit))
    tasks = await asyncio.gather(*map(context.queue.get, page.task_ids))
    described = await asyncio.gather(*(render_task(request, task) for task in tasks if task is not None))
    next_cursor = f"{page.next[0]}-{page.next[1]}" if page.next else None
    answer: TaskListView = {"success": True, "tasks": [view for view, _ in described], "nextCursor": next_cursor}
    return json_response(answer)
