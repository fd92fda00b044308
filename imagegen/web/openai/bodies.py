"""Bodies of `/v1` about tasks: the images, a task that goes on, and the tasks of the asynchronous routes."""

from __future__ import annotations

import base64
from contextlib import closing

from aiohttp import hdrs, web

from imagegen.errors import FieldError, InvalidRequest, StoreUnavailable
from imagegen.tasks.image import StoredImage
from imagegen.tasks.reply_details import ReplyDetails, Usage
from imagegen.tasks.task import State, Task
from imagegen.web.api.task_responses import retry_after_s
from imagegen.web.context import Services, image_url_builder
from imagegen.web.http.responses import json_response
from imagegen.web.openai.errors import failed_status, failure_fields
from imagegen.web.openai.fields import OpenAIRequest
from imagegen.web.openai.schemas import (
    AcceptedResponse,
    AsyncTask,
    ImageEntry,
    ImagesResponse,
    TokenDetails,
    TokenUsage,
)

_BASE64_MODELS = ("gpt-image", "chatgpt-image")
"""Parts of the names of models that OpenAI answers with bytes only; its clients expect no links of them."""


async def images_body(request: web.Request, services: Services, wanted: OpenAIRequest, task: Task) -> ImagesResponse:
    """Return the images in a body that both clients accept in their strict modes too."""
    body: ImagesResponse = {
        "id": task.id,
        "object": "list",
        "created": int(task.created_at),
        "model": task.model,
        "data": await _entries(request, services, task, wanted),
    }
    if warnings := services.with_notices(task).warnings:
        body["warnings"] = list(warnings)
    if task.details:
        _add_details(body, task.details)
    return body


def _add_details(body: ImagesResponse, details: ReplyDetails) -> None:
    """Add what the upstream reported with the images. `auto` is left out: the clients' types do not have it."""
    if usage := _usage(details.usage or {}):
        body["usage"] = usage
    if details.size and details.size != "auto":
        body["size"] = details.size
    if details.quality and details.quality != "auto":
        body["quality"] = details.quality
    if details.background and details.background != "auto":
        body["background"] = details.background
    if details.output_format and details.output_format != "auto":
        body["output_format"] = details.output_format
    if details.revised_prompt and body["data"]:
        body["data"][0]["revised_prompt"] = details.revised_prompt


def _usage(usage: Usage) -> TokenUsage | None:
    """Return the tokens as OpenAI's client reads them; None if the upstream counts something else."""
    spent, made, total = usage.get("input_tokens"), usage.get("output_tokens"), usage.get("total_tokens")
    if not (isinstance(spent, int) and isinstance(made, int)):
        return None
    return {
        "input_tokens": spent,
        "input_tokens_details": _token_details(usage.get("input_tokens_details"), text_tokens=spent),
        "output_tokens": made,
        "output_tokens_details": _token_details(usage.get("output_tokens_details"), image_tokens=made),
        "total_tokens": total if isinstance(total, int) else spent + made,
    }


def _token_details(details: object, *, text_tokens: int = 0, image_tokens: int = 0) -> TokenDetails:
    """Return the parts of a count; all of it is of one kind if the upstream reports no parts."""
    if not isinstance(details, dict):
        return {"text_tokens": text_tokens, "image_tokens": image_tokens}
    return {"text_tokens": details.get("text_tokens", 0), "image_tokens": details.get("image_tokens", 0)}


async def _entries(request: web.Request, services: Services, task: Task, wanted: OpenAIRequest) -> list[ImageEntry]:
    url_of = image_url_builder(services.base_url(request))
    is_base64, is_named = _is_base64(services, wanted), wanted.as_base64 is not None
    entries: list[ImageEntry] = []
    for image in task.images:
        if is_base64 and (is_named or not image.url):
            encoded = await base64_of(services, task, image)
            entries.append({"index": image.index, "type": "b64_json", "b64_json": encoded})
        else:
            entries.append({"index": image.index, "type": "url", "url": url_of(task, image)})
    return entries


def _is_base64(services: Services, wanted: OpenAIRequest) -> bool:
    """Return whether the images go into the body: as the client or the setting has it, else as its model would."""
    if wanted.as_base64 is not None:
        return wanted.as_base64
    if services.openai.response_format is not None:
        return services.openai.response_format == "b64_json"
    return any(part in name for part in _BASE64_MODELS for name in (wanted.named_model, wanted.request.model))


async def base64_of(services: Services, task: Task, image: StoredImage) -> str:
    """Return an image's bytes. Raises StoreUnavailable, and InvalidRequest if only the provider has them."""
    if image.url:
        raise InvalidRequest(details=[FieldError("response_format", "this service keeps links only: request url")])
    opened = await services.store.open(task.id, image)
    if opened is None:
        raise StoreUnavailable
    with closing(opened):
        data = await opened.read_all()
    return base64.b64encode(data).decode()


async def accepted_response(services: Services, request: web.Request, task: Task) -> web.StreamResponse:
    """Return 202 for a client that prefers not to wait."""
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


async def async_task_response(
    services: Services, request: web.Request, task: Task, *, status: int = 200
) -> web.StreamResponse:
    """Return a task as the clients of asynchronous image routes read it."""
    path = f"/v1/images/tasks/{task.id}"
    base = services.base_url(request)
    body: AsyncTask = {
        "id": task.id,
        "task_id": task.id,
        "object": "image.generation.task",
        "status": "processing",
        "created_at": int(task.created_at),
        "expires_at": int(task.expires_at or task.created_at + services.queue.result_ttl_s),
        "poll_url": f"{base}{path}",
    }
    headers: dict[str, str] = {hdrs.LOCATION: services.local_url(request, path)} if status == 202 else {}
    if task.state is State.COMPLETED:
        url_of = image_url_builder(base)
        urls = [url_of(task, image) for image in task.images]
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
