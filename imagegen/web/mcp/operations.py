"""Documentation of the route of agents. Its messages are described by the specification of MCP, not here."""

from __future__ import annotations

from typing import Any

from imagegen.web.mcp.endpoint import mcp
from imagegen.web.mcp.error_responses import PATH
from imagegen.web.mcp.tool_definitions import GENERATE
from imagegen.web.mcp.versions import MODERN, SUPPORTED, VERSION_HEADER
from imagegen.web.openapi.document import EVENTS, Body, Operation, Parameter, ResponseDoc, Route

AGENTS = "Agents"

_TEXT = {"type": "string"}
_ID = {"type": ["string", "integer"]}
_MESSAGE: dict[str, Any] = {
    "type": "object",
    "required": ["jsonrpc", "method"],
    "properties": {
        "jsonrpc": {"const": "2.0", "description": "Version of JSON-RPC.", "examples": ["2.0"]},
        "id": _ID | {"description": "Absent in a notification.", "examples": [1]},
        "method": _TEXT | {"description": "Such as `tools/call`.", "examples": ["tools/call"]},
        "params": {"type": "object", "description": "Parameters of the method.", "examples": [{}]},
    },
}
_RESULT: dict[str, Any] = {
    "type": "object",
    "required": ["jsonrpc", "id", "result"],
    "properties": {"jsonrpc": {"const": "2.0"}, "id": _ID, "result": {"type": "object"}},
}
_ERROR_FIELDS: dict[str, Any] = {
    "type": "object",
    "required": ["code", "message"],
    "properties": {"code": {"type": "integer"}, "message": _TEXT, "data": {"type": "object"}},
}
_ERROR: dict[str, Any] = {
    "type": "object",
    "required": ["jsonrpc", "id", "error"],
    "properties": {"jsonrpc": {"const": "2.0"}, "id": {"type": ["string", "integer", "null"]}, "error": _ERROR_FIELDS},
}
_REQUEST_EXAMPLE = {
    "jsonrpc": "2.0",
    "id": 1,
    "method": "tools/call",
    "params": {"name": GENERATE, "arguments": {"prompt": "a lighthouse in a storm"}},
}
_ERROR_EXAMPLE = {"jsonrpc": "2.0", "id": None, "error": {"code": -32600, "message": "The request is not valid"}}
_ERRORS = {
    400: "No message, headers that are not those of the body (-32020), or an unknown version (-32022).",
    401: "A valid key is needed.",
    403: "A page of another site sent it.",
    404: "The method is unknown (-32601).",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    415: "The body is no JSON.",
    417: "An `Expect` header that is not supported.",
    431: "The headers are too large.",
    429: "Too many requests. A call of a tool has a result with this error instead.",
    500: "An unforeseen error.",
    503: "The service is not available now.",
}

MCP = Operation(
    "post",
    PATH,
    "mcp",
    AGENTS,
    "Send a message of the Model Context Protocol",
    f"Streamable HTTP without sessions, of the versions {', '.join(SUPPORTED)}. A call of a tool waits up to 45 s "
    "for its task, with notifications of progress if the client gave a token. Closing the connection ends the wait, "
    "never the task.\n\nA call counts against the limits as the corresponding route of the API does.",
    (
        ResponseDoc(
            200,
            "The result, or from versions before 2026-07-28 an error; or events: progress, then the result.",
            {"anyOf": [_RESULT, _ERROR]},
            {"result": {"jsonrpc": "2.0", "id": 1, "result": {}}},
            others={EVENTS: _TEXT},
        ),
        ResponseDoc(202, "A notification; it has no effect."),
        *(ResponseDoc(status, text, _ERROR, {"error": _ERROR_EXAMPLE}) for status, text in _ERRORS.items()),
    ),
    (
        Parameter(VERSION_HEADER, "header", "The protocol version of the message.", _TEXT, example=MODERN),
        Parameter("Mcp-Method", "header", "The method of the message, since 2026-07-28.", _TEXT, example="tools/call"),
        Parameter("Mcp-Name", "header", "The tool's name or the task's id, since 2026-07-28.", _TEXT, example=GENERATE),
    ),
    Body(_MESSAGE, {"call": _REQUEST_EXAMPLE}),
    envelope="none",
)

ROUTES: tuple[Route, ...] = ((MCP, mcp),)
