"""Bodies of `/v1` about tasks: the images, a task that goes on, and the tasks of the asynchronous routes."""

from __future__ import annotations

import orjson
from aiohttp import hdrs, web

from imagegen.errors import FieldError, InvalidRequest
from imagegen.tasks.image import StoredImage
from imagegen.tasks.task import State, Task
from imagegen.web.api.images import IMAGE_SENDER
from imagegen.web.api.serializers import TaskLinks, retry_after_s
from imagegen.web.handler_services import Services
from imagegen.web.http.json_with_images import image_text, json_with_images
from imagegen.web.http.responses import json_bytes, json_response
from imagegen.web.openai.error_responses import failed_status, failure_fields
from imagegen.web.openai.fields import OpenAIRequest
from imagegen.web.openai.schemas import (
    AcceptedResponse,
    AsyncTask,
    ImageEntry,
    ImagesResponse,
)
from imagegen.web.openai.token_usage import add_details

_BASE64_MODELS = ("gpt-image", "chatgpt-image")
"""Parts of the names of models that OpenAI answers with bytes only; its clients expect no links of them."""


async def images_body(request: web.Request, services: Services, parsed: OpenAIRequest, task: Task) -> ImagesResponse:
    """Return the images in a body that both clients accept in their strict modes too."""
    body: ImagesResponse = {
        "id": task.id,
        "object": "list",
        "created": int(task.created_at),
        "model": task.model,
        "data": await _entries(request, services, task, parsed),
    }
    if warnings := services.with_notices(task).warnings:
        body["warnings"] = list(warnings)
    if task.details:
        add_details(body, task.details)
    return body


async def _entries(request: web.Request, services: Services, task: Task, parsed: OpenAIRequest) -> list[ImageEntry]:
    url_of = TaskLinks(services.link_base.url(request), services.links).image
    is_base64, is_named = _is_base64(services, parsed), parsed.as_base64 is not None
    entries: list[ImageEntry] = []
    for image in task.images:
        if is_base64 and (is_named or not image.url):
            encoded = await base64_of(services, task, image)
            entries.append({"index": image.index, "type": "b64_json", "b64_json": encoded})
        else:
            entries.append({"index": image.index, "type": "url", "url": url_of(task, image)})
    return entries


def _is_base64(services: Services, parsed: OpenAIRequest) -> bool:
    """Return whether the images go into the body: as the client or the setting has it, else as its model would."""
    if parsed.as_base64 is not None:
        return parsed.as_base64
    if services.openai.response_format is not None:
        return services.openai.response_format == "b64_json"
    return any(part in name for part in _BASE64_MODELS for name in (parsed.named_model, parsed.request.model))


async def base64_of(services: Services, task: Task, image: StoredImage) -> str:
    """Return the base64 of an image, or its placeholder.

    Raises: StoreUnavailable; InvalidRequest if only the provider has them.
    """
    if image.url:
        raise InvalidRequest(details=[FieldError("response_format", "this service keeps links only: request url")])
    return await image_text(services.store, task.id, image)


async def images_response(
    request: web.Request, services: Services, parsed: OpenAIRequest, task: Task
) -> web.StreamResponse:
    """Return the response with the images of a task."""
    body = await images_body(request, services, parsed, task)
    encoded = orjson.dumps(body)
    return json_with_images(encoded, body, services.store, request.app[IMAGE_SENDER]) or json_bytes(encoded)


async def accepted_response(services: Services, request: web.Request, task: Task) -> web.StreamResponse:
    """Return 202 for a client that prefers not to wait."""
    links = TaskLinks(services.link_base.url(request), services.links)
    url = links.task(task)
    body: AcceptedResponse = {
        "id": task.id,
        "object": "image.task",
        "created": int(task.created_at),
        "model": task.model,
        "status": task.state,
        "status_url": url,
        "events_url": links.events(task),
        "cancel_url": f"{url}/cancel",
    }
    headers = {
        hdrs.LOCATION: services.link_base.path(request, f"/api/images/{task.id}"),
        "Preference-Applied": "respond-async",
        "retry-after": str(retry_after_s(await services.queue.position(task))),
    }
    return json_response(body, status=202, headers=headers)


async def async_task_response(
    services: Services, request: web.Request, task: Task, *, status: int = 200
) -> web.StreamResponse:
    """Return a task as the clients of asynchronous image routes read it."""
    path = f"/v1/images/tasks/{task.id}"
    links = TaskLinks(services.link_base.url(request), services.links)
    body: AsyncTask = {
        "id": task.id,
        "task_id": task.id,
        "object": "image.generation.task",
        "status": "processing",
        "created_at": int(task.created_at),
        "expires_at": int(task.expires_at or task.created_at + services.queue.result_ttl_s),
        "poll_url": f"{links.base}{path}",
    }
    headers: dict[str, str] = {hdrs.LOCATION: services.link_base.path(request, path)} if status == 202 else {}
    if task.state is State.COMPLETED:
        urls = [links.image(task, image) for image in task.images]
        body |= {
            "status": "completed",
            "http_status": 200,
            "image_url": urls[0],
            "result": {"created": int(task.created_at), "data": [{"url": url} for url in urls]},
        }
    elif task.state.is_final:
        body |= {"status": "failed", "http_status": failed_status(task), "error": failure_fields(task)}
    else:
        headers["retry-after"] = str(retry_after_s(await services.queue.position(task)))
    return json_response(body, status=status, headers=headers)
