"""Exceptions of the client.

ClientError
├── ResponseError            the service refused a request: status, code, details, retry_after_s
│   ├── RequestRefused           400, 403, 413, 415, 422: the request itself must change
│   ├── AuthenticationFailed     401
│   ├── BudgetUsedUp             402
│   ├── ResourceNotFound         404, 410
│   ├── RequestConflict          409
│   ├── TooManyRequests          429
│   └── ServiceUnavailable       5xx, 408
├── ConnectionFailed         no response, after all repeats
├── DownloadBroken           the bytes are not those of the image
├── TaskUnsuccessful         the task failed or was cancelled
├── WaitTimeout              the task is not finished in time; it goes on
└── WebhookRejected          a webhook without a valid signature
"""

from __future__ import annotations

import email.utils
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import msgspec

from imagegen.client.results import FieldFault, ImageTask


class ClientError(Exception):
    """The root of all errors of the client."""


class ResponseError(ClientError):
    """A response that is an error.

    status: HTTP status. code: of docs/api.md, such as `rate_limited`; empty if something in between answered.
    message: for people. details: every field with an error. retryable: the same request may succeed later.
    retry_after_s: seconds until then, None without `Retry-After`. resets_at: when a used budget begins again.
    attempts: how often the request was sent.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        details: tuple[FieldFault, ...] = (),
        retryable: bool = False,
        retry_after_s: float | None = None,
        request_id: str | None = None,
        resets_at: datetime | None = None,
    ) -> None:
        self.status = status
        self.code = code
        self.message = message
        self.details = details
        self.retryable = retryable
        self.retry_after_s = retry_after_s
        self.request_id = request_id
        self.resets_at = resets_at
        self.attempts = 1
        fields = "; ".join(f"{detail.field}: {detail.message}" for detail in details)
        super().__init__(f"{message} ({fields})" if fields else message)


class RequestRefused(ResponseError):
    """The request must change."""


class AuthenticationFailed(ResponseError):
    """The service needs a key, or does not accept this one."""


class BudgetUsedUp(ResponseError):
    """The budget of the day can't hold the request until `resets_at`."""


class ResourceNotFound(ResponseError):
    """The task or image does not exist, or has expired."""


class RequestConflict(ResponseError):
    """The state of the task does not allow it."""


class TooManyRequests(ResponseError):
    """A rate limit; `retry_after_s` has the seconds."""


class ServiceUnavailable(ResponseError):
    """The service can't answer now."""


class ConnectionFailed(ClientError):
    """No response. maybe_sent: the service may have received the request."""

    def __init__(self, message: str, *, maybe_sent: bool) -> None:
        super().__init__(message)
        self.maybe_sent = maybe_sent


class DownloadBroken(ClientError):
    """The bytes do not have the image's length or SHA-256."""


class TaskUnsuccessful(ClientError):
    """The task failed or was cancelled. code: why it failed, `cancelled`, or empty."""

    def __init__(self, task: ImageTask) -> None:
        super().__init__(task.message or f"the task is {task.status}")
        self.task = task

    @property
    def code(self) -> str:
        """Return the error code of the task."""
        return self.task.error.code if self.task.error else self.task.status


class WaitTimeout(ClientError, TimeoutError):
    """The task is not finished yet; it goes on. task: as it was last."""

    def __init__(self, task: ImageTask) -> None:
        super().__init__(f"the task {task.task_id} is still {task.status} ({task.progress} %)")
        self.task = task


class WebhookRejected(ClientError):
    """The signature, the time or the body of a webhook is wrong."""


_BY_STATUS: Mapping[int, type[ResponseError]] = {
    401: AuthenticationFailed,
    402: BudgetUsedUp,
    404: ResourceNotFound,
    408: ServiceUnavailable,
    409: RequestConflict,
    410: ResourceNotFound,
    429: TooManyRequests,
}


def response_error(status: int, headers: Mapping[str, str], body: bytes, now: datetime) -> ResponseError:
    """Return the error of a response. headers: names in lower case. It never fails: proxies answer too."""
    fields = _object_of(body)
    kind = _BY_STATUS.get(status) or (ServiceUnavailable if status >= 500 else RequestRefused)
    code = fields.get("code") or fields.get("status")
    message = fields.get("message")
    retryable = fields.get("retryable")
    return kind(
        status,
        code if isinstance(code, str) else "",
        message if isinstance(message, str) else f"HTTP {status}",
        details=_details_of(fields.get("details")),
        retryable=retryable if isinstance(retryable, bool) else status in {408, 429, 502, 503, 504},
        retry_after_s=parse_retry_after_s(headers.get("retry-after"), now),
        request_id=headers.get("x-request-id"),
        resets_at=_time_of(fields.get("resetsAt")),
    )


def parse_retry_after_s(text: str | None, now: datetime) -> float | None:
    """Return the seconds of a Retry-After header, which may be a date (RFC 9110, 10.2.3)."""
    if not text:
        return None
    if text.strip().isdecimal():
        return float(text[:12])
    try:
        at = email.utils.parsedate_to_datetime(text)
    except (ValueError, OverflowError):
        return None
    if at.tzinfo is None:
        at = at.replace(tzinfo=UTC)
    return max(0.0, (at - now).total_seconds())


def _object_of(body: bytes) -> dict[str, Any]:
    try:
        value = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return {}
    return value if isinstance(value, dict) else {}


def _details_of(value: object) -> tuple[FieldFault, ...]:
    try:
        return msgspec.convert(value or (), tuple[FieldFault, ...])
    except msgspec.ValidationError:
        return ()


def _time_of(value: object) -> datetime | None:
    try:
        return None if value is None else msgspec.convert(value, datetime)
    except msgspec.ValidationError:
        return None
