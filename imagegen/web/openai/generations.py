"""Route of POST /v1/images/generations: the same queue, with the responses of OpenAI and Together."""

from __future__ import annotations

import asyncio
import base64
import re
from contextlib import closing

from aiohttp import hdrs, web

from imagegen.errors import FieldError, InvalidRequest, StoreUnavailable
from imagegen.tasks.image import StoredImage
from imagegen.tasks.task import State, Task
from imagegen.web.api.long_poll import parse_wait_s, wait_until_final
from imagegen.web.api.task_responses import retry_after_s
from imagegen.web.context import SERVICES, Services, image_url_builder
from imagegen.web.http.body import read_json
from imagegen.web.http.disconnect import on_disconnect
from imagegen.web.http.responses import json_response
from imagegen.web.openai.errors import failure_response, unfinished_response
from imagegen.web.openai.fields import OpenAIRequest, parse
from imagegen.web.openai.schemas import AcceptedResponse, ImageEntry, ImagesResponse
from imagegen.web.openai.sdk_retries import client_timeout_s, is_sdk_retry, permanent_failure
from imagegen.web.openai.stream import COMPLETED, ImageEventStream
from imagegen.web.submitter import SubmitOptions, submit

_RESPOND_ASYNC = re.compile(r"(?:^|[,;\s])respond-async(?=$|[,;\s])", re.IGNORECASE)


async def generations(request: web.Request) -> web.StreamResponse:
    """Parse a generation and answer it."""
    identity = request.app[SERVICES].identity
    started_at = asyncio.get_running_loop().time()
    wanted = parse(
        await read_json(request),
        default_model=identity.default_model,
        aliases=identity.aliases,
        adjust=identity.adjust,
    )
    return await respond(request, wanted, started_at)


async def respond(
    request: web.Request, wanted: OpenAIRequest, started_at: float, *, completed: str = COMPLETED
) -> web.StreamResponse:
    """Queue or join the task and return its images, or an error before the client times out.

    started_at: the event loop's time when the request came. completed: name of the event of a finished image.
    """
    services, options = request.app[SERVICES], SubmitOptions.from_request(request)
    identity = services.identity
    clock = asyncio.get_running_loop().time
    submission = identity.submission(wanted.request, options.scope)
    ended = await permanent_failure(services.queue, submission.task_id, request.headers)
    if ended:
        return failure_response(ended)
    fresh = options.fresh and not is_sdk_retry(request.headers)
    task = (await submit(services, submission, fresh=fresh)).task
    within_s = client_timeout_s(request.headers) - (clock() - started_at)
    if wanted.streamed:
        return await _streamed(request, services, task, within_s, completed)
    is_async = _prefers_async(request)
    if not task.state.is_final:
        wait_s = min(within_s, parse_wait_s(request)) if is_async else within_s
        task = await wait_until_final(services, task, wait_s, request)
    if is_async and not task.state.is_final:
        return await _accepted(services, request, task)
    if task.state is State.COMPLETED:
        return json_response(await _images_body(request, services, wanted, task))
    return await _without_images(request, services, task)


async def _streamed(
    request: web.Request, services: Services, task: Task, within_s: float, completed: str
) -> web.StreamResponse:
    async def encode(task: Task, image: StoredImage) -> str:
        return await _base64(services, task, image)

    with services.feed.subscribe([task.id]) as subscription:
        on_disconnect(request, subscription.wake)
        task = await services.queue.get(task.id) or task
        events = ImageEventStream(subscription, services.readiness, encode, completed)
        streamed = await events.send(request, task, within_s)
    return streamed or await _without_images(request, services, events.task or task)


async def _without_images(request: web.Request, services: Services, task: Task) -> web.Response:
    """Return the response for a failed or unfinished task. The next POST waits too: the delay is only the rest."""
    if task.state.is_final:
        return failure_response(task)
    place = await services.queue.position(task)
    location = services.local_url(request, f"/api/images/{task.id}")
    response = unfinished_response(task, (place.eta_s or 0.0) - client_timeout_s(request.headers), location)
    if services.readiness.draining:
        response.force_close()
    return response


async def _images_body(request: web.Request, services: Services, wanted: OpenAIRequest, task: Task) -> ImagesResponse:
    """Return the body, which both clients accept in their strict modes too."""
    url_of = image_url_builder(services.base_url(request))
    entries: list[ImageEntry] = [
        {"index": image.index, "type": "b64_json", "b64_json": await _base64(services, task, image)}
        if wanted.as_base64
        else {"index": image.index, "type": "url", "url": url_of(task, image)}
        for image in task.images
    ]
    body: ImagesResponse = {
        "id": task.id,
        "object": "list",
        "created": int(task.created_at),
        "model": task.model,
        "data": entries,
    }
    if warnings := services.with_notices(task).warnings:
        body["warnings"] = list(warnings)
    return body


async def _base64(services: Services, task: Task, image: StoredImage) -> str:
    """Raise StoreUnavailable, and InvalidRequest if only the provider has the bytes."""
    if image.url:
        raise InvalidRequest(details=[FieldError("response_format", "this service keeps links only: ask for url")])
    opened = await services.store.open(task.id, image)
    if opened is None:
        raise StoreUnavailable
    with closing(opened):
        data = await opened.read_all()
    return base64.b64encode(data).decode()


def _prefers_async(request: web.Request) -> bool:
    return bool(_RESPOND_ASYNC.search(",".join(request.headers.getall("Prefer", ()))))


async def _accepted(services: Services, request: web.Request, task: Task) -> web.StreamResponse:
    path = f"/api/images/{task.id}"
    url = f"{services.base_url(request)}{path}"
    body: AcceptedResponse = {
        "id": task.id,
        "object": "image.task",
        "created": int(task.created_at),
        "model": task.model,
        "status": task.state,
        "status_url": url,
        "events_url": f"{url}/events",
        "cancel_url": f"{url}/cancel",
    }
    headers = {
        hdrs.LOCATION: services.local_url(request, path),
        "Preference-Applied": "respond-async",
        "retry-after": str(retry_after_s(await services.queue.position(task))),
    }
    return json_response(body, status=202, headers=headers)
