"""Owns the submit: POST /api/images/generate."""

from __future__ import annotations

from aiohttp import web

from imagegen.errors import Draining
from imagegen.queue.queue import Cached, Submission, Submitted
from imagegen.tasks.request import GenerationRequest
from imagegen.web.body import read_json
from imagegen.web.context import CONTEXT, Context
from imagegen.web.edge import json_response, language
from imagegen.web.views import submitted_view


async def generate(request: web.Request) -> web.Response:
    """Queues a task, joins the one that runs, or points at the finished one."""
    context = request.app[CONTEXT]
    body = await read_json(request)
    identity = context.identity
    wanted = GenerationRequest.parse(body, default_model=identity.default_model, aliases=identity.aliases)
    submitted = await submit(context, identity.submission(wanted, None))
    place = await context.queue.place(submitted.task)
    view = submitted_view(submitted, place, context.base_url(request), language(request))
    headers = {"Location": f"/api/images/{submitted.task.id}", "X-Cache": submitted.cached.value}
    return json_response(view, status=200 if submitted.cached is Cached.HIT else 202, headers=headers)


async def submit(context: Context, submission: Submission) -> Submitted:
    """Submits; a finished task one of whose pictures is gone is queued afresh."""
    if context.readiness.draining:
        raise Draining(headers={"Retry-After": "5"})
    submitted = await context.queue.submit(submission)
    task = submitted.task
    if submitted.cached is Cached.HIT and not await context.store.holds(task.id, task.images):
        return await context.queue.replace(submission, task, keep=False)
    return submitted
