"""Owns the reading of tasks: GET /api/images/{taskId}."""

from __future__ import annotations

from aiohttp import web

from imagegen.web.context import CONTEXT, image_urls
from imagegen.web.edge import json_response, language
from imagegen.web.views import not_found_view, task_view


async def get_task(request: web.Request) -> web.Response:
    """The task as it is now; an odd id is one that does not exist."""
    context = request.app[CONTEXT]
    task = await context.queue.get(request.match_info["task_id"])
    if task is None:
        return json_response(not_found_view(language(request)), status=404)
    etag = f'"{task.sequence}"'
    headers = {"ETag": etag, "Cache-Control": "no-cache"}
    if not task.state.final:
        headers["Retry-After"] = str(context.retry_after_s)
    if matches(request.headers.get("If-None-Match"), etag):
        return web.Response(status=304, headers=headers)
    urls = image_urls(context.base_url(request))
    view = task_view(task, urls, language=language(request), max_attempts=context.max_attempts)
    return json_response(view, headers=headers)


def matches(if_none_match: str | None, etag: str) -> bool:
    """Whether the client has this version (RFC 9110, 13.1.2: weak comparison)."""
    if not if_none_match:
        return False
    if if_none_match.strip() == "*":
        return True
    return etag in (candidate.strip().removeprefix("W/") for candidate in if_none_match.split(","))
