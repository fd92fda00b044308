"""Route of agents: POST /mcp. No request depends on an earlier one, so any instance can answer it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from aiohttp import hdrs, web
from msgspec.structs import replace

from imagegen import __version__
from imagegen.errors import ApiError
from imagegen.web.api.images import IMAGE_SENDER
from imagegen.web.api.tasks import wait_until_final
from imagegen.web.handler_services import SERVICES
from imagegen.web.http.body import receive_json
from imagegen.web.http.json_with_images import json_with_images
from imagegen.web.http.responses import json_bytes
from imagegen.web.mcp import tasks_extension
from imagegen.web.mcp.error_responses import api_error_response
from imagegen.web.mcp.messages import (
    HTTP_STATUS,
    RpcError,
    RpcMessage,
    error_body,
    parse_message,
    result_body,
    unknown_method,
)
from imagegen.web.mcp.progress_stream import ProgressStream
from imagegen.web.mcp.tool_definitions import INSTRUCTIONS, encoded_listing
from imagegen.web.mcp.tool_results import MAX_STREAMED_BYTES, ToolResult, refusal, task_result
from imagegen.web.mcp.tools import Started, start_call
from imagegen.web.mcp.versions import LEGACY, SUPPORTED, TASKS_EXTENSION, Protocol, negotiate

LISTING_TTL_MS = 3_600_000
"""How long a client may keep the list of tools, which changes with the version only."""

WAIT_S = 45.0
"""Wait for the task of a call, which goes on after it. Clients end a call after 60 seconds."""

_SERVER = {"name": "imagegen", "title": "imagegen", "version": __version__}
_SERVER_KEY = "io.modelcontextprotocol/serverInfo"
_CACHEABLE = {"ttlMs": LISTING_TTL_MS, "cacheScope": "public"}

_Method = Callable[[web.Request, Protocol, RpcMessage], Awaitable[dict[str, Any]]]


async def mcp(request: web.Request) -> web.StreamResponse:
    """Answer one message: a result as JSON or as a stream with progress, or an error of JSON-RPC."""
    protocol = message = None
    try:
        async with receive_json(request, request.app[SERVICES].inputs.uploads) as body:
            message = parse_message(body.raw)
            protocol = negotiate(request.headers, message)
            if message.id is None:
                return web.Response(status=202)
            if message.method == "tools/call":
                started = await start_call(request, message, body)
            else:
                return _json(request, message, protocol, await _answer(request, protocol, message))
        return await _finish_call(request, protocol, message, started)
    except RpcError as error:
        return _error(error, protocol)
    except ApiError as error:
        if request.writer.output_size > 0:
            raise
        return api_error_response(error, message.id if message else None)


async def _answer(request: web.Request, protocol: Protocol, message: RpcMessage) -> dict[str, Any]:
    """Return the result of a method that is no call of a tool. Raises RpcError."""
    method = (_MODERN if protocol.is_modern else _LEGACY).get(message.method)
    if method is None:
        raise unknown_method(message)
    return await method(request, protocol, message)


async def _finish_call(
    request: web.Request, protocol: Protocol, message: RpcMessage, started: Started
) -> web.StreamResponse:
    """Answer a call of a tool, after a wait for its task."""
    async with ProgressStream(request, message.progress_token) as stream:
        result = await _call_result(request, protocol, stream, started)
        if stream.has_begun:
            return await stream.end(result_body(message.id, _complete(protocol, result)), result)
        return _json(request, message, protocol, result)


async def _call_result(
    request: web.Request, protocol: Protocol, stream: ProgressStream, started: Started
) -> dict[str, Any]:
    if isinstance(started, ToolResult):
        return started.to_dict()
    try:
        task = await wait_until_final(request.app[SERVICES], started.task, WAIT_S, request, stream.report)
        if not task.state.is_final and protocol.has_tasks:
            return await tasks_extension.created_task(request, task)
        answer = replace(started, task=task)
        if stream.has_begun:
            answer = replace(answer, max_bytes=MAX_STREAMED_BYTES)
        return (await task_result(request, protocol, answer)).to_dict()
    except ApiError as error:
        return refusal(error).to_dict()


def _complete(protocol: Protocol, result: Mapping[str, Any]) -> dict[str, Any]:
    """Return a result as its version has it."""
    if not protocol.is_modern:
        return dict(result)
    return {"resultType": "complete", **result, "_meta": {_SERVER_KEY: _SERVER}}


def _json(
    request: web.Request, message: RpcMessage, protocol: Protocol, result: Mapping[str, Any]
) -> web.StreamResponse:
    encoded = result_body(message.id, _complete(protocol, result))
    streamed = json_with_images(encoded, result, request.app[SERVICES].store, request.app[IMAGE_SENDER])
    return streamed or json_bytes(encoded)


def _error(error: RpcError, protocol: Protocol | None) -> web.StreamResponse:
    """Return the response for an error. protocol: None if the message is valid in no version.

    Before 2026-07-28 the error of a valid request has the status 200.
    """
    status = 200 if protocol is not None and not protocol.is_modern else HTTP_STATUS.get(error.code, 200)
    return json_bytes(error_body(error), status=status, headers={hdrs.CONTENT_TYPE: "application/json"})


async def _discover(_request: web.Request, _protocol: Protocol, _message: RpcMessage) -> dict[str, Any]:
    capabilities: dict[str, Any] = {"tools": {}, "extensions": {TASKS_EXTENSION: {}}}
    result = {"supportedVersions": list(SUPPORTED), "capabilities": capabilities, "instructions": INSTRUCTIONS}
    return result | _CACHEABLE


async def _list_tools(_request: web.Request, protocol: Protocol, _message: RpcMessage) -> dict[str, Any]:
    return {"tools": encoded_listing()} | (_CACHEABLE if protocol.is_modern else {})


async def _initialize(_request: web.Request, _protocol: Protocol, message: RpcMessage) -> dict[str, Any]:
    wanted = message.params.get("protocolVersion")
    return {
        "protocolVersion": wanted if wanted in LEGACY else LEGACY[0],
        "capabilities": {"tools": {}},
        "serverInfo": _SERVER,
        "instructions": INSTRUCTIONS,
    }


async def _ping(_request: web.Request, _protocol: Protocol, _message: RpcMessage) -> dict[str, Any]:
    return {}


_MODERN: Mapping[str, _Method] = {
    "server/discover": _discover,
    "tools/list": _list_tools,
    "tasks/get": tasks_extension.get_task,
    "tasks/update": tasks_extension.update_task,
    "tasks/cancel": tasks_extension.cancel,
}
_LEGACY: Mapping[str, _Method] = {"initialize": _initialize, "ping": _ping, "tools/list": _list_tools}
