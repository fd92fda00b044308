"""Owns POST /v1/images/generations: the same queue, answered as the clients of OpenAI and Together expect it."""

from __future__ import annotations

import asyncio
import base64
import re
from contextlib import closing

from aiohttp import hdrs, web

from imagegen.errors import FieldFault, InvalidRequest, StoreUnavailable
from imagegen.tasks.image import StoredImage
from imagegen.tasks.task import State, Task
from imagegen.web.body import read_json
from imagegen.web.context import CONTEXT, Context, image_urls
from imagegen.web.edge import json_response
from imagegen.web.generate import submit
from imagegen.web.presence import wake_when_gone
from imagegen.web.tasks import retry_after_s
from imagegen.web.v1.errors import failure_response, unfinished_response
from imagegen.web.v1.fields import Wanted, parse
from imagegen.web.v1.repeats import ended_for_good, is_repeat, patience_s
from imagegen.web.v1.shapes import AcceptedAnswer, PictureEntry, PicturesAnswer
from imagegen.web.v1.stream import Events
from imagegen.web.waiting import wait_until_final, wanted_wait_s
from imagegen.web.wish import wish_of

_RESPOND_ASYNC = re.compile(r"(?:^|[,;\s])respond-async(?=$|[,;\s])", re.IGNORECASE)


async def generations(request: web.Request) -> web.StreamResponse:
    """Queues or joins the task and answers with its pictures, or before the client gives up."""
    context, identity = request.app[CONTEXT], request.app[CONTEXT].identity
    clock = asyncio.get_running_loop().time
    started_at = clock()
    wanted = parse(await read_json(request), default_model=identity.default_model, aliases=identity.aliases)
    submission = identity.submission(wanted.request, None)
    ended = await ended_for_good(context.queue, submission.task_id, request.headers)
    if ended:
        return failure_response(ended)
    fresh = wish_of(request).fresh and not is_repeat(request.headers)
    task = (await submit(context, submission, fresh=fresh)).task
    within_s = patience_s(request.headers) - (clock() - started_at)
    if wanted.streamed:
        return await _streamed(request, context, task, within_s)
    later = _prefers_async(request)
    if not task.state.final:
        wait_s = min(within_s, wanted_wait_s(request)) if later else within_s
        task = await wait_until_final(context, task, wait_s, request)
    if later and not task.state.final:
        return await _accepted(context, request, task)
    if task.state is State.COMPLETED:
        return json_response(await _answer(request, context, wanted, task))
    return await _without_pictures(request, context, task)


async def _streamed(request: web.Request, context: Context, task: Task, within_s: float) -> web.StreamResponse:
    async def encode(task: Task, image: StoredImage) -> str:
        return await _base64(context, task, image)

    with context.feed.subscribe([task.id]) as subscription:
        wake_when_gone(request, subscription.wake)
        task = await context.queue.get(task.id) or task
        events = Events(subscription, context.readiness, encode)
        streamed = await events.send(request, task, within_s)
    return streamed or await _without_pictures(request, context, events.task or task)


async def _without_pictures(request: web.Request, context: Context, task: Task) -> web.Response:
    """The answer for a task that failed, or is not done; the next POST waits too, so only the rest is to be slept."""
    if task.state.final:
        return failure_response(task)
    place = await context.queue.place(task)
    location = context.local_url(request, f"/api/images/{task.id}")
    response = unfinished_response(task, (place.eta_s or 0.0) - patience_s(request.headers), location)
    if context.readiness.draining:
        response.force_close()
    return response


async def _answer(request: web.Request, context: Context, wanted: Wanted, task: Task) -> PicturesAnswer:
    """What both clients take in their strict modes too."""
    url_of = image_urls(context.base_url(request))
    entries: list[PictureEntry] = [
        {"index": image.index, "type": "b64_json", "b64_json": await _base64(context, task, image)}
        if wanted.as_base64
        else {"index": image.index, "type": "url", "url": url_of(task, image)}
        for image in task.images
    ]
    answer: PicturesAnswer = {
        "id": task.id,
        "object": "list",
        "created": int(task.created_at),
        "model": task.model,
        "data": entries,
    }
    if task.warnings:
        answer["warnings"] = list(task.warnings)
    return answer


async def _base64(context: Context, task: Task, image: StoredImage) -> str:
    """Raises StoreUnavailable, and InvalidRequest where only the provider has the bytes."""
    if image.url:
        raise InvalidRequest(details=[FieldFault("response_format", "this service keeps links only: ask for url")])
    opened = await context.store.open(task.id, image)
    if opened is None:
        raise StoreUnavailable
    with closing(opened):
        data = await opened.read_all()
    return base64.b64encode(data).decode()


def _prefers_async(request: web.Request) -> bool:
    return bool(_RESPOND_ASYNC.search(",".join(request.headers.getall("Prefer", ()))))


async def _accepted(context: Context, request: web.Request, task: Task) -> web.Response:
    path = f"/api/images/{task.id}"
    here = f"{context.base_url(request)}{path}"
    body: AcceptedAnswer = {
        "id": task.id,
        "object": "image.task",
        "created": int(task.created_at),
        "model": task.model,
        "status": task.state,
        "status_url": here,
        "events_url": f"{here}/events",
        "cancel_url": f"{here}/cancel",
    }
    headers = {
        hdrs.LOCATION: context.local_url(request, path),
        "Preference-Applied": "respond-async",
        "retry-after": str(retry_after_s(await context.queue.place(task))),
    }
    return json_response(body, status=202, headers=headers)
