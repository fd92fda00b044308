"""Parser of Replicate's predictions: accepted jobs, states of a job, lists, and the meaning of each error. No I/O.

https://replicate.com/docs/reference/http and https://replicate.com/docs/topics/predictions/lifecycle
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime

import orjson
from msgspec import Struct

from imagegen.errors import UpstreamError
from imagegen.providers.job_api import AcceptedCall, job_id
from imagegen.providers.job_polling import JobState, is_unknown, phase_of
from imagegen.providers.large_body import MAX_IMAGES_READ, load_object
from imagegen.providers.post import RawResponse
from imagegen.providers.protocol import Reply
from imagegen.providers.response_parser import error_from_response, parse_image, sanitize_detail, search_images

_SENSITIVE = re.compile(r"\(E005\)|flagged as sensitive|nsfw", re.IGNORECASE)
"""E005 is a model's own code for its content filter; the platform's begin with E1000."""

_INVALID = re.compile(
    r"^input validation error|^(?:\d{3} )?(?:invalid|unsupported) |must be (?:one of|less|greater|at )", re.IGNORECASE
)
_MEMORY = re.compile(r"out of memory|\(E1001\)", re.IGNORECASE)
_TIMED_OUT = re.compile(r"timed? ?out|took too long", re.IGNORECASE)
_PERCENT = re.compile(r"([0-9]{1,3})%\|")
"""In the logs: the bar of tqdm, which most models print for their steps."""

_LOGS_READ_CHARS = 2_000
_ENDED = frozenset({"succeeded", "failed", "canceled", "aborted"})
_OF_THE_REQUEST = frozenset({"content_policy", "upstream_billing", "upstream_auth"})


class ListedPrediction(Struct, frozen=True):
    """A prediction of a list. created_at: Unix time by Replicate's clock."""

    call: AcceptedCall
    input: Mapping[str, object]
    model: str
    version: str
    created_at: float


class PredictionPage(Struct, frozen=True):
    """A page of a list. next_url: of the next page, not checked; empty if it is the last one."""

    listed: tuple[ListedPrediction, ...]
    next_url: str


def parse_acceptance(answer: RawResponse, *, secret: str = "", now_s: float | None = None) -> AcceptedCall:
    """Return the prediction of a submit. Raises UpstreamError for each other response."""
    fields = (load_object(answer.body) if 200 <= answer.status < 300 else None) or {}
    accepted = _call_of(fields)
    if accepted is None:
        raise error_of(answer, secret=secret, now_s=now_s)
    state = job_state(fields, secret) if fields.get("status") in _ENDED else None
    return AcceptedCall(accepted.id, accepted.poll_url, cancel_url=accepted.cancel_url, state=state)


def parse_job(answer: RawResponse, *, secret: str = "", now_s: float | None = None) -> JobState:
    """Read the response to a poll. Raises UpstreamError for a failed poll; the job's state is unclear then."""
    fields = load_object(answer.body)
    if answer.status in (404, 410):
        return JobState("forgotten")
    if fields is None or not 200 <= answer.status < 300 or not isinstance(fields.get("status"), str):
        raise error_of(answer, secret=secret, now_s=now_s)
    return job_state(fields, secret)


def parse_page(answer: RawResponse, *, secret: str = "", now_s: float | None = None) -> PredictionPage:
    """Read a page of a list. Raises UpstreamError if it is none, or has an entry that can't be read."""
    fields = (load_object(answer.body) if 200 <= answer.status < 300 else None) or {}
    results = fields.get("results")
    if not isinstance(results, list):
        raise error_of(answer, secret=secret, now_s=now_s)
    return PredictionPage(tuple(_listed(results)), _text(fields.get("next")))


def is_cancelled(answer: RawResponse) -> bool:
    """Return whether a prediction that was to be cancelled has not ended in another way."""
    status = (load_object(answer.body) or {}).get("status")
    return status not in ("succeeded", "failed")


def error_of(answer: RawResponse, *, secret: str = "", now_s: float | None = None) -> UpstreamError:
    """Return the error that a refused submit or another failed request means."""
    error = error_from_response(answer.status, answer.headers, answer.body, secret=secret, now_s=now_s)
    fields = load_object(answer.body) or {}
    if _text(fields.get("title")).lower().startswith("invalid version"):
        return UpstreamError("model_not_available", error.detail, status=answer.status)
    return error


def job_state(fields: Mapping[str, object], secret: str = "") -> JobState:
    """Return the state of a prediction. The data of a prediction are removed an hour after its end."""
    status = fields.get("status")
    if status == "succeeded":
        output = fields.get("output")
        if output is None and fields.get("data_removed") is True:
            return JobState("forgotten")
        entries = output if isinstance(output, list) else [output]
        images = tuple([image for entry in entries[:MAX_IMAGES_READ] if (image := parse_image(entry)) is not None])
        return JobState("done", reply=Reply(images or search_images(orjson.dumps({"output": output}))))
    if phase_of(_text(status)) == "failed":
        return JobState("failed", error=job_error(str(status), _text(fields.get("error")), secret))
    return JobState("running", progress=_progress(_text(fields.get("logs"))), unclear=is_unknown(_text(status)))


def job_error(status: str, message: str, secret: str = "") -> UpstreamError:
    """Return the error of a prediction that ended without an image.

    Its error is a text alone: https://replicate.com/docs/topics/predictions/error-codes has the platform's codes. One
    that was aborted had not started in time, and is not charged. Retryable errors have a status: one without counts as
    never sent.
    """
    upstream_detail = sanitize_detail(message, secret)
    if status == "canceled":
        return UpstreamError("upstream_error", "The provider's job was cancelled", upstream_detail=upstream_detail)
    if status == "aborted":
        detail = upstream_detail or "The provider could not start the job in time"
        return UpstreamError("upstream_overloaded", detail, retryable=True, status=503)
    if _SENSITIVE.search(message[:4_000]):
        return UpstreamError("content_policy", upstream_detail)
    error = error_from_response(422, {}, orjson.dumps({"detail": message or "the job failed"}), secret=secret)
    if error.code in _OF_THE_REQUEST or error.refused or error.max_count or _INVALID.search(upstream_detail):
        return error
    if _MEMORY.search(upstream_detail):
        return UpstreamError("upstream_error", upstream_detail)
    code = "upstream_timeout" if _TIMED_OUT.search(upstream_detail) else "upstream_error"
    return UpstreamError(code, upstream_detail or "the job failed", retryable=True, status=500)


def _listed(results: list[object]) -> Iterator[ListedPrediction]:
    for entry in results:
        fields = entry if isinstance(entry, dict) else {}
        call, created, inputs = _call_of(fields), _unix_time(fields.get("created_at")), fields.get("input")
        if call is None or created is None:
            raise UpstreamError("upstream_bad_response", "The provider's list of jobs can't be read")
        if isinstance(inputs, dict):
            yield ListedPrediction(call, inputs, _text(fields.get("model")), _text(fields.get("version")), created)


def _call_of(fields: Mapping[str, object]) -> AcceptedCall | None:
    name, urls = job_id(fields.get("id")), fields.get("urls")
    addresses = urls if isinstance(urls, dict) else {}
    if not name:
        return None
    return AcceptedCall(name, _text(addresses.get("get")), cancel_url=_text(addresses.get("cancel")))


def _progress(logs: str) -> float | None:
    percents = _PERCENT.findall(logs[-_LOGS_READ_CHARS:])
    return min(int(percents[-1]) / 100, 1.0) if percents else None


def _unix_time(value: object) -> float | None:
    try:
        moment = datetime.fromisoformat(_text(value))
    except ValueError:
        return None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""
