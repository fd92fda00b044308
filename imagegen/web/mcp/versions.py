"""Protocol versions of MCP: which one a request speaks, and whether its headers agree with its body.

Since 2026-07-28 each request names its version and the capabilities of its client; before, `initialize` did, and later
requests name the version in a header. No session is kept for either.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from typing import Any

from aiohttp import hdrs
from msgspec import Struct
from multidict import CIMultiDictProxy

from imagegen.web.mcp.messages import (
    HEADER_MISMATCH,
    INVALID_PARAMS,
    MISSING_CAPABILITY,
    UNSUPPORTED_VERSION,
    RpcError,
    RpcMessage,
)

MODERN = "2026-07-28"
LEGACY = ("2025-11-25", "2025-06-18", "2025-03-26", "2024-11-05")
SUPPORTED = (MODERN, *LEGACY)

WITHOUT_HEADER = "2025-03-26"
"""Version of a request without a header: the last version that did not define it."""

_WITHOUT_LINKS = frozenset({"2025-03-26", "2024-11-05"})
"""Versions in which a result has no `resource_link`."""

TASKS_EXTENSION = "io.modelcontextprotocol/tasks"
VERSION_KEY = "io.modelcontextprotocol/protocolVersion"
CAPABILITIES_KEY = "io.modelcontextprotocol/clientCapabilities"

VERSION_HEADER, METHOD_HEADER, NAME_HEADER = "MCP-Protocol-Version", "Mcp-Method", "Mcp-Name"
NAMED_PARAMS: Mapping[str, str] = {
    "tools/call": "name",
    "prompts/get": "name",
    "resources/read": "uri",
    "tasks/get": "taskId",
    "tasks/update": "taskId",
    "tasks/cancel": "taskId",
}
"""Parameter that the header Mcp-Name repeats, by method."""

_BASE64 = re.compile(r"=\?base64\?(.*)\?=")


class Protocol(Struct, frozen=True):
    """Protocol version of a request. capabilities: of its client, empty before 2026-07-28."""

    version: str
    capabilities: Mapping[str, Any] = {}

    @property
    def is_modern(self) -> bool:
        return self.version == MODERN

    @property
    def has_links(self) -> bool:
        """Return whether a result may have links to resources."""
        return self.version not in _WITHOUT_LINKS

    @property
    def has_tasks(self) -> bool:
        """Return whether the client takes the handle of a task for a result."""
        extensions = self.capabilities.get("extensions")
        return self.is_modern and isinstance(extensions, dict) and TASKS_EXTENSION in extensions

    def require_tasks(self, message: RpcMessage) -> None:
        """Raise RpcError unless the client has the extension of tasks."""
        if not self.has_tasks:
            required: dict[str, Any] = {"requiredCapabilities": {"extensions": {TASKS_EXTENSION: {}}}}
            text = "Missing required client capability"
            raise RpcError(MISSING_CAPABILITY, text, request_id=message.id, data=required)


def negotiate(headers: CIMultiDictProxy[str], message: RpcMessage) -> Protocol:
    """Return what a message speaks. Raises RpcError if headers and body disagree, or the version is unknown."""
    _check_agreement(headers, message)
    version = headers.get(VERSION_HEADER)
    if version in LEGACY or version is None or message.method == "initialize":
        return Protocol(version or WITHOUT_HEADER)
    if version != MODERN:
        data = {"supported": list(SUPPORTED), "requested": version}
        raise RpcError(UNSUPPORTED_VERSION, "Unsupported protocol version", request_id=message.id, data=data)
    return Protocol(version) if message.id is None else _modern(headers, message)


def _check_agreement(headers: CIMultiDictProxy[str], message: RpcMessage) -> None:
    """Raise RpcError if a header is not what the body has, or comes twice."""
    for name in (VERSION_HEADER, METHOD_HEADER, NAME_HEADER):
        if len(headers.getall(name, ())) > 1:
            raise _mismatch(message, f"{name} is sent more than once")
    version, in_body = headers.get(VERSION_HEADER), message.meta.get(VERSION_KEY)
    method = headers.get(METHOD_HEADER)
    if method is not None and method != message.method:
        raise _mismatch(message, f"{METHOD_HEADER} is not the method of the body")
    sent, parameter = headers.get(NAME_HEADER), NAMED_PARAMS.get(message.method)
    if sent is not None and parameter is not None and _decode_name(sent) != message.params.get(parameter):
        raise _mismatch(message, f"{NAME_HEADER} is not params.{parameter} of the body")
    if in_body is not None and in_body != version:
        raise _mismatch(message, f"{VERSION_HEADER} is not the version in the body's _meta")
    if version is None and method is not None:
        raise _mismatch(message, f"{VERSION_HEADER} is missing")


def _modern(headers: CIMultiDictProxy[str], message: RpcMessage) -> Protocol:
    """Return the protocol of a request since 2026-07-28. Raises RpcError if something is missing."""
    if METHOD_HEADER not in headers:
        raise _mismatch(message, f"{METHOD_HEADER} is missing")
    if message.method == "tools/call" and NAME_HEADER not in headers:
        raise _mismatch(message, f"{NAME_HEADER} is missing")
    capabilities = message.meta.get(CAPABILITIES_KEY)
    if VERSION_KEY not in message.meta or not isinstance(capabilities, dict):
        text = f"params._meta must have {VERSION_KEY} and {CAPABILITIES_KEY}"
        raise RpcError(INVALID_PARAMS, text, request_id=message.id)
    return Protocol(MODERN, capabilities)


def accepts_events(headers: CIMultiDictProxy[str]) -> bool:
    """Return whether the client takes a stream of events for an answer."""
    accepted = ",".join(headers.getall(hdrs.ACCEPT, ("*/*",))).lower()
    return "text/event-stream" in accepted or "*/*" in accepted or "text/*" in accepted


def encode_name(value: str) -> str:
    """Return a text as a value of Mcp-Name: in base64 unless it is plain ASCII."""
    is_plain = value.isascii() and value.isprintable() and value == value.strip() and not _BASE64.fullmatch(value)
    return value if is_plain else f"=?base64?{base64.b64encode(value.encode()).decode()}?="


def _decode_name(value: str) -> str | None:
    match = _BASE64.fullmatch(value)
    if match is None:
        return value
    try:
        return base64.b64decode(match[1], validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):
        return None


def _mismatch(message: RpcMessage, text: str) -> RpcError:
    return RpcError(HEADER_MISMATCH, f"Header mismatch: {text}", request_id=message.id)
