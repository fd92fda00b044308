"""Error responses of `/api`: the JSON body of docs/api.md, in the client's language."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, get_args

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
from imagegen.web.http.headers import quality_of

Language = Literal["zh", "en"]

MAX_BODY_BYTES = 2**20
"""Maximum size of a request body."""

_JSON = "application/json; charset=utf-8"
_RETRY_AFTER_S = "5"
_MAX_ACCEPT_CHARS = 256
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
    """Return the response for an error; if `error.closes_connection`, the connection ends with it."""
    body = error_view(error, request_id, language)
    headers = {hdrs.CONTENT_TYPE: _JSON, **error.headers}
    response = web.Response(body=orjson.dumps(body), status=error.status, headers=headers)
    if error.status == 503:
        response.headers.setdefault(hdrs.RETRY_AFTER, _RETRY_AFTER_S)
    elif error.status == 401:
        response.headers.setdefault(hdrs.WWW_AUTHENTICATE, "Bearer")
    if error.closes_connection:
        response.force_close()
    return response


@lru_cache(maxsize=256)
def preferred_language(accept_language: str | None) -> Language:
    """Return Chinese unless the header prefers English; of two equal preferences, the first one."""
    if not accept_language:
        return "zh"
    best: Language = "zh"
    best_quality = 0.0
    for part in accept_language[:_MAX_ACCEPT_CHARS].split(","):
        name, _, parameter = part.partition(";")
        prefix = name.strip().lower().partition("-")[0]
        language: Language | None = "zh" if prefix == "*" else _known(prefix)
        quality = quality_of(parameter.strip().lower())
        if language and quality > best_quality:
            best, best_quality = language, quality
    return best


def from_http_exception(error: web.HTTPException) -> ApiError:
    """Return our error for one of aiohttp's; its text is dropped, since it may quote the client."""
    if isinstance(error, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(error.allowed_methods))
        return MethodNotAllowed(headers={hdrs.ALLOW: allowed}, allowed=allowed)
    if isinstance(error, web.HTTPRequestEntityTooLarge):
        return BodyTooLarge(limit=MAX_BODY_BYTES)
    return _BY_STATUS.get(error.status, BadRequest)()


def _known(prefix: str) -> Language | None:
    return next((language for language in get_args(Language) if language == prefix), None)
