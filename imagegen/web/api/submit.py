"""Route of the submit: POST /api/images/generate."""

from __future__ import annotations

from aiohttp import web
from msgspec.structs import replace

from imagegen.queue.client_queue import CacheResult
from imagegen.web.api.long_poll import parse_wait_s, preference_applied, wait_until_final
from imagegen.web.api.task_responses import build_submit_response, cached_hit_response
from imagegen.web.context import SERVICES
from imagegen.web.http.json_images import receive_json
from imagegen.web.http.responses import json_response
from imagegen.web.submitter import SubmitOptions, submit_body


async def generate(request: web.Request) -> web.StreamResponse:
    """Queue a task, join an unfinished one, or point at a finished one; wait for its end on request."""
    services, wait_s, options = request.app[SERVICES], parse_wait_s(request), SubmitOptions.from_request(request)
    async with receive_json(request, services.uploads) as body:
        submitted = await submit_body(services, body, options)
    if wait_s:
        submitted = replace(submitted, task=await wait_until_final(services, submitted.task, wait_s, request))
    elif submitted.cached is CacheResult.HIT:
        return await cached_hit_response(request, services, submitted)
    response = await build_submit_response(request, services, submitted, waited=bool(wait_s))
    return json_response(response.view, status=response.status, headers=response.headers | preference_applied(wait_s))
