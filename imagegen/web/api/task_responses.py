"""Responses about a task: body and headers, as every route of `/api` shows them."""

from __future__ import annotations

import math

import msgspec
from aiohttp import web
from msgspec import Struct

from imagegen.queue.client_queue import CacheResult, SubmitResult
from imagegen.queue.eta import QueuePosition
from imagegen.tasks.task import Task
from imagegen.web.api.response_cache import ResponseKey
from imagegen.web.api.schemas import FinishedView, SubmittedView, TaskView
from imagegen.web.api.serializers import FREE, cost_view, not_found_view, submitted_view, task_view
from imagegen.web.context import SERVICES, Services
from imagegen.web.guard import client_of
from imagegen.web.http.forwarded import owner_name
from imagegen.web.http.responses import json_bytes, json_response, language

_ANYONE, _ADMIN = "any", "admin"


class SubmitResponse(Struct, frozen=True):
    """Status, body and headers of the response to a submit."""

    status: int
    view: SubmittedView | FinishedView
    headers: dict[str, str]


async def build_submit_response(
    request: web.Request, services: Services, submitted: SubmitResult, *, waited: bool = False
) -> SubmitResponse:
    """Return the response to a submit: the finished task if the client waited for it, else a link to it."""
    submitted = msgspec.structs.replace(submitted, task=services.with_notices(submitted.task))
    task, hit = submitted.task, submitted.cached is CacheResult.HIT
    headers = submit_headers(request, services, submitted)
    if waited and task.state.is_final:
        finished, more = await render_task(request, task)
        cost = cost_view(task, is_free=submitted.cached in FREE)
        return SubmitResponse(200, {**finished, "cost": cost, "cached": hit}, headers | more)
    place = await services.queue.position(task)
    if not task.state.is_final:
        headers["Retry-After"] = str(retry_after_s(place))
    view = submitted_view(submitted, place, services.task_links(request), language(request))
    return SubmitResponse(200 if hit else 202, view, headers)


async def cached_hit_response(request: web.Request, services: Services, submitted: SubmitResult) -> web.StreamResponse:
    """Return the response to a submit that met a finished task, rendered once for equal clients."""
    task = submitted.task
    key = _cache_key("hit", request, services, task)
    body = services.response_cache.get(key, task)
    if body is not None:
        return json_bytes(body, headers=submit_headers(request, services, submitted))
    response = await build_submit_response(request, services, submitted)
    body = msgspec.json.encode(response.view)
    if task.state.is_final:
        services.response_cache.put(key, task, body)
    return json_bytes(body, status=response.status, headers=response.headers)


def submit_headers(request: web.Request, services: Services, submitted: SubmitResult) -> dict[str, str]:
    """Return the headers of every response to a submit."""
    location = services.local_url(request, f"/api/images/{submitted.task.id}")
    return {"Location": location, "X-Cache": submitted.cached}


async def cached_task_body(request: web.Request, services: Services, task: Task) -> tuple[bytes, dict[str, str]]:
    """Return the GET body of a task and its headers; that of a finished task is rendered once for equal clients."""
    key = _cache_key("task", request, services, task)
    body = services.response_cache.get(key, task)
    if body is not None:
        return body, _cache_headers(task)
    view, headers = await render_task(request, task)
    body = msgspec.json.encode(view)
    if task.state.is_final:
        services.response_cache.put(key, task, body)
    return body, headers


async def render_task(request: web.Request, task: Task) -> tuple[TaskView, dict[str, str]]:
    """Return the GET body of a task and its headers."""
    services = request.app[SERVICES]
    place = await services.queue.position(task)
    view = task_view(
        services.with_notices(_with_own_webhooks(request, services, task)),
        services.task_links(request).image,
        language=language(request),
        max_attempts=services.max_attempts,
        place=place,
    )
    headers = _cache_headers(task)
    if not task.state.is_final:
        headers["Retry-After"] = str(retry_after_s(place))
    return view, headers


def not_found(request: web.Request) -> web.StreamResponse:
    """Return the response of every route about one task that is unknown or expired."""
    return json_response(not_found_view(language(request)), status=404)


def retry_after_s(place: QueuePosition) -> int:
    """Return the seconds until the next poll: half of the time left, within 1 to 30; 2 without an estimate."""
    return 2 if place.eta_s is None else min(max(math.ceil(place.eta_s / 2), 1), 30)


def _cache_key(kind: str, request: web.Request, services: Services, task: Task) -> ResponseKey:
    """Return the key of a response: where clients need a key, its links are signed and it shows their own webhooks."""
    viewer = ""
    if services.links.is_on():
        viewer = _webhook_owner(request) if task.deliveries else _ANYONE
    return ResponseKey(kind, task.id, services.base_url(request), language(request), viewer)


def _with_own_webhooks(request: web.Request, services: Services, task: Task) -> Task:
    """Return the task with those of its webhooks that its client may see: where clients need a key, its own."""
    if not task.deliveries or not services.links.is_on() or client_of(request).is_admin:
        return task
    owner = _webhook_owner(request)
    own = tuple(delivery for delivery in task.deliveries if delivery.webhook.owner == owner)
    return msgspec.structs.replace(task, deliveries=own)


def _webhook_owner(request: web.Request) -> str:
    """Return the owner of the webhooks that the client sees."""
    client = client_of(request)
    return _ADMIN if client.is_admin else owner_name(client.id)


def _cache_headers(task: Task) -> dict[str, str]:
    return {"ETag": f'"{task.sequence}"', "Cache-Control": "no-cache"}
