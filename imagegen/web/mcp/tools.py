"""Calls of the tools. Each submit goes through the submitter, as those of POST /api/images/generate do."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from aiohttp import web
from msgspec import Struct

from imagegen.errors import (
    AlreadyFinished,
    ApiError,
    BudgetExceeded,
    FieldError,
    InvalidRequest,
    MaxCostExceeded,
    TaskNotFound,
)
from imagegen.queue.client_queue import CacheResult
from imagegen.ratelimit.limits import RATE_LIMITS
from imagegen.tasks.clients import submitter_name
from imagegen.tasks.cost import dollars
from imagegen.web.api.tasks import cancel_task
from imagegen.web.guard import client_of
from imagegen.web.handler_services import SERVICES
from imagegen.web.http.body import ReceivedBody
from imagegen.web.lookup import find_fresh_task
from imagegen.web.mcp.messages import RpcMessage, invalid_params
from imagegen.web.mcp.model_listing import list_models
from imagegen.web.mcp.own_images import replace_own_images
from imagegen.web.mcp.quotes import quote, quote_text
from imagegen.web.mcp.tool_definitions import CANCEL, DETAILS, EDIT, GENERATE, GET, MODELS, QUOTE, SUMMARY
from imagegen.web.mcp.tool_results import TaskAnswer, ToolResult, refusal, text_result
from imagegen.web.mcp.views import NEXT
from imagegen.web.submitter import SubmitOptions, parse_fields, submit_parsed

_IMAGES = ("imageUrl", "image_url", "referenceImages", "reference_images")
_MAX_ID_CHARS = 100


class ToolCall(Struct, frozen=True):
    """One call of a tool. body: that the arguments came in, with the images that were cut out of them."""

    request: web.Request
    arguments: Mapping[str, Any]
    body: ReceivedBody

    @property
    def options(self) -> SubmitOptions:
        """Return the options of a submit: no header of the request is one."""
        return SubmitOptions.without_headers(self.request)


Started = ToolResult | TaskAnswer
"""A result, or a task to wait for."""


async def start_call(request: web.Request, message: RpcMessage, body: ReceivedBody) -> Started:
    """Start a call of a tool. A refusal is a result too. Raises RpcError for a call that no tool takes."""
    name, arguments = message.params.get("name"), message.params.get("arguments")
    tool = _TOOLS.get(name) if isinstance(name, str) else None
    if tool is None:
        raise invalid_params(message, "Unknown tool: " + ascii(name)[:_MAX_ID_CHARS])
    if not isinstance(arguments, dict | None):
        raise invalid_params(message, "arguments must be an object")
    call = ToolCall(request, arguments or {}, body)
    try:
        kind = "generation" if name in (GENERATE, EDIT) else "general"
        await request.app[RATE_LIMITS].spend_call(request, kind)
        return await tool(call)
    except ApiError as error:
        return refusal(error, _estimate(call) if isinstance(error, BudgetExceeded | MaxCostExceeded) else None)


def _estimate(call: ToolCall) -> float | None:
    """Return the dollars that a call would cost; None if the price is unknown."""
    services = call.request.app[SERVICES]
    fields, _ = _split(call.arguments)
    parsed = parse_fields(services, fields, call.options)
    cost = services.identity.estimate(parsed.request, parsed.max_micro_usd)
    return None if cost.estimated is None else dollars(cost.estimated)


async def _generate(call: ToolCall) -> Started:
    fields, detail = _split(call.arguments)
    fields = await replace_own_images(call.request, fields)
    submitted = await submit_parsed(call.request.app[SERVICES], fields, call.body, call.options)
    return TaskAnswer(submitted.task, cached=submitted.cached is CacheResult.HIT, detail=detail)


async def _edit(call: ToolCall) -> Started:
    if not any(call.arguments.get(name) for name in _IMAGES):
        raise InvalidRequest(details=[FieldError("imageUrl", "is required: the image to edit")])
    return await _generate(call)


async def _get(call: ToolCall) -> Started:
    task_id, fields = _task_id(call.arguments, "detail")
    detail = _detail(fields)
    task = await find_fresh_task(call.request, task_id)
    if task is None:
        raise TaskNotFound
    return TaskAnswer(task, detail=detail)


async def _cancel(call: ToolCall) -> Started:
    task_id, _ = _task_id(call.arguments)
    try:
        reply = await cancel_task(call.request, submitter_name(client_of(call.request).id), task_id)
        task = None if reply is None else reply.task
    except AlreadyFinished:
        task = await find_fresh_task(call.request, task_id)
    if task is None:
        raise TaskNotFound
    if task.state.is_final:
        return TaskAnswer(task)
    view = {"status": task.state.value, "taskId": task.id, "next": NEXT}
    return text_result(f"Task {task.id} goes on, since other clients wait for it.", view)


async def _models(call: ToolCall) -> Started:
    return await list_models(call.request, call.arguments)


async def _quote(call: ToolCall) -> Started:
    fields, _ = _split(call.arguments)
    fields = await replace_own_images(call.request, fields)
    view = await quote(call.request.app[SERVICES], fields, call.body, call.options)
    return text_result(quote_text(view), view)


_TOOLS: Mapping[str, Callable[[ToolCall], Awaitable[Started]]] = {
    GENERATE: _generate,
    EDIT: _edit,
    GET: _get,
    CANCEL: _cancel,
    MODELS: _models,
    QUOTE: _quote,
}


def _split(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Return the fields of the API, and the detail. Raises InvalidRequest."""
    if "webhook" in arguments:
        raise InvalidRequest(details=[FieldError("webhook", "is no argument of a tool")])
    fields = {name: value for name, value in arguments.items() if name != "detail"}
    return fields, _detail(arguments)


def _detail(arguments: Mapping[str, Any]) -> str:
    detail = arguments.get("detail")
    if detail is None:
        return SUMMARY
    if detail not in DETAILS:
        raise InvalidRequest(details=[FieldError("detail", f"must be one of {', '.join(DETAILS)}")])
    return str(detail)


def _task_id(arguments: Mapping[str, Any], *other_names: str) -> tuple[str, Mapping[str, Any]]:
    """Return the id of a task, and the arguments. Raises InvalidRequest."""
    errors = [
        FieldError(ascii(name)[1:-1][:_MAX_ID_CHARS], "is no argument of this tool")
        for name in arguments
        if name not in ("taskId", *other_names)
    ]
    task_id = arguments.get("taskId")
    if not isinstance(task_id, str):
        rule = "is required" if task_id is None else "must be a string"
        errors.insert(0, FieldError("taskId", f"{rule}: the taskId of an earlier result"))
    if errors:
        raise InvalidRequest(details=errors[:10])
    return str(task_id), arguments
