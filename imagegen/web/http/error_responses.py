"""Error responses of `/api`: the JSON body of docs/api.md, in the client's language."""

from __future__ import annotations

import orjson
from aiohttp import hdrs, web

from imagegen.errors import (
    ApiError,
    BadRequest,
    BodyTooLarge,
    BudgetExceeded,
    ExpectationFailed,
    Forbidden,
    HeadersTooLarge,
    MethodNotAllowed,
    RateLimited,
    RouteNotFound,
    Unauthorized,
    UnsupportedMediaType,
)
from imagegen.web.api.schemas import ErrorView
from imagegen.web.http.responses import Language

MAX_BODY_BYTES = 2**20
"""Maximum size of a request body."""

_JSON = "application/json; charset=utf-8"
_RETRY_AFTER_S = "5"
_BY_STATUS: dict[int, type[ApiError]] = {
    kind.status: kind
    for kind in (
        Unauthorized,
        Forbidden,
        RouteNotFound,
        MethodNotAllowed,
        UnsupportedMediaType,
        ExpectationFailed,
        RateLimited,
        HeadersTooLarge,
    )
}


def error_view(error: ApiError, request_id: str, language: Language) -> ErrorView:
    """Return the body for an error."""
    view: ErrorView = {
        "success": False,
        "statusCode": error.status,
        "code": error.code,
        "message": error.message(language),
        "retryable": error.retryable,
        "requestId": request_id,
        "details": [{"field": field.field, "message": field.message} for field in error.details],
    }
    if isinstance(error, BudgetExceeded):
        view["resetsAt"] = str(error.values["resets_at"])
    return view


def error_response(error: ApiError, request_id: str, language: Language) -> web.Response:
    """Return the response for an error."""
    return response_with(orjson.dumps(error_view(error, request_id, language)), _JSON, error)


def response_with(body: bytes, content_type: str, error: ApiError) -> web.Response:
    """Return the response with a body for an error; if `error.closes_connection`, the connection ends with it."""
    headers = {hdrs.CONTENT_TYPE: content_type, **error.headers}
    response = web.Response(body=body, status=error.status, headers=headers)
    if error.status == 503:
        response.headers.setdefault(hdrs.RETRY_AFTER, _RETRY_AFTER_S)
    elif error.status == 401:
        response.headers.setdefault(hdrs.WWW_AUTHENTICATE, "Bearer")
    if error.closes_connection:
        response.force_close()
    return response


def from_http_exception(error: web.HTTPException) -> ApiError:
    """Return our error for one of aiohttp's; its text is dropped, since it may quote the client."""
    if isinstance(error, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(error.allowed_methods))
        return MethodNotAllowed(headers={hdrs.ALLOW: allowed}, allowed=allowed)
    if isinstance(error, web.HTTPRequestEntityTooLarge):
        return BodyTooLarge(limit=MAX_BODY_BYTES)
    return _BY_STATUS.get(error.status, BadRequest)()
