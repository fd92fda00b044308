"""Error responses of `/mcp` that are no results of a tool: errors of JSON-RPC with the status of the error."""

from __future__ import annotations

from aiohttp import web

from imagegen.errors import ApiError
from imagegen.web.http.error_responses import response_with
from imagegen.web.mcp.messages import INTERNAL_ERROR, INVALID_REQUEST, RequestId, RpcError, error_body

PATH = "/mcp"


def api_error_response(error: ApiError, request_id: RequestId | None = None) -> web.Response:
    """Return the response for an error outside of a tool's call. request_id: None if it is unknown."""
    details = "; ".join(f"{detail.field}: {detail.message}" for detail in error.details)
    text = f"{error.message('en')}: {details}" if details else error.message("en")
    code = INVALID_REQUEST if error.status < 500 else INTERNAL_ERROR
    data = {"statusCode": error.status, "code": error.code, "retryable": error.retryable}
    body = error_body(RpcError(code, text, request_id=request_id, data=data))
    return response_with(body, "application/json", error)
