"""Routes of generations on `/v1`: the same queue, with the responses of OpenAI and Together."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping
from typing import Any

from aiohttp import web
from msgspec.structs import replace

from imagegen.accounts.api_keys import check_allowed
from imagegen.errors import FieldError, InvalidRequest, TaskNotFound
from imagegen.tasks.image import StoredImage
from imagegen.tasks.task import State, Task
from imagegen.web.api.tasks import parse_wait_s, wait_until_final
from imagegen.web.guard import client_of
from imagegen.web.handler_services import SERVICES, Services
from imagegen.web.http.body import ReceivedBody, parse_object, receive_json
from imagegen.web.http.disconnect import is_disconnected, on_disconnect
from imagegen.web.http.half_closed import is_half_closed, on_half_close
from imagegen.web.lookup import find_task
from imagegen.web.openai.bodies import accepted_response, async_task_response, base64_of, images_response
from imagegen.web.openai.client_calls import Ending
from imagegen.web.openai.error_responses import failure_response, unfinished_response
from imagegen.web.openai.fields import OpenAIRequest, parse
from imagegen.web.openai.keepalive import KeepaliveResponse
from imagegen.web.openai.sdk_retries import mark_of, repeats_by_itself, wait_limit_s
from imagegen.web.openai.stream import COMPLETED, ImageEventStream
from imagegen.web.openai.submit_call import ClientCall
from imagegen.web.submitter import SubmitOptions, spend_units

_RESPOND_ASYNC = re.compile(r"(?:^|[,;\s])respond-async(?=$|[,;\s])", re.IGNORECASE)


async def generations(request: web.Request) -> web.StreamResponse:
    """Parse a generation and answer it."""
    started_at = asyncio.get_running_loop().time()
    return await respond(request, await _read_generation(request), started_at)


async def generations_async(request: web.Request) -> web.StreamResponse:
    """Parse a generation and answer with its task."""
    return await respond_async(request, await _read_generation(request))


async def image_task(request: web.Request) -> web.StreamResponse:
    """Return a task of the asynchronous routes. Raises TaskNotFound."""
    task = await find_task(request)
    if task is None:
        raise TaskNotFound
    return await async_task_response(request.app[SERVICES], request, task)


async def _read_generation(request: web.Request) -> OpenAIRequest:
    async with receive_json(request, request.app[SERVICES].inputs.uploads) as body:
        return await read_request(request, parse_object(body.raw), body)


async def read_request(
    request: web.Request, fields: Mapping[str, Any], body: ReceivedBody, *, spell: Callable[[str], str] = str
) -> OpenAIRequest:
    """Parse a client's fields, count their units, and put uploads in place of the images in them.

    spell: returns the client's name of a field. Raises InvalidRequest under these names, and as
    `InputImages.store_images`.
    """
    services, scope = request.app[SERVICES], client_of(request).scope
    identity = services.identity
    try:
        parsed = parse(fields, default_model=identity.default_model, aliases=identity.aliases, adjust=identity.adjust)
    except InvalidRequest as error:
        details = [FieldError(spell(detail.field), detail.message) for detail in error.details]
        raise InvalidRequest(details=details) from error
    await spend_units(request, parsed.request.units)
    resolved = await services.inputs.store_images(parsed.request, fields, body, scope=scope, spell=spell)
    return parsed if resolved is parsed.request else replace(parsed, request=resolved)


async def respond(
    request: web.Request, parsed: OpenAIRequest, started_at: float, *, completed: str = COMPLETED
) -> web.StreamResponse:
    """Queue or join the task and return its images, or an error before the client times out.

    started_at: the event loop's time when the request came. completed: name of the event of a finished image.
    """
    services = request.app[SERVICES]
    call, ending = _client_call(request, parsed), Ending.LOST
    try:
        task = await call.task()
        on_half_close(request, call.suspect)
        spent_s = asyncio.get_running_loop().time() - started_at
        within_s = wait_limit_s(request.headers, services.openai.max_wait_s) - spent_s
        if parsed.streamed:
            events, streamed = await _streamed(request, services, task, within_s, completed)
            if streamed is not None:
                ending = events.ending
                return streamed
            task = events.task or task
            response, ending_then = await _response(request, services, parsed, task), _ending(request, task)
        else:
            response, ending_then = await _held(request, services, parsed, task, within_s)
        ending = await _deliver(request, response, ending_then)
        return response
    finally:
        await call.end(ending)


async def respond_async(request: web.Request, parsed: OpenAIRequest) -> web.StreamResponse:
    """Queue or join the task and return where it can be read."""
    services = request.app[SERVICES]
    call, ending = _client_call(request, parsed), Ending.LOST
    try:
        task = await call.task()
        on_half_close(request, call.suspect)
        response = await async_task_response(services, request, task, status=202)
        delivered = Ending.FAILED if task.state in (State.FAILED, State.CANCELLED) else Ending.DELIVERED
        ending = await _deliver(request, response, delivered)
        return response
    finally:
        await call.end(ending)


def _client_call(request: web.Request, parsed: OpenAIRequest) -> ClientCall:
    """Return the call of a request. Raises InvalidRequest, NotAllowed."""
    check_allowed(client_of(request).key, parsed.request, sides="size")
    options = SubmitOptions.from_request(request)
    return ClientCall(request.app[SERVICES], parsed, options, mark_of(request.headers))


async def _held(
    request: web.Request, services: Services, parsed: OpenAIRequest, task: Task, within_s: float
) -> tuple[web.StreamResponse, Ending]:
    """Return the response when the task is finished or the wait is over, and how the call ends once it is delivered."""
    is_async = _prefers_async(request)
    if services.openai.keepalive and not is_async and not repeats_by_itself(request.headers):
        keepalive = KeepaliveResponse(request, services)
        task = await keepalive.wait(task, within_s)
        response = await keepalive.complete(lambda: _response(request, services, parsed, task))
        return response, Ending.LOST if keepalive.has_error else _ending(request, task)
    if not task.state.is_final:
        wait_s = min(within_s, parse_wait_s(request)) if is_async else within_s
        task = await wait_until_final(services, task, wait_s, request)
    return await _response(request, services, parsed, task), _ending(request, task)


async def _response(request: web.Request, services: Services, parsed: OpenAIRequest, task: Task) -> web.StreamResponse:
    if task.state is State.COMPLETED:
        return await images_response(request, services, parsed, task)
    if task.state.is_final:
        return failure_response(task)
    if _prefers_async(request) and not parsed.streamed:
        return await accepted_response(services, request, task)
    return await _unfinished(request, services, task)


async def _unfinished(request: web.Request, services: Services, task: Task) -> web.Response:
    """Return the response for an unfinished task. The next POST waits too: the delay is only the rest."""
    place = await services.queue.position(task)
    location = services.link_base.path(request, f"/api/images/{task.id}")
    next_wait_s = wait_limit_s(request.headers, services.openai.max_wait_s)
    response = unfinished_response(task, (place.eta_s or 0.0) - next_wait_s, location)
    if services.readiness.draining:
        response.force_close()
    return response


async def _streamed(
    request: web.Request, services: Services, task: Task, within_s: float, completed: str
) -> tuple[ImageEventStream, web.StreamResponse | None]:
    """Send the events. Return them, and their response, None if nothing was sent."""

    async def encode(task: Task, image: StoredImage) -> str:
        return await base64_of(services, task, image)

    with services.feed.subscribe([task.id]) as subscription:
        on_disconnect(request, subscription.wake)
        task = await services.queue.get(task.id) or task
        events = ImageEventStream(subscription, services.readiness, encode, services.store, completed)
        return events, await events.send(request, task, within_s)


def _ending(request: web.Request, task: Task) -> Ending:
    """Return how a call with an answer about this task ends, if the answer is delivered."""
    if task.state is State.COMPLETED:
        return Ending.DELIVERED
    if task.state.is_final:
        return Ending.FAILED
    return Ending.DELIVERED if _prefers_async(request) else Ending.LOST


async def _deliver(request: web.Request, response: web.StreamResponse, ending: Ending) -> Ending:
    """Send a response now, so that its loss is noticed. Return how the call ended.

    A client that has closed its own side may not have read the response: its next equal call pays nothing.
    """
    if is_disconnected(request):
        return Ending.LOST
    try:
        await response.prepare(request)
        await response.write_eof()
    except ConnectionError:
        return Ending.LOST
    return Ending.LOST if is_half_closed(request) else ending


def _prefers_async(request: web.Request) -> bool:
    return bool(_RESPOND_ASYNC.search(",".join(request.headers.getall("Prefer", ()))))
