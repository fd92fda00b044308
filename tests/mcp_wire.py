"""A small client of MCP over HTTP for tests: each message as a test writes it, with the headers of its version."""

from __future__ import annotations

import itertools
import json
import re
from typing import Any

import jsonschema
import orjson
from aiohttp import web
from aiohttp.test_utils import TestClient

from imagegen.web.mcp.tool_definitions import listing
from tests.support import AS_ADMIN

MODERN = "2026-07-28"
LEGACY = "2025-11-25"
TASKS: dict[str, Any] = {"extensions": {"io.modelcontextprotocol/tasks": {}}}

SCHEMAS = {tool["name"]: tool["outputSchema"] for tool in listing()}
_VALIDATORS = {name: jsonschema.Draft202012Validator(schema) for name, schema in SCHEMAS.items()}

_ids = itertools.count(1)
_NAMED = {"tools/call": "name", "tasks/get": "taskId", "tasks/cancel": "taskId", "tasks/update": "taskId"}


McpService = TestClient[web.Request, web.Application]


def message(method: str, **params: Any) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": next(_ids), "method": method, "params": params}


def modern(
    method: str, *, capabilities: dict[str, Any] | None = None, meta: Any = None, **params: Any
) -> dict[str, Any]:
    """Return a request of the stateless wire."""
    fields = {
        "io.modelcontextprotocol/protocolVersion": MODERN,
        "io.modelcontextprotocol/clientCapabilities": capabilities or {},
    }
    return message(method, **params, _meta=fields | (meta or {}))


def headers_of(body: dict[str, Any]) -> dict[str, str]:
    """Return the headers of a request of the stateless wire."""
    headers = {
        "Content-Type": "application/json",
        "Accept": "application/json, text/event-stream",
        "MCP-Protocol-Version": MODERN,
        "Mcp-Method": body["method"],
    }
    if name := _NAMED.get(body["method"]):
        headers["Mcp-Name"] = body["params"][name]
    return headers


def events(text: str) -> list[dict[str, Any]]:
    """Return the messages in a stream of events."""
    return [orjson.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: ")]


def tokens(result: Any) -> float:
    """Return about how many tokens a result takes, the base64 of its images too: four characters each, of links 2.5.

    Clients write it with spaces or without, and count characters or bytes.
    """
    links = sum(map(len, re.findall(rb'https?://[^"\\\s]+', orjson.dumps(result))))
    return (max(len(orjson.dumps(result)), len(json.dumps(result, ensure_ascii=False))) - links) / 4 + links / 2.5


async def send(
    service: McpService, body: dict[str, Any], headers: dict[str, str] | None = None
) -> tuple[int, dict[str, Any]]:
    response = await service.post("/mcp", json=body, headers=headers_of(body) | (headers or {}))
    return response.status, await response.json()


async def result(service: McpService, body: dict[str, Any], headers: dict[str, str] | None = None) -> dict[str, Any]:
    """Return the result of a request; a structured one is checked against the tool's schema."""
    status, answer = await send(service, body, headers)
    assert status == 200, answer
    if structured := answer["result"].get("structuredContent"):
        _VALIDATORS[body["params"]["name"]].validate(structured)
    return dict(answer["result"])


def call(name: str, *, capabilities: Any = None, meta: Any = None, **arguments: Any) -> dict[str, Any]:
    return modern("tools/call", name=name, arguments=arguments, capabilities=capabilities, meta=meta)


async def pause(service: McpService, *, on: bool = True) -> None:
    """Let tasks wait, so that no machine is too slow or too fast for a call of a tool to end before them."""
    response = await service.post(f"/api/admin/{'pause' if on else 'resume'}", headers=AS_ADMIN)
    assert response.status == 200
