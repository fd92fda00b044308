"""Error responses of `/v1`: OpenAI's envelope, which the clients of OpenAI and Together both read."""

from __future__ import annotations

import math
from collections.abc import Mapping

import orjson
from aiohttp import web

from imagegen.errors import ApiError, BudgetExceeded
from imagegen.tasks.task import State, Task, TaskError
from imagegen.web.openai.schemas import ErrorType, OpenAIError, OpenAIErrorFields

MAX_RETRY_AFTER_S = 60
"""Together's client uses its own delay for any higher value."""

_PATHS = ("/v1", "/images", "/models")
_DEFAULT_RETRY_AFTER_S = 5
_FAILED_RETRY_AFTER_S = 10

FAILED_STATUS = {
    "content_policy": 400,
    "upstream_invalid_request": 400,
    "model_not_available": 404,
    "upstream_rate_limited": 429,
    "upstream_overloaded": 503,
    "upstream_timeout": 504,
}
_FAILED_PARAM = {"content_policy": "prompt", "model_not_available": "model"}
_CODES = {"content_policy": "content_policy_violation"}
"""Codes with another name in OpenAI's API."""

_MAYBE_PAID = frozenset({"upstream_timeout", "interrupted"})
_CANCELLED = TaskError("cancelled", "the task was cancelled", retryable=False)
_TYPES: Mapping[int, ErrorType] = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def is_openai_path(path: str) -> bool:
    """Return whether the client of this path expects OpenAI's envelope."""
    return any(path == prefix or path.startswith(f"{prefix}/") for prefix in _PATHS)


def error_response(error: ApiError, _request_id: str, _language: str) -> web.Response:
    """Return the answer for one error, in English, as `imagegen.web.http.error_responses` has it for `/api`."""
    text = "; ".join(f"{field.field}: {field.message}" for field in error.details) or error.message("en")
    param = error.details[0].field if error.details else None
    if isinstance(error, BudgetExceeded):
        return _over_budget(text)
    headers = {name.lower(): value for name, value in error.headers.items()}
    if error.status in {429, 503}:
        headers["retry-after"] = retry_after(float(headers.get("retry-after", _DEFAULT_RETRY_AFTER_S)))
    elif error.status == 401:
        headers.setdefault("www-authenticate", "Bearer")
    if not error.retryable:
        headers["x-should-retry"] = "false"
    response = _envelope(error.status, error_fields(error.status, text, error.code, param), headers)
    if error.closes_connection:
        response.force_close()
    return response


def _over_budget(text: str) -> web.Response:
    """Return the response of OpenAI's API to a client without credit; its clients treat it unlike a rate limit."""
    fields = error_fields(429, text, "insufficient_quota", None)
    return _envelope(429, {**fields, "type": "insufficient_quota"}, {"x-should-retry": "false"})


def failure_response(task: Task) -> web.Response:
    """Return the response for a failed task; the client's own repeat would get the same failure."""
    headers = {"x-should-retry": "false"}
    status = failed_status(task)
    if status in {429, 503} and is_retryable(task):
        headers["retry-after"] = retry_after(_FAILED_RETRY_AFTER_S)
    return _envelope(status, failure_fields(task), headers)


def unfinished_response(task: Task, wait_s: float, location: str) -> web.Response:
    """Return the response before the client times out: its repeat joins the task, best after `wait_s` seconds."""
    text = f"The image is not ready yet. Task {task.id} goes on: send the same request again to get its result"
    headers = {"retry-after": retry_after(wait_s), "location": location}
    return _envelope(503, error_fields(503, text, "unfinished", None), headers)


def model_not_found() -> web.Response:
    """Return the answer for a model that is not in the list."""
    fields = error_fields(404, "No such model", "model_not_found", "model")
    return _envelope(404, fields, {"x-should-retry": "false"})


def is_retryable(task: Task) -> bool:
    """Return whether the same request may succeed later, and no call of it may have been paid for without an image.

    A call that may have been paid for counts, however the last one ended: the client's repeat would add to the bill.
    """
    error = _error(task)
    return error.retryable and error.code not in _MAYBE_PAID and not task.possibly_billed_twice


def failure_fields(task: Task) -> OpenAIErrorFields:
    """Return the inside of the envelope for a failed or cancelled task."""
    error = _error(task)
    return error_fields(failed_status(task), error.detail, public_code(error.code), _FAILED_PARAM.get(error.code))


def public_code(code: str) -> str:
    """Return the code of a failed task as `/v1` shows it."""
    return _CODES.get(code, code)


def failed_status(task: Task) -> int:
    """Return the status of the response for a failed or cancelled task."""
    return 409 if task.state is State.CANCELLED else FAILED_STATUS.get(_error(task).code, 502)


def error_fields(status: int, message: str, code: str, param: str | None) -> OpenAIErrorFields:
    """Return the inside of the envelope."""
    other: ErrorType = "server_error" if status >= 500 else "invalid_request_error"
    kind = _TYPES.get(status, other)
    return {"message": message, "type": kind, "param": param, "code": code}


def retry_after(seconds: float) -> str:
    """Return the delay as both clients honour it: whole seconds from 1 to 60."""
    return str(min(max(math.ceil(seconds), 1), MAX_RETRY_AFTER_S))


def _error(task: Task) -> TaskError:
    return task.error or _CANCELLED


def _envelope(status: int, error: OpenAIErrorFields, headers: Mapping[str, str]) -> web.Response:
    """Return the response. Header names are in lower case: Together's 1.x client finds `retry-after` in no other."""
    body: OpenAIError = {"error": error}
    return web.Response(body=orjson.dumps(body), status=status, headers={"content-type": "application/json", **headers})
