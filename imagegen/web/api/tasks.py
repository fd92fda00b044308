"""Routes of a task: submit, read, await, cancel and retry it; the list of tasks; and the responses about a task."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable

import msgspec
from aiohttp import hdrs, web
from msgspec import Struct
from msgspec.structs import replace
from multidict import istr

from imagegen.accounts.api_keys import check_allowed
from imagegen.errors import AlreadyFinished, FieldError, InvalidRequest, NotRetryable, Unauthorized
from imagegen.queue.canceller import CancelResult
from imagegen.queue.client_queue import CacheResult, SubmitResult
from imagegen.queue.eta import QueuePosition
from imagegen.queue.task_list import Cursor
from imagegen.tasks.clients import owner_name, submitter_name
from imagegen.tasks.image import StoredImage
from imagegen.tasks.request import GenerationRequest
from imagegen.tasks.task import State, Task
from imagegen.web.api.schemas import FinishedView, ListedTaskView, SubmittedView, TaskListView, TaskView
from imagegen.web.api.serializers import (
    FREE,
    TaskLinks,
    cost_view,
    image_view,
    not_found_view,
    retry_after_s,
    submit_headers,
    submitted_view,
    task_view,
)
from imagegen.web.guard import GUARD, client_of, still_admits
from imagegen.web.handler_services import SERVICES, Services
from imagegen.web.http.body import receive_json
from imagegen.web.http.disconnect import begin_wait, is_disconnected, is_wait_ended, on_disconnect
from imagegen.web.http.read_slots import in_read_slot
from imagegen.web.http.responses import etag_matches, json_bytes, json_response, language
from imagegen.web.lookup import find_fresh_task, find_task, find_tasks
from imagegen.web.response_cache import ResponseKey
from imagegen.web.submitter import SubmitOptions, spend_units, submit, submit_body

DEFAULT_LIMIT, MAX_LIMIT = 20, 100

_CURSOR = re.compile(r"(0|[1-9][0-9]{0,17})-([0-9a-f]{32})")

MAX_WAIT_S = 60

REPORT_S = 8.0
"""The longest time between two reports of a wait."""

_PREFER_HEADER = istr("Prefer")
_PREFER = re.compile(r"(?:^|[,;\s])wait\s*=\s*\"?([0-9]{1,6})\"?(?=$|[,;\s])", re.IGNORECASE)

_ANYONE, _ADMIN = "any", "admin"


async def generate(request: web.Request) -> web.StreamResponse:
    """Queue a task, join an unfinished one, or point at a finished one; wait for its end on request."""
    services, wait_s, options = request.app[SERVICES], parse_wait_s(request), SubmitOptions.from_request(request)
    async with receive_json(request, services.inputs.uploads) as body:
        submitted = await submit_body(services, body, options)
    if wait_s:
        begin_wait(request)
        submitted = replace(submitted, task=await wait_until_final(services, submitted.task, wait_s, request))
    elif submitted.cached is CacheResult.HIT:
        return await cached_hit_response(request, services, submitted)
    response = await build_submit_response(request, services, submitted, waited=bool(wait_s))
    headers = response.headers | wait_headers(request, wait_s) if wait_s else response.headers
    return json_response(response.view, status=response.status, headers=headers)


async def get_task(request: web.Request) -> web.StreamResponse:
    """Return a task now, or when it is finished if the client waits. A malformed id is that of an unknown task."""
    services, wait_s = request.app[SERVICES], parse_wait_s(request)
    task = await find_task(request)
    if task is None:
        return not_found(request)
    if wait_s and not task.state.is_final:
        begin_wait(request)
        task = await wait_until_final(services, task, wait_s, request)
    body, headers = await cached_task_body(request, services, task)
    headers |= wait_headers(request, wait_s)
    if etag_matches(request, headers["ETag"]):
        return web.Response(status=304, headers=headers)
    return json_bytes(body, headers=headers)


async def cancel(request: web.Request) -> web.StreamResponse:
    """Cancel a task, or leave it if other clients joined it. Raises AlreadyFinished, InvalidRequest, Unauthorized."""
    client = "" if _parse_force(request) else submitter_name(client_of(request).id)
    reply = await cancel_task(request, client)
    if reply is None or reply.task is None:
        return not_found(request)
    view, headers = await render_task(request, reply.task)
    if reply.left:
        view["left"] = True
    return json_response(view, headers=headers)


async def cancel_task(request: web.Request, client: str, task_id: str | None = None) -> CancelResult | None:
    """Cancel the task of an id, or of the path, or leave it; return None if it is unknown. Raises AlreadyFinished."""
    task = await find_fresh_task(request, task_id)
    if task is None:
        return None
    if task.state.is_final:
        raise AlreadyFinished
    reply = await request.app[SERVICES].queue.cancel_by(client, task.id)
    if reply.task is not None and not reply.left and reply.task.state is not State.CANCELLED:
        raise AlreadyFinished
    return reply


def _parse_force(request: web.Request) -> bool:
    """Return whether the operator cancels for all clients. Raises InvalidRequest, Unauthorized, RateLimited."""
    value = request.query.get("force", "false").lower()
    if value not in ("true", "false"):
        raise InvalidRequest(details=[FieldError("force", "must be true or false")])
    if value == "true" and not client_of(request).is_admin:
        request.app[GUARD].require_admin(request)
    return value == "true"


async def retry(request: web.Request) -> web.StreamResponse:
    """Queue a failed or cancelled task again under its id. Raises NotRetryable.

    Only those of its webhooks are called again that belong to the client of this request.
    """
    services = request.app[SERVICES]
    task = await find_fresh_task(request)
    if task is not None and not task.state.is_final:
        task = await services.queue.read(task.id)  # another instance may have cancelled it this moment
    if task is None:
        return not_found(request)
    if task.state not in (State.FAILED, State.CANCELLED) or not task.request_json:
        raise NotRetryable
    client, request_again = client_of(request), GenerationRequest.from_json(task.request_json)
    check_allowed(client.key, request_again)
    await spend_units(request, request_again.units)
    await services.inputs.keep_again(task.request_json)
    owner = owner_name(client.id)
    webhooks = tuple(delivery.webhook for delivery in task.deliveries if delivery.webhook.owner == owner)
    by = submitter_name(client.id)
    submission = replace(services.identity.resubmission(task, webhooks), client=client.name, submitter=by)
    submitted = await submit(services, submission)
    response = await build_submit_response(request, services, submitted)
    return json_response(response.view, status=response.status, headers=response.headers)


@in_read_slot
async def list_tasks(request: web.Request) -> web.StreamResponse:
    """Return a page of tasks, newest first, as `get_task` shows each. Raises InvalidRequest, QueueUnavailable."""
    services = request.app[SERVICES]
    state, before, limit = _parse_page(request)
    page = await services.queue.listing.page(state, before, limit)
    tasks = await find_tasks(request, page.task_ids)
    listed = [await _listed(request, task) for task in tasks if task is not None]
    next_cursor = f"{page.next[0]}-{page.next[1]}" if page.next else None
    body: TaskListView = {"success": True, "tasks": listed, "nextCursor": next_cursor}
    return json_response(body)


async def _listed(request: web.Request, task: Task) -> ListedTaskView:
    """Return a task as the admin's list shows it; the record of an unfinished one has no request."""
    view, _ = await render_task(request, task)
    fields = msgspec.json.decode(task.request_json) if task.request_json else None
    return {**view, "request": fields, "key": task.client or None}


def _parse_page(request: web.Request) -> tuple[State | None, Cursor | None, int]:
    """Return state, cursor and limit of a query. Raises InvalidRequest with every error."""
    query, errors = request.query, []
    status, cursor, limit = query.get("status"), query.get("cursor"), query.get("limit", str(DEFAULT_LIMIT))
    if status is not None and status not in tuple(State):
        errors.append(FieldError("status", f"must be one of {', '.join(State)}"))
    if not re.fullmatch(r"[1-9][0-9]{0,2}", limit) or int(limit) > MAX_LIMIT:
        errors.append(FieldError("limit", f"must be a whole number from 1 to {MAX_LIMIT}"))
    match = None if cursor is None else _CURSOR.fullmatch(cursor)
    if cursor is not None and match is None:
        errors.append(FieldError("cursor", "must be the nextCursor of an answer"))
    if errors:
        raise InvalidRequest(details=errors)
    return State(status) if status else None, (int(match[1]), match[2]) if match else None, int(limit)


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


def wait_headers(request: web.Request, wait_s: int) -> dict[str, str]:
    """Return the header that confirms the wait, and the one that ends the connection of a wait that was ended."""
    headers = {"Preference-Applied": f"wait={wait_s}"} if wait_s else {}
    return headers | {hdrs.CONNECTION: "close"} if is_wait_ended(request) else headers


async def wait_until_final(
    services: Services,
    task: Task,
    within_s: float,
    request: web.Request | None = None,
    report: Callable[[Task], Awaitable[None]] | None = None,
) -> Task:
    """Return the task when it is finished, after `within_s` seconds, or when this service stops.

    With its request, the wait also ends when the client leaves. Raises Unauthorized if its key is revoked meanwhile.
    report: called at once, with each change, and after `REPORT_S` without one.
    """
    deadline = asyncio.get_running_loop().time() + within_s
    feed = services.feed
    with feed.await_end(task.id) if report is None else feed.subscribe([task.id]) as subscription:
        if request is not None:
            on_disconnect(request, subscription.wake)
        task = await services.queue.get(task.id) or task
        while not (
            task.state.is_final
            or services.readiness.draining
            or (request is not None and (is_disconnected(request) or is_wait_ended(request)))
        ):
            left_s = deadline - asyncio.get_running_loop().time()
            if left_s <= 0:
                break
            if report is not None:
                await report(task)
                left_s = min(left_s, REPORT_S)
            for changed in await subscription.changes(left_s):
                task = max(task, changed, key=lambda state: state.sequence)
            if request is not None and not still_admits(request):
                raise Unauthorized
    return task


class SubmitResponse(Struct, frozen=True):
    """Status, body and headers of the response to a submit."""

    status: int
    view: SubmittedView | FinishedView
    headers: dict[str, str]


async def build_submit_response(
    request: web.Request, services: Services, submitted: SubmitResult, *, waited: bool = False
) -> SubmitResponse:
    """Return the response to a submit: the finished task if the client waited for it, else a link to it."""
    task = services.models.with_notices(submitted.task, services.queue.clock())
    if task is not submitted.task:
        submitted = replace(submitted, task=task)
    links, hit = TaskLinks(services.link_base.url(request), services.links), submitted.cached is CacheResult.HIT
    if waited and task.state.is_final:
        finished, task_headers = await render_task(request, task)
        cost = cost_view(task, is_free=submitted.cached in FREE)
        headers = submit_headers(submitted, links) | task_headers
        return SubmitResponse(200, {**finished, "cost": cost, "cached": hit}, headers)
    place = await services.queue.position(task)
    view = submitted_view(submitted, place, links, language(request))
    headers = submit_headers(submitted, links)
    if not task.state.is_final:
        headers["Retry-After"] = str(retry_after_s(place))
    return SubmitResponse(200 if hit else 202, view, headers)


async def cached_hit_response(request: web.Request, services: Services, submitted: SubmitResult) -> web.StreamResponse:
    """Return the response to a submit that met a finished task, rendered once for equal clients."""
    task = submitted.task
    key = _cache_key("hit", request, services, task)
    body = services.response_cache.get(key, task)
    if body is not None:
        links = TaskLinks(services.link_base.url(request), services.links)
        return json_bytes(body, headers=submit_headers(submitted, links))
    response = await build_submit_response(request, services, submitted)
    body = msgspec.json.encode(response.view)
    if task.state.is_final:
        services.response_cache.put(key, task, body)
    return json_bytes(body, status=response.status, headers=response.headers)


async def cached_task_body(request: web.Request, services: Services, task: Task) -> tuple[bytes, dict[str, str]]:
    """Return the GET body of a task and its headers; it is rendered once for equal clients until it changes."""
    key, place = _cache_key("task", request, services, task), await services.queue.position(task)
    body = services.response_cache.get(key, task, place)
    if body is None:
        body = msgspec.json.encode(_task_view(request, services, task, place))
        services.response_cache.put(key, task, body, place)
    return body, _task_headers(task, place)


async def render_task(request: web.Request, task: Task) -> tuple[TaskView, dict[str, str]]:
    """Return the GET body of a task and its headers."""
    services = request.app[SERVICES]
    place = await services.queue.position(task)
    return _task_view(request, services, task, place), _task_headers(task, place)


def cached_image_body(request: web.Request, services: Services, task: Task, image: StoredImage) -> bytes:
    """Return an image as the body of its task shows it, rendered once for equal clients."""
    key = _cache_key(f"image {image.index}", request, services, task)
    body = services.response_cache.get(key, task)
    if body is None:
        links = TaskLinks(services.link_base.url(request), services.links)
        body = msgspec.json.encode(image_view(task, image, links.image))
        services.response_cache.put(key, task, body)
    return body


def _task_view(request: web.Request, services: Services, task: Task, place: QueuePosition) -> TaskView:
    return task_view(
        services.models.with_notices(_with_own_webhooks(request, services, task), services.queue.clock()),
        TaskLinks(services.link_base.url(request), services.links).image,
        language=language(request),
        max_attempts=services.max_attempts,
        place=place,
    )


def not_found(request: web.Request) -> web.StreamResponse:
    """Return the response of every route about one task that is unknown or expired."""
    return json_response(not_found_view(language(request)), status=404)


def _cache_key(kind: str, request: web.Request, services: Services, task: Task) -> ResponseKey:
    """Return the key of a response: where clients need a key, its links are signed and it shows their own webhooks."""
    viewer = ""
    if services.links.is_on():
        viewer = _webhook_owner(request) if task.deliveries else _ANYONE
    return ResponseKey(kind, task.id, services.link_base.url(request), language(request), viewer)


def _with_own_webhooks(request: web.Request, services: Services, task: Task) -> Task:
    """Return the task with those of its webhooks that its client may see: where clients need a key, its own."""
    if not task.deliveries or not services.links.is_on() or client_of(request).is_admin:
        return task
    owner = _webhook_owner(request)
    own = tuple(delivery for delivery in task.deliveries if delivery.webhook.owner == owner)
    return replace(task, deliveries=own)


def _webhook_owner(request: web.Request) -> str:
    """Return the owner of the webhooks that the client sees."""
    client = client_of(request)
    return _ADMIN if client.is_admin else owner_name(client.id)


def _task_headers(task: Task, place: QueuePosition) -> dict[str, str]:
    headers = {"ETag": f'"{task.sequence}"', "Cache-Control": "no-cache"}
    if not task.state.is_final:
        headers["Retry-After"] = str(retry_after_s(place))
    return headers
