"""Parser of DashScope's responses: jobs, results of all shapes, lists of jobs, and the meaning of each refusal. No I/O.

https://www.alibabacloud.com/help/en/model-studio/manage-asynchronous-tasks and /error-code
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import islice

import orjson
from msgspec import Struct

from imagegen.errors import UpstreamError
from imagegen.providers.details_parser import parse_details
from imagegen.providers.job_api import AcceptedCall, job_id
from imagegen.providers.job_polling import JobState, is_unknown, phase_of
from imagegen.providers.large_body import MAX_IMAGES_READ, load_object
from imagegen.providers.protocol import Reply
from imagegen.providers.response_parser import error_from_response, parse_image, sanitize_detail, search_images
from imagegen.tasks.reply_details import ReplyDetails

JOB_LIFE_S = 86_400.0
"""A job and the links of its result can be read for a day after the job's end."""

MAX_LISTED = 100
"""Jobs of one page."""

_STATUS_OF_CODES: tuple[tuple[re.Pattern[str], int], ...] = (
    (re.compile(r"throttling|limitrequests|limit_requests"), 429),
    (re.compile(r"invalidapikey|invalid_api_key"), 401),
    (re.compile(r"arrearage|overdue|commoditynotpurchased|freetieronly"), 402),
    (re.compile(r"accessdenied|unpurchased|nopermission"), 403),
    (re.compile(r"modelnotfound|model_not_found|modelnotsupported"), 404),
    (re.compile(r"requesttimeout"), 504),
    (re.compile(r"unavailable|serviceoverload"), 503),
    (re.compile(r"internalerror|systemerror|servicefailed|servingerror|inferenceerror|timeout"), 500),
    (re.compile(r"^invalid|datainspection|ipinfringement|badrequest|unsupported"), 400),
)
"""The status that a code has where it comes without one: in a 200, or in a failed job."""

_NO_MODEL = re.compile(r"model (?:does )?not exist|model.{0,60}not found", re.IGNORECASE)
_CANCELLED = frozenset({"CANCELED", "CANCELLED"})
_SIZE = re.compile(r"([0-9]{1,5})[*x]([0-9]{1,5})")


class ListedJob(Struct, frozen=True, gc=False):
    """One job of a list; it has neither prompt nor parameters. created_at: Unix time of the upstream."""

    id: str
    model: str
    created_at: float


class JobPage(Struct, frozen=True, gc=False):
    """One page of a list of jobs. pages: how many the list has."""

    jobs: tuple[ListedJob, ...]
    pages: int


def parse_acceptance(
    status: int, headers: Mapping[str, str], body: bytes | bytearray, *, secret: str = "", now_s: float
) -> AcceptedCall:
    """Return the job that a submit has begun. Raises UpstreamError for each other response."""
    fields = load_object(body)
    output = _output(fields)
    name = job_id(output.get("task_id"))
    if not name or not 200 <= status < 300:
        raise response_error(status, headers, body, secret=secret, now_s=now_s)
    state = parse_job(status, headers, body, secret=secret, now_s=now_s)
    ended = state if state.phase in ("done", "failed") else None
    return AcceptedCall(name, expires_at=now_s + JOB_LIFE_S, state=ended)


def parse_reply(
    status: int, headers: Mapping[str, str], body: bytes | bytearray, *, secret: str = "", now_s: float
) -> Reply:
    """Read the images of a call that is answered at once. Raises UpstreamError for each other response."""
    fields = load_object(body)
    if not isinstance((fields or {}).get("output"), dict) or (fields or {}).get("code") or 300 <= status < 400:
        raise response_error(status, headers, body, secret=secret, now_s=now_s)
    try:
        return _reply(fields or {}, secret)
    except UpstreamError:
        if 200 <= status < 300:
            raise
    raise response_error(status, headers, body, secret=secret, now_s=now_s)


def parse_job(
    status: int, headers: Mapping[str, str], body: bytes | bytearray, *, secret: str = "", now_s: float
) -> JobState:
    """Read the response to a poll. Raises UpstreamError for a failed poll; the job's state is unclear then."""
    fields = load_object(body) or {}
    output = _output(fields)
    word = str(output.get("task_status") or "").upper()
    if status in (404, 410) or word == "UNKNOWN":  # there is no such job, or it was removed a day after its end
        return JobState("forgotten")
    if not 200 <= status < 300 or not word:
        raise response_error(status, headers, body, secret=secret, now_s=now_s)
    if word == "SUCCEEDED":
        try:
            return JobState("done", reply=_reply(fields, secret))
        except UpstreamError as error:
            return JobState("failed", error=error)
    if word == "FAILED" or (phase_of(word) == "failed" and word not in _CANCELLED):
        fault = _error(output, 500, headers, secret, now_s)
        fault.ambiguous = False  # only images that were made are charged
        return JobState("failed", error=fault)
    if word in _CANCELLED:
        cancelled = UpstreamError("upstream_error", "The job was cancelled at the provider", status=status)
        return JobState("failed", error=cancelled)
    return JobState("running", progress=0.0 if word == "PENDING" else None, unclear=is_unknown(word))


def response_error(
    status: int, headers: Mapping[str, str], body: bytes | bytearray, *, secret: str = "", now_s: float
) -> UpstreamError:
    """Return the error that a response means: a refusal, perhaps with a 200, or a page of a gateway."""
    fields = load_object(body) or {}
    refusal = next((part for part in (fields, _output(fields)) if part.get("code")), None)
    if refusal is None:
        return error_from_response(status, headers, body, secret=secret, now_s=now_s)
    return _error(refusal, status, headers, secret, now_s)


def _error(
    refusal: Mapping[str, object], status: int, headers: Mapping[str, str], secret: str, now_s: float | None
) -> UpstreamError:
    """Return the error of a code and its message. status: of the response; used if the table lacks the code."""
    code, message = str(refusal.get("code") or "")[:100], str(refusal.get("message") or "")
    effective_status = next((value for pattern, value in _STATUS_OF_CODES if pattern.search(code.lower())), None)
    if effective_status is None:
        effective_status = status if status >= 400 else 500
    if effective_status in (400, 404) and _NO_MODEL.search(message[:500]):
        code, effective_status = "model_not_found", 404
    if effective_status == 429:
        message = f"Rate limit: {message}"  # it has the words of an account without credit, but it passes
    message = message or code or "the provider named no reason"
    body = orjson.dumps({"error": {"message": message, "code": code}})
    error = error_from_response(effective_status, headers, body, secret=secret, now_s=now_s)
    error.status = status
    return error


def _reply(fields: Mapping[str, object], secret: str) -> Reply:
    """Return the images of a result, with a warning if a part failed. Raises UpstreamError if each part failed."""
    output = _output(fields)
    results = output.get("results")
    parts = [part for part in results[:MAX_IMAGES_READ] if isinstance(part, dict)] if isinstance(results, list) else []
    images = tuple(
        image for entry in islice(_given(parts, output), MAX_IMAGES_READ) if (image := parse_image(entry)) is not None
    )
    images = images or search_images(orjson.dumps(output))
    failed = [part for part in parts if part.get("code") and not part.get("url")]
    if failed and not images:
        raise _error(failed[0], 500, {}, secret, None)
    warnings: tuple[str, ...] = ()
    if failed:
        why = sanitize_detail(f"{failed[0].get('code')}: {failed[0].get('message') or ''}".strip(" :"), secret)
        warnings = (f"{len(failed)} of {len(parts)} images failed at the provider: {why}",)
    return Reply(images, warnings=warnings, details=_details(fields))


def _given(parts: list[dict[str, object]], output: Mapping[str, object]) -> Iterator[object]:
    """Yield what a result has in place of images: `results` of the older shape, `choices` of the others."""
    yield from ({"url": part.get("url")} for part in parts if part.get("url"))
    choices = output.get("choices")
    for choice in choices[:MAX_IMAGES_READ] if isinstance(choices, list) else ():
        message = choice.get("message") if isinstance(choice, dict) else None
        content = message.get("content") if isinstance(message, dict) else None
        for part in content[:MAX_IMAGES_READ] if isinstance(content, list) else ():
            if isinstance(part, dict) and isinstance(link := part.get("image"), str):
                yield {"url": link}


def _details(fields: Mapping[str, object]) -> ReplyDetails | None:
    """Return usage and size. The number of images in it is the number that is charged."""
    usage = fields.get("usage")
    if not isinstance(usage, dict):
        return None
    size = _SIZE.fullmatch(str(usage.get("size") or f"{usage.get('width')}*{usage.get('height')}"))
    return parse_details({"usage": usage, "size": f"{size[1]}x{size[2]}" if size else ""})


def parse_page(status: int, headers: Mapping[str, str], body: bytes | bytearray, *, secret: str = "") -> JobPage:
    """Read a page of the list of jobs. Raises UpstreamError if it is none, or has an entry that can't be read."""
    fields = load_object(body) or {}
    data, pages = fields.get("data"), fields.get("total_page")
    if not 200 <= status < 300 or not isinstance(data, list) or not isinstance(pages, int):
        raise response_error(status, headers, body, secret=secret, now_s=0.0)
    jobs = tuple(job for entry in data if (job := _listed(entry)) is not None)
    if len(jobs) < len(data):
        raise UpstreamError("upstream_bad_response", "The provider's list of jobs can't be read", status=status)
    return JobPage(jobs, pages)


def _listed(entry: object) -> ListedJob | None:
    if not isinstance(entry, dict):
        return None
    name, model, created = job_id(entry.get("task_id")), entry.get("model_name"), entry.get("gmt_create")
    if not name or not isinstance(model, str) or not isinstance(created, int | float) or isinstance(created, bool):
        return None
    return ListedJob(name, model, created / 1000)


def prompt_of(body: bytes | bytearray) -> str | None:
    """Return the prompt of a finished job as it was sent, None if the response does not repeat it."""
    results = _output(load_object(body)).get("results")
    for part in results if isinstance(results, list) else ():
        if isinstance(part, dict) and isinstance(prompt := part.get("orig_prompt"), str):
            return prompt
    return None


def image_count_of(body: bytes | bytearray) -> int | None:
    """Return how many images a job was to make, None if the response does not show it."""
    metrics = _output(load_object(body)).get("task_metrics")
    count = metrics.get("TOTAL") if isinstance(metrics, dict) else None
    return count if isinstance(count, int) and not isinstance(count, bool) else None


def _output(fields: Mapping[str, object] | None) -> Mapping[str, object]:
    output = (fields or {}).get("output")
    return output if isinstance(output, dict) else {}
