"""Error responses of `/mcp` that are no results of a tool: errors of JSON-RPC with the status of the error."""

from __future__ import annotations

from aiohttp import hdrs, web

from imagegen.errors import ApiError
from imagegen.web.mcp.messages import INTERNAL_ERROR, INVALID_REQUEST, RequestId, RpcError, error_body

PATH = "/mcp"

_RETRY_AFTER_S = "5"


def api_error_response(error: ApiError, request_id: RequestId | None = None) -> web.Response:
    """Return the response for an error outside of a tool's call. request_id: None if it is unknown."""
    details = "; ".join(f"{detail.field}: {detail.message}" for detail in error.details)
    text = f"{error.message('en')}: {details}" if details else error.message("en")
    code = INVALID_REQUEST if error.status < 500 else INTERNAL_ERROR
    data = {"statusCode": error.status, "code": error.code, "retryable": error.retryable}
    headers = {hdrs.CONTENT_TYPE: "application/json", **error.headers}
    if error.status == 503:
        headers.setdefault(hdrs.RETRY_AFTER, _RETRY_AFTER_S)
    elif error.status == 401:
        headers.setdefault(hdrs.WWW_AUTHENTICATE, "Bearer")
    body = error_body(RpcError(code, text, request_id=request_id, data=data))
    response = web.Response(body=body, status=error.status, headers=headers)
    if error.closes_connection:
        response.force_close()
    return response
