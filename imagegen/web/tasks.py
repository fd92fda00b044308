"""Owns the reading of tasks: GET /api/images/{taskId}."""

from __future__ import annotations

import math

from aiohttp import web

from imagegen.queue.estimate import Place
from imagegen.tasks.task import Task
from imagegen.web.context import CONTEXT, image_urls
from imagegen.web.edge import json_response, language
from imagegen.web.shapes import TaskView
from imagegen.web.views import not_found_view, task_view
from imagegen.web.waiting import applied, wait_until_final, wanted_wait_s


async def get_task(request: web.Request) -> web.Response:
    """The task as it is now, or when it is finished where that is wanted; an odd id is one that does not exist."""
    context, wait_s = request.app[CONTEXT], wanted_wait_s(request)
    task = await context.queue.get(request.match_info["task_id"])
    if task is None:
        return not_found(request)
    if wait_s and not task.state.final:
        task = await wait_until_final(context, task, wait_s, request)
    view, headers = await describe(request, task)
    headers |= applied(wait_s)
    if matches(request.headers.get("If-None-Match"), headers["ETag"]):
        return web.Response(status=304, headers=headers)
    return json_response(view, headers=headers)


def not_found(request: web.Request) -> web.Response:
    """The answer of every route about one task that is unknown or expired: the seed's."""
    return json_response(not_found_view(language(request)), status=404)


async def describe(request: web.Request, task: Task) -> tuple[TaskView, dict[str, str]]:
    """The GET body of a task and the headers that go with it."""
    context = request.app[CONTEXT]
    place = await context.queue.place(task)
    urls = image_urls(context.base_url(request))
    view = task_view(task, urls, language=language(request), max_attempts=context.max_attempts, place=place)
    headers = {"ETag": f'"{task.sequence}"', "Cache-Control": "no-cache"}
    if not task.state.final:
        headers["Retry-After"] = str(retry_after_s(place))
    return view, headers


def retry_after_s(place: Place) -> int:
    """When it is worth to ask again: by half of what is left, within 1 to 30 s; 2 s where nothing is known."""
    return 2 if place.eta_s is None else min(max(math.ceil(place.eta_s / 2), 1), 30)


def matches(if_none_match: str | None, etag: str) -> bool:
    """Whether the client has this version (RFC 9110, 13.1.2: weak comparison)."""
    if not if_none_match:
        return False
    if if_none_match.strip() == "*":
        return True
    return etag in (candidate.strip().removeprefix("W/") for candidate in if_none_match.split(","))
