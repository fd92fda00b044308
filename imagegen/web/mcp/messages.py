"""JSON-RPC 2.0 messages of MCP: parsing, and the forms of results and errors. https://www.jsonrpc.org/specification"""

from __future__ import annotations

from typing import Any, TypeGuard

import msgspec
import orjson
from msgspec import Struct

from imagegen.errors import ImagegenError, InvalidJson, InvalidRequest
from imagegen.web.http.body import parse_object

PARSE_ERROR = -32700
INVALID_REQUEST = -32600
METHOD_NOT_FOUND = -32601
INVALID_PARAMS = -32602
INTERNAL_ERROR = -32603
HEADER_MISMATCH = -32020
MISSING_CAPABILITY = -32021
UNSUPPORTED_VERSION = -32022

HTTP_STATUS = {
    PARSE_ERROR: 400,
    INVALID_REQUEST: 400,
    INVALID_PARAMS: 400,
    HEADER_MISMATCH: 400,
    MISSING_CAPABILITY: 400,
    UNSUPPORTED_VERSION: 400,
    METHOD_NOT_FOUND: 404,
}
"""HTTP statuses of the errors since 2026-07-28."""

MAX_ID_CHARS = 1_000
"""Ids and tokens are repeated in each answer, and in each notification of progress."""

_MAX_NAME_CHARS = 100

RequestId = str | int


def _is_short(value: object) -> TypeGuard[RequestId]:
    return type(value) is int or (isinstance(value, str) and len(value) <= MAX_ID_CHARS)


class RpcError(ImagegenError):
    """A request that is answered with an error of the protocol. request_id: None if it is unknown."""

    def __init__(
        self, code: int, message: str, *, request_id: RequestId | None = None, data: dict[str, Any] | None = None
    ) -> None:
        super().__init__(message)
        self.code, self.message, self.request_id, self.data = code, message, request_id, data


class RpcMessage(Struct, frozen=True):
    """A request, or a notification without an id."""

    method: str
    params: dict[str, Any]
    id: RequestId | None

    @property
    def meta(self) -> dict[str, Any]:
        """Return the metadata of the parameters, empty without."""
        meta = self.params.get("_meta")
        return meta if isinstance(meta, dict) else {}

    @property
    def progress_token(self) -> RequestId | None:
        """Return the token with which the client requested progress; None if it is too long to be repeated."""
        token = self.meta.get("progressToken")
        return token if _is_short(token) else None


def parse_message(raw: bytes) -> RpcMessage:
    """Parse the body of a POST. Raises RpcError."""
    try:
        body = parse_object(raw)
    except InvalidJson as error:
        raise _invalid_body(raw, error) from error
    except InvalidRequest as error:
        raise RpcError(INVALID_REQUEST, "; ".join(detail.message for detail in error.details)) from error
    request_id = body.get("id")
    short_id = request_id if _is_short(request_id) else None
    if "id" in body and short_id is None:
        raise RpcError(INVALID_REQUEST, f"id must be a whole number, or a string of at most {MAX_ID_CHARS} characters")
    if body.get("jsonrpc") != "2.0":
        raise RpcError(INVALID_REQUEST, 'jsonrpc must be "2.0"', request_id=short_id)
    method, params = body.get("method"), body.get("params", {})
    if not isinstance(method, str):
        raise RpcError(INVALID_REQUEST, "method must be a string: send one request", request_id=short_id)
    if not isinstance(params, dict):
        raise RpcError(INVALID_REQUEST, "params must be an object", request_id=short_id)
    return RpcMessage(method, params, short_id)


def result_body(request_id: RequestId | None, result: dict[str, Any]) -> bytes:
    """Return the response to a request."""
    return orjson.dumps({"jsonrpc": "2.0", "id": request_id, "result": result})


def error_body(error: RpcError) -> bytes:
    """Return the response to a request that has an error."""
    fields: dict[str, Any] = {"code": error.code, "message": error.message}
    if error.data is not None:
        fields["data"] = error.data
    return orjson.dumps({"jsonrpc": "2.0", "id": error.request_id, "error": fields})


def progress_notification(params: dict[str, Any]) -> str:
    """Return a notification of progress."""
    return orjson.dumps({"jsonrpc": "2.0", "method": "notifications/progress", "params": params}).decode()


def unknown_method(message: RpcMessage) -> RpcError:
    """Return the error of a method that is not offered."""
    shown = ascii(message.method[:_MAX_NAME_CHARS])
    return RpcError(METHOD_NOT_FOUND, f"Method not found: {shown}", request_id=message.id)


def invalid_params(message: RpcMessage, text: str) -> RpcError:
    """Return the error of wrong parameters."""
    return RpcError(INVALID_PARAMS, text, request_id=message.id)


def _invalid_body(raw: bytes, error: InvalidJson) -> RpcError:
    """Return the error of a body that is no object; its values are not made, since there may be many."""
    try:
        msgspec.json.decode(raw, type=msgspec.Raw)
    except (msgspec.MsgspecError, RecursionError):
        return RpcError(PARSE_ERROR, error.message("en"))
    match raw.lstrip()[:1]:
        case b"[":
            return RpcError(INVALID_REQUEST, "Send one message in a body: batches are not supported")
        case b"{":
            return RpcError(INVALID_REQUEST, error.message("en"))
        case _:
            return RpcError(INVALID_REQUEST, "A message must be an object")
