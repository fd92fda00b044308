"""A small client of MCP over HTTP for tests: each message as a test writes it, with the headers of its version."""

from __future__ import annotations

import itertools
from typing import Any

import orjson

MODERN = "2026-07-28"
LEGACY = "2025-11-25"
TASKS = {"extensions": {"io.modelcontextprotocol/tasks": {}}}

_ids = itertools.count(1)
_NAMED = {"tools/call": "name", "tasks/get": "taskId", "tasks/cancel": "taskId", "tasks/update": "taskId"}


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
    """Return about how many tokens a result takes, the base64 of its images too: four characters each."""
    return len(orjson.dumps(result)) / 4
