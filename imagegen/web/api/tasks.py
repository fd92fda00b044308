"""Routes of a task: read, cancel and retry it; and the operator's list of tasks."""

from __future__ import annotations

import asyncio
import re

import msgspec
from aiohttp import web
from msgspec.structs import replace

from imagegen.accounts.keys import check_allowed
from imagegen.errors import AlreadyFinished, FieldError, InvalidRequest, NotRetryable
from imagegen.queue.canceller import CancelResult
from imagegen.queue.task_list import Cursor
from imagegen.tasks.request import GenerationRequest
from imagegen.tasks.task import State, Task
from imagegen.web.api.long_poll import parse_wait_s, preference_applied, wait_until_final
from imagegen.web.api.schemas import ListedTaskView, TaskListView
from imagegen.web.api.task_responses import build_submit_response, cached_task_body, not_found, render_task
from imagegen.web.context import SERVICES
from imagegen.web.guard import GUARD, client_of
from imagegen.web.http.forwarded import owner_name, submitter_name
from imagegen.web.http.responses import etag_matches, json_bytes, json_response
from imagegen.web.lookup import find_fresh_task, find_task, find_tasks
from imagegen.web.submitter import spend_units, submit

DEFAULT_LIMIT, MAX_LIMIT = 20, 100

_CURSOR = re.compile(r"(0|[1-9][0-9]{0,17})-([0-9a-f]{32})")


async def get_task(request: web.Request) -> web.StreamResponse:
    """Return a task now, or when it is finished if the client waits. A malformed id is that of an unknown task."""
    services, wait_s = request.app[SERVICES], parse_wait_s(request)
    task = await find_task(request)
    if task is None:
        return not_found(request)
    if wait_s and not task.state.is_final:
        task = await wait_until_final(services, task, wait_s, request)
    body, headers = await cached_task_body(request, services, task)
    headers |= preference_applied(wait_s)
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


async def list_tasks(request: web.Request) -> web.StreamResponse:
    """Return a page of tasks, newest first, as `get_task` shows each. Raises InvalidRequest, QueueUnavailable."""
    services = request.app[SERVICES]
    state, before, limit = _parse_page(request)
    page = await services.queue.listing.page(state, before, limit)
    tasks = await find_tasks(request, page.task_ids)
    listed = await asyncio.gather(*(_listed(request, task) for task in tasks if task is not None))
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
