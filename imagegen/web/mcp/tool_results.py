"""Results of tools: what an agent reads of a task, of an error and of other answers, small enough for its context."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import Any, cast

import orjson
from aiohttp import web
from msgspec import Struct

from imagegen.errors import ApiError, BudgetExceeded, MaxCostExceeded, StoreUnavailable, UnsupportedImage
from imagegen.images.thumbnails import ThumbnailSpec
from imagegen.tasks.cost import dollars
from imagegen.tasks.image import StoredImage
from imagegen.tasks.task import State, Task
from imagegen.web.api.serializers import TaskLinks
from imagegen.web.handler_services import SERVICES, Services
from imagegen.web.http.json_with_images import image_text
from imagegen.web.mcp.result_limits import MAX_RESULT_CHARS, fit, size_of
from imagegen.web.mcp.tool_definitions import FULL, SUMMARY
from imagegen.web.mcp.versions import Protocol
from imagegen.web.mcp.views import NEXT, ToolErrorView, ToolTaskView
from imagegen.web.submitter import is_final_answer

MAX_FULL_BYTES = 32 * 1024 * 1024
"""Image bytes of one result."""

MAX_STREAMED_BYTES = 700_000
"""Image bytes of a result in an event: the official client takes events of at most 1 MiB."""

THUMBNAIL_SIZES = (256, 128, 64)
MAX_WARNINGS = 3

_MAX_TEXT_CHARS = 300
_URL_CHARS = 500
"""Links in the text, else one, for clients that show neither `resource_link` nor `structuredContent` to the model."""

_REMEDIES = {
    "budget_exceeded": "Do not repeat the call before then. Fewer or smaller images, or a cheaper model, may fit.",
    "max_cost_exceeded": "Raise maxCostUsd only if the user agrees, or request less. quote_image shows prices.",
    "price_unknown": "list_image_models shows the models with a price.",
    "not_allowed": "Choose another model or size.",
    "rate_limited": "Wait, then repeat the call with the same arguments.",
    "too_many_open_tasks": "Wait until a task has ended, then repeat the call.",
    "content_policy": "Change the prompt: the same call gets this refusal again, and pays nothing.",
}
_REPEAT = "Repeat the call with the same arguments a little later: nothing is paid twice."
_CORRECT = "Correct the arguments; nothing was paid."
_SAME_FAILURE = "The same call gets this failure again, and pays nothing: change the arguments, or variant."
_TRIED_AGAIN = "The same call tries again, and may be charged again."


class ToolResult(Struct, frozen=True):
    """Result of a tool. content: blocks for the model and its user; structured: the same for programs."""

    content: Sequence[Mapping[str, Any]]
    structured: Mapping[str, Any]
    is_error: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return the result as a client receives it."""
        return {"content": list(self.content), "structuredContent": self.structured, "isError": self.is_error}


class TaskAnswer(Struct, frozen=True):
    """A task to be answered with. cached: its images existed before the call. detail: one of DETAILS."""

    task: Task
    cached: bool = False
    detail: str = SUMMARY
    max_bytes: int = MAX_FULL_BYTES


def text_result(text: str, structured: Mapping[str, Any], *, is_error: bool = False) -> ToolResult:
    """Return a result with one text. Both are shortened to what a result may hold."""
    content, structured = fit([_text(text)], structured)
    return ToolResult(content, structured, is_error)


def error_view(error: ApiError, estimated: float | None = None) -> ToolErrorView:
    """Return an error as results have it. estimated: dollars that the call would cost, None if unknown."""
    details = [f"{detail.field}: {detail.message}"[:_MAX_TEXT_CHARS] for detail in error.details[:10]]
    view: ToolErrorView = {"code": error.code, "message": error.message("en"), "retryable": error.retryable}
    if details:
        view["details"] = details
    if isinstance(error, BudgetExceeded):
        view["resetsAt"] = str(error.values["resets_at"])
    if isinstance(error, BudgetExceeded | MaxCostExceeded):
        view["estimatedCostUsd"] = estimated
    retry_after = error.headers.get("Retry-After", "")
    if retry_after.isdigit():
        view["retryAfterSeconds"] = int(retry_after)
    return view


def refusal(error: ApiError, estimated: float | None = None) -> ToolResult:
    """Return the result of a call that is refused. estimated: dollars that it would cost, None if unknown."""
    view = error_view(error, estimated)
    details = view.get("details", ())
    wait = f"Try again in {view['retryAfterSeconds']} s." if "retryAfterSeconds" in view else ""
    cost = "" if estimated is None else f"It would cost about {estimated:g} USD."
    remedy = _REMEDIES.get(error.code, _REPEAT if error.retryable else _CORRECT if error.status < 500 else "")
    faults = f"{'; '.join(details)}." if details else ""
    parts = (f"{error.code}: {error.message('en')}.", faults, cost, wait, remedy)
    return text_result(" ".join(filter(None, parts)), {"status": "refused", "error": view}, is_error=True)


async def task_result(request: web.Request, protocol: Protocol, answer: TaskAnswer) -> ToolResult:
    """Return the result for a task in its present state."""
    services = request.app[SERVICES]
    task = services.with_notices(answer.task)
    match task.state:
        case State.COMPLETED:
            return await _completed(request, services, protocol, answer)
        case State.FAILED:
            return _failed(task)
        case State.CANCELLED:
            view = _view(task, cached=False)
            return text_result(f"Task {task.id} was cancelled.", view)
        case State.PENDING | State.PROCESSING:
            return await _unfinished(services, task)


async def _unfinished(services: Services, task: Task) -> ToolResult:
    place = await services.queue.position(task)
    view = _view(task, cached=False)
    view |= {
        "progress": task.progress,
        "queuePosition": place.position,
        "etaSeconds": place.eta_s,
        "next": NEXT,
    }
    left = "" if place.eta_s is None else f", about {place.eta_s:g} s left"
    text = (
        f"Task {task.id} is {task.state} ({task.progress} %{left}). Next: {NEXT} with this taskId; it waits. "
        "The images go on being made, and are paid for once."
    )
    return text_result(text, view)


def failure_view(task: Task) -> ToolErrorView:
    """Return why a task has failed."""
    if task.error is None:
        return {"code": "internal_error", "message": "", "retryable": False}
    error = task.error
    return {"code": error.code, "message": error.detail[:_MAX_TEXT_CHARS], "retryable": error.retryable}


def _failed(task: Task) -> ToolResult:
    view, error = _view(task, cached=False), failure_view(task)
    view["error"] = error
    remedy = _REMEDIES.get(error["code"]) or (_SAME_FAILURE if is_final_answer(task) else _TRIED_AGAIN)
    text = f"Task {task.id} failed: {error['code']}: {error['message']}. {remedy}"
    return text_result(text, view, is_error=True)


async def _completed(request: web.Request, services: Services, protocol: Protocol, answer: TaskAnswer) -> ToolResult:
    task, images = answer.task, answer.task.images
    link = TaskLinks(services.link_base.url(request), services.links).short_image
    urls = [link(task, image) for image in images]
    view = _view(task, cached=answer.cached)
    first = images[0] if images else StoredImage(0)
    view |= {"urls": urls, "width": first.width or None, "height": first.height or None, "seed": first.seed}
    blocks: list[Mapping[str, Any]] = [_text(_summary(task, view, urls))]
    if protocol.has_links:
        blocks += [_link(task, image, url) for image, url in zip(images, urls, strict=True)]
    content, structured = fit(blocks, view)
    if answer.detail == FULL:
        return ToolResult([*content, *await _full_images(services, answer)], structured)
    thumbnail = await _thumbnail(services, task, MAX_RESULT_CHARS - size_of(content, structured))
    return ToolResult([*content, thumbnail] if thumbnail else content, structured)


def _summary(task: Task, view: ToolTaskView, urls: Sequence[str]) -> str:
    count = len(urls)
    cost = view.get("costUsd")
    paid = "nothing was paid: it existed already" if view.get("cached") else f"cost {cost:g} USD" if cost else ""
    facts = [f"{count} image{'' if count == 1 else 's'} of {task.model}"]
    if view.get("width"):
        facts.append(f"{view['width']}x{view['height']}")
    if view.get("seed") is not None:
        facts.append(f"seed {view['seed']}")
    lines = [f"{', '.join(filter(None, [*facts, paid]))}. Task {task.id}."]
    lines += [f"Warning: {warning}" for warning in view.get("warnings", ())]
    fits = sum(map(len, urls)) <= _URL_CHARS
    return "\n".join([*lines, *(urls if fits else urls[:1])])


def _view(task: Task, *, cached: bool) -> ToolTaskView:
    """Return what every result shows of a task."""
    view: ToolTaskView = {
        "status": cast(Any, task.state.value),
        "taskId": task.id,
        "cached": cached,
        "costUsd": 0.0 if cached else _cost_usd(task),
    }
    if task.warnings:
        view["warnings"] = [warning[:_MAX_TEXT_CHARS] for warning in task.warnings[:MAX_WARNINGS]]
    return view


def _cost_usd(task: Task) -> float | None:
    """Return the dollars that were charged at the task's end, estimated before; None if unknown."""
    cost = task.cost
    if cost is None or (task.state.is_final and cost.unpriced):
        return None
    micro_usd = cost.charged if task.state.is_final else cost.estimated
    return None if micro_usd is None else dollars(micro_usd)


def _text(text: str) -> Mapping[str, Any]:
    return {"type": "text", "text": text}


def _link(task: Task, image: StoredImage, url: str) -> Mapping[str, Any]:
    link = {"type": "resource_link", "uri": url, "name": f"{task.id[:8]}-{image.index}.{image.extension}"}
    return link | {"mimeType": image.content_type} if image.content_type else link


def _image_block(data: bytes, content_type: str) -> Mapping[str, Any]:
    return {"type": "image", "data": base64.b64encode(data).decode(), "mimeType": content_type}


async def _thumbnail(services: Services, task: Task, max_chars: int) -> Mapping[str, Any] | None:
    """Return the largest thumbnail of the first image within a number of characters; None if there is none."""
    image = next((image for image in task.images if not image.url), None)
    if image is None:
        return None
    for size in THUMBNAIL_SIZES:
        try:
            thumbnail = await services.thumbnails.open(ThumbnailSpec(task.id, image, size, task.expires_at))
        except (UnsupportedImage, StoreUnavailable):
            return None
        if thumbnail is None:
            return None
        record, opened = thumbnail
        with closing(opened):
            block = _image_block(await opened.read_all(), record.content_type)
        if len(orjson.dumps(block)) < max_chars:
            return block
    return None


async def _full_images(services: Services, answer: TaskAnswer) -> list[Mapping[str, Any]]:
    """Return the images as far as a result can hold them."""
    free_bytes = answer.max_bytes
    blocks: list[Mapping[str, Any]] = []
    omitted: list[str] = []
    for image in answer.task.images:
        if image.url or image.size_bytes > free_bytes:
            omitted.append(str(image.index))
            continue
        try:
            text = await image_text(services.store, answer.task.id, image)
        except StoreUnavailable:
            omitted.append(str(image.index))
            continue
        blocks.append({"type": "image", "data": text, "mimeType": image.content_type})
        free_bytes -= image.size_bytes
    if omitted:
        advice = "open the links"
        if answer.max_bytes < MAX_FULL_BYTES:
            advice = f"{NEXT} with detail full, or {advice}"
        blocks.append(_text(f"Without the bytes of image {', '.join(omitted)}: {advice}."))
    return blocks
