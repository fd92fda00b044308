"""Parser of fal's responses: accepted jobs, states and results of a job, and the meaning of each error. No I/O.

https://fal.ai/docs/inference-api/queue, https://fal.ai/docs/documentation/model-apis/errors (of a model: a list of
faults) and https://fal.ai/docs/documentation/model-apis/request-errors (of the platform: `error_type`).
"""

from __future__ import annotations

from collections.abc import Mapping

import orjson
from msgspec import Struct

from imagegen.errors import UpstreamError
from imagegen.providers.job_api import AcceptedCall, job_id
from imagegen.providers.job_polling import JobState, Phase, is_unknown, phase_of
from imagegen.providers.large_body import MAX_IMAGES_READ, load_object
from imagegen.providers.post import RawResponse
from imagegen.providers.protocol import Reply
from imagegen.providers.response_parser import error_from_response, parse_image, sanitize_detail, search_images
from imagegen.tasks.image import GivenImage

_TIMEOUTS = frozenset({"request_timeout", "startup_timeout", "generation_timeout"})
_OVERLOADED = frozenset({"runner_scheduling_failure"})
_CANCELLED = frozenset({"client_cancelled", "client_disconnected"})
_EMPTY = frozenset({"no_media_generated"})
_DOWNSTREAM = frozenset({"downstream_service_error", "downstream_service_unavailable"})
"""Services behind fal failed, so a 400 of it is no fault of the request."""

_DECIDED = frozenset({"content_policy", "upstream_billing", "upstream_auth", "upstream_rate_limited"})
"""Codes that no header overrules."""

_ABOUT_THE_POLL = frozenset({401, 402, 403, 407, 408, 425, 429})
"""Refusals of a request for a result that are not the result."""

QUEUED_PROGRESS, RUNNING_PROGRESS = 0.2, 0.3
"""Progress of the next job of the queue, and of a running job; fal names no share of its work."""

_GONE = frozenset({404, 410})
_FLAGGED = "The content was withheld by the provider's content checker"


class JobStatus(Struct, frozen=True):
    """State of a job in the queue. phase: once it is `done`, failed or not, its result is to be fetched.

    error: that it ended with, empty if none. progress: 0 to 1 until its end, None if the state shows none. unclear: as
    of a JobState.
    """

    phase: Phase
    error: str = ""
    error_type: str = ""
    progress: float | None = None
    unclear: bool = False


def parse_acceptance(answer: RawResponse, *, secret: str = "", now_s: float | None = None) -> AcceptedCall:
    """Return the job of a submit. Raises UpstreamError for each other response."""
    fields = (load_object(answer.body) if 200 <= answer.status < 300 else None) or {}
    name = job_id(fields.get("request_id"))
    if not name:
        raise error_of(answer.status, answer.headers, answer.body, secret=secret, now_s=now_s)
    poll_url, result_url = _text(fields.get("status_url")), _text(fields.get("response_url"))
    return AcceptedCall(name, poll_url, result_url, _text(fields.get("cancel_url")))


def parse_status(answer: RawResponse, *, secret: str = "", now_s: float | None = None) -> JobStatus:
    """Read the response to a look at a job. Raises UpstreamError for a failed one."""
    fields = load_object(answer.body) or {}
    if answer.status in (404, 410):
        return JobStatus("forgotten")
    word = fields.get("status")
    if not 200 <= answer.status < 300 or not isinstance(word, str):
        raise error_of(answer.status, answer.headers, answer.body, secret=secret, now_s=now_s)
    phase, error = phase_of(word), _text(fields.get("error"))
    if phase == "failed":
        phase, error = "done", error or f"The job ended as {word[:40]}"
    progress = _progress(word.upper(), fields.get("queue_position"))
    return JobStatus(phase, error, _text(fields.get("error_type")), progress, is_unknown(word))


def _progress(word: str, position: object) -> float | None:
    """Return progress that rises with each place in the queue, and when the job begins to run.

    position: 0 for the next job.
    """
    if word == "IN_PROGRESS":
        return RUNNING_PROGRESS
    if word != "IN_QUEUE" or isinstance(position, bool) or not isinstance(position, int) or position < 0:
        return None
    return QUEUED_PROGRESS * 2 / (position + 2)


def parse_result(answer: RawResponse, status: JobStatus, *, secret: str = "", now_s: float | None = None) -> JobState:
    """Read the result of a job that has ended, which repeats the model's own response.

    Raises UpstreamError if only the request for it failed.
    """
    code, fields = answer.status, load_object(answer.body)
    if status.error and (200 <= code < 300 or code in _GONE):
        return _failed(status, answer, secret)
    if code in _GONE:
        return JobState("forgotten")
    if 200 <= code < 300:
        if (state := _images(fields or {}, answer.body)) is None:
            raise error_of(code, answer.headers, answer.body, secret=secret, now_s=now_s)
        return state
    is_own = fields is not None and ("detail" in fields or "error_type" in fields or "message" in fields)
    if status.error and not is_own:
        return _failed(status, answer, secret)
    if code in _ABOUT_THE_POLL or not is_own:
        raise error_of(code, answer.headers, answer.body, secret=secret, now_s=now_s)
    if "still in progress" in str((fields or {}).get("detail")):
        return JobState("running")
    return JobState("failed", error=error_of(code, answer.headers, answer.body, secret=secret, of_job=True))


def error_of(
    status: int,
    headers: Mapping[str, str],
    body: bytes | bytearray,
    *,
    secret: str = "",
    now_s: float | None = None,
    of_job: bool = False,
) -> UpstreamError:
    """Return the error that a failed request, or the failed job behind it, means.

    of_job: it is the end of a job, so nothing was lost, and fal does not charge for it:
    https://docs.fal.ai/model-apis/model-endpoints/reliability
    """
    error = error_from_response(status, headers, body, secret=secret, now_s=now_s)
    kinds = _kinds(headers, load_object(body) or {})
    if of_job:
        error.ambiguous = error.unreached = False
    if error.code in _DECIDED:
        return error
    if kinds & _CANCELLED and of_job:
        error.code, error.retryable = "upstream_error", False
    elif kinds & _EMPTY:
        error.code, error.retryable = "upstream_bad_response", False
    elif kinds & _TIMEOUTS or (status == 504 and of_job):
        error.code, error.retryable = "upstream_timeout", True
    elif kinds & _OVERLOADED:
        error.code, error.retryable = "upstream_overloaded", True
    elif kinds & _DOWNSTREAM:
        error.code, error.retryable = "upstream_error", True
    return _with_hints(error, headers)


def _with_hints(error: UpstreamError, headers: Mapping[str, str]) -> UpstreamError:
    """Return the error as its headers correct it."""
    if headers.get("X-Fal-Request-Timeout-Type", "").lower() == "user":  # it did not start in the time of the call
        error.code, error.retryable, error.ambiguous = "upstream_timeout", False, False
        return error
    hint = headers.get("X-Fal-Retryable", "").strip().lower()
    if hint == "false":
        error.retryable = error.ambiguous
    elif hint == "true" and not error.refused and error.max_count is None:
        error.retryable = True
        if error.code == "upstream_invalid_request":
            error.code = "upstream_error"
    return error


def _kinds(headers: Mapping[str, str], fields: Mapping[str, object]) -> frozenset[str]:
    """Return the words by which an error names its kind."""
    faults = fields.get("detail")
    faults = faults if isinstance(faults, list) else []
    words = [headers.get("X-Fal-Error-Type"), fields.get("error_type")]
    words += [fault.get("type") for fault in faults[:10] if isinstance(fault, dict)]
    return frozenset(word.lower() for word in words if isinstance(word, str))


def _failed(status: JobStatus, answer: RawResponse, secret: str) -> JobState:
    """Return the state of a job that failed by its status alone."""
    body = orjson.dumps({"detail": status.error, "error_type": status.error_type})
    of_request = error_of(422, answer.headers, body, secret=secret, of_job=True)
    if of_request.code in _DECIDED:
        return JobState("failed", error=of_request)
    http_status = {"bad_request": 400, **dict.fromkeys(_TIMEOUTS, 504), **dict.fromkeys(_CANCELLED, 499)}
    code = http_status.get(status.error_type, 500)
    return JobState("failed", error=error_of(code, answer.headers, body, secret=secret, of_job=True))


def _images(fields: Mapping[str, object], body: bytes | bytearray) -> JobState | None:
    """Return the state of a job that is done, and charged; None if its result is of another shape, and has no image.

    An image that the content checker flags is black, so it is left out.
    """
    entries, flags = fields.get("images"), fields.get("has_nsfw_concepts")
    if not isinstance(entries, list):
        entries = [fields["image"]] if fields.get("image") else []
    entries = entries[:MAX_IMAGES_READ]
    flags = flags if isinstance(flags, list) else []
    flagged = {place for place, flag in enumerate(flags[: len(entries)]) if flag is True}
    images: list[GivenImage] = [
        image
        for place, entry in enumerate(entries)
        if place not in flagged and (image := parse_image(entry)) is not None
    ]
    if flagged and not images:
        return JobState("failed", error=UpstreamError("content_policy", _FLAGGED, charged=True))
    images = images or list(search_images(body))
    if not images and not ("image" in fields or isinstance(fields.get("images"), list)):
        return None
    warning = (f"{len(flagged)} of {len(entries)} images: {sanitize_detail(_FLAGGED)}",) if flagged else ()
    return JobState("done", reply=Reply(tuple(images), warnings=warning))


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""
