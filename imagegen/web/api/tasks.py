"""Owns the reading of tasks: GET /api/images/{taskId}."""

from __future__ import annotations

import math

import msgspec
from aiohttp import hdrs, web

from imagegen.queue.eta import QueuePosition
from imagegen.tasks.task import Task
from imagegen.web.api.long_poll import parse_wait_s, preference_applied, wait_until_final
from imagegen.web.api.response_cache import ResponseKey
from imagegen.web.api.schemas import TaskView
from imagegen.web.api.serializers import not_found_view, task_view
from imagegen.web.context import SERVICES, Services, image_url_builder
from imagegen.web.http.middleware import json_bytes, json_response, language


async def get_task(request: web.Request) -> web.Response:
    """The task as it is now, or when it is finished where that is wanted; an odd id is one that does not exist."""
    context, wait_s = request.app[SERVICES], parse_wait_s(request)
    task = await context.queue.get(request.match_info["task_id"])
    if task is None:
        return not_found(request)
    if wait_s and not task.state.is_final:
        task = await wait_until_final(context, task, wait_s, request)
    body, headers = await _cached_body(request, context, task)
    headers |= preference_applied(wait_s)
    if etag_matches(request.headers.get(hdrs.IF_NONE_MATCH), headers["ETag"]):
        return web.Response(status=304, headers=headers)
    return json_bytes(body, headers=headers)


async def _cached_body(request: web.Request, context: Services, task: Task) -> tuple[bytes, dict[str, str]]:
    """As `describe`; that of a finished task is kept."""
    asked = ResponseKey("task", task.id, context.base_url(request), language(request))
    body = context.response_cache.get(asked, task)
    if body is not None:
        return body, _cache_headers(task)
    view, headers = await render_task(request, task)
    body = msgspec.json.encode(view)
    if task.state.is_final:
        context.response_cache.put(asked, task, body)
    return body, headers


def not_found(request: web.Request) -> web.Response:
    """The answer of every route about one task that is unknown or expired: the seed's."""
    return json_response(not_found_view(language(request)), status=404)


async def render_task(request: web.Request, task: Task) -> tuple[TaskView, dict[str, str]]:
    """The GET body of a task and the headers that go with it."""
    context = request.app[SERVICES]
    place = await context.queue.position(task)
    urls = image_url_builder(context.base_url(request))
    view = task_view(task, urls, language=language(request), max_attempts=context.max_attempts, place=place)
    headers = _cache_headers(task)
    if not task.state.is_final:
        headers["Retry-After"] = str(retry_after_s(place))
    return view, headers


def _cache_headers(task: Task) -> dict[str, str]:
    return {"ETag": f'"{task.sequence}"', "Cache-Control": "no-cache"}


def retry_after_s(place: QueuePosition) -> int:
    """When it is worth to ask again: by half of what is left, within 1 to 30 s; 2 s where nothing is known."""
    return 2 if place.eta_s is None else min(max(math.ceil(place.eta_s / 2), 1), 30)


def etag_matches(if_none_match: str | None, etag: str) -> bool:
    """Whether the client has this version (RFC 9110, 13.1.2: weak comparison)."""
    if not if_none_match:
        return False
    if if_none_match.strip() == "*":
        return True
    return etag in (candidate.strip().removeprefix("W/") for candidate in if_none_match.split(","))
