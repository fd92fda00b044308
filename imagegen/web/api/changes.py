"""Owns what a client may do to a task: cancel it, for everybody who joined it, and try it again."""

from __future__ import annotations

from aiohttp import web

from imagegen.errors import AlreadyFinished, NotRetryable
from imagegen.queue.client_queue import CacheResult, Submission
from imagegen.tasks.task import State
from imagegen.web.api.submit import build_response, submit
from imagegen.web.api.tasks import not_found, render_task
from imagegen.web.context import SERVICES
from imagegen.web.http.forwarded import client_address, owner_name
from imagegen.web.http.middleware import json_response


async def cancel(request: web.Request) -> web.Response:
    """DELETE of a task, and POST to its `cancel`. Raises AlreadyFinished."""
    context, task_id = request.app[SERVICES], request.match_info["task_id"]
    task = await context.queue.newest(task_id)
    if task is None:
        return not_found(request)
    if task.state.is_final:
        raise AlreadyFinished
    stands = await context.queue.cancel(task_id)
    if stands is None:
        return not_found(request)
    if stands.state is not State.CANCELLED:
        raise AlreadyFinished
    view, headers = await render_task(request, stands)
    return json_response(view, headers=headers)


async def retry(request: web.Request) -> web.Response:
    """Queues a failed or cancelled task afresh under its id. Raises NotRetryable.

    Of its webhooks only those of the client that asks are called again.
    """
    context = request.app[SERVICES]
    task = await context.queue.newest(request.match_info["task_id"])
    if task is not None and not task.state.is_final:
        task = await context.queue.read(task.id)  # it may have been cancelled elsewhere this moment
    if task is None:
        return not_found(request)
    if task.state not in (State.FAILED, State.CANCELLED) or not task.request_json:
        raise NotRetryable
    owner = owner_name(client_address(request, context.trusted_hops))
    webhooks = tuple(delivery.webhook for delivery in task.deliveries if delivery.webhook.owner == owner)
    submission = Submission(task.id, task.digest, task.model, task.request_json, webhooks)
    submitted = await submit(context, submission)
    if submitted.cached is CacheResult.HIT:
        raise NotRetryable
    answer = await build_response(request, context, submitted)
    return json_response(answer.view, status=answer.status, headers=answer.headers)
