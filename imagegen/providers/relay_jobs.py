"""Parser of provider jobs in the dialects of relays: accepted calls, states of a job, results. No I/O.

Read are APIMart's (`{"code": 200, "data": [{"status": "submitted", "task_id": …}]}`), sub2api's
(`{"id", "task_id", "object": "image.generation.task", "poll_url"}`), new-api's, ModelScope's (`task_status`,
`output_images`) and Bifrost's (`202 {"id", "status"}`) shapes, by the same lenient code, since forks mix them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from urllib.parse import quote

import orjson
from msgspec import Struct
from yarl import URL

from imagegen.errors import UpstreamError
from imagegen.providers.details_parser import parse_details
from imagegen.providers.job_addresses import same_host
from imagegen.providers.job_polling import MAX_ID_CHARS, JobState, is_unknown, phase_of
from imagegen.providers.large_body import MAX_IMAGES_READ, load_object
from imagegen.providers.protocol import Reply
from imagegen.providers.response_parser import error_from_response, parse_image, search_images
from imagegen.tasks.image import GivenImage
from imagegen.tasks.reply_details import ReplyDetails

MAX_ACCEPTED_BYTES = 64 * 1024
"""An acceptance is small; a larger body is a result."""

MAX_DEPTH = 8

_STATUS_NAMES = ("status", "task_status", "state", "taskStatus")
_ID_NAMES = ("task_id", "taskId")
_ADDRESS_NAMES = ("poll_url", "polling_url", "status_url")
_ERROR_NAMES = (
    "error",
    "errors",
    "fail_reason",
    "failure",
    "failure_reason",
    "error_message",
    "message",
    "failMsg",
    "msg",
)
_IMAGE_NAMES = (
    "result",
    "output",
    "data",
    "images",
    "output_images",
    "image_urls",
    "results",
    "outputs",
    "urls",
    "url",
    "image_url",
)
_NOT_FOUND = re.compile(
    r"(?:task|job|request).{0,40}(?:not[ _](?:found|exist)|does(?: not|n't) exist|expired)|任务.{0,8}不存在",
    re.IGNORECASE,
)
_DECIDED = frozenset(
    {"content_policy", "upstream_billing", "upstream_auth", "upstream_rate_limited", "model_not_available"}
)
"""Codes that the words of a failed job show, under any status of the relay."""

_CANCELLED = frozenset({"cancelled", "canceled"})
"""The job was ended on purpose: another one is not made, as at the other providers."""

_FAILED_WORD = re.compile(
    rb'"(?:status|task_status|state|taskStatus)"\s*:\s*"(?:fail|error|cancel|abort|reject|timeout)', re.IGNORECASE
)

_SUCCESS_CODES = frozenset({0, 200, 201, 202, "0", "200", "success", "ok", "", None})

_ACCEPTED = 202
"""The response may have only the address of the job: https://www.rfc-editor.org/rfc/rfc9110.html#name-202-accepted"""


class Acceptance(Struct, frozen=True):
    """An accepted job. address: as the upstream gave it, not checked. guess: the path below the base to try without."""

    id: str
    address: str
    guess: str
    expires_at: float | None
    retry_after_s: float | None


def parse_acceptance(status: int, headers: Mapping[str, str], body: bytes | bytearray) -> Acceptance | None:
    """Return the job that a call has begun; None if its response is something else, such as images or an error."""
    if not 200 <= status < 300 or len(body) > MAX_ACCEPTED_BYTES or (status != 202 and b"task" not in body):
        return None
    location = headers.get("Location", "") if status == _ACCEPTED else ""
    fields = load_object(body)
    if fields is None and location:
        fields = {}
    if fields is None:
        return None
    job = _job_object(fields)
    job_id = _job_id(fields, job, status) or _last_segment(location)
    phase = _phase(job)
    if not job_id or phase == "failed" or job.get("error") or fields.get("error"):
        return None
    lists = {name: fields[name] for name in ("data", "images") if isinstance(fields.get(name), list)}
    if _images(lists if phase == "running" else fields, 0):  # a running job's `url` is its own address
        return None
    of_task = fields.get("object") == "image.generation.task"
    address = next((text for name in _ADDRESS_NAMES if isinstance(text := job.get(name) or fields.get(name), str)), "")
    return Acceptance(
        job_id,
        address or headers.get("Location", ""),
        guess="images/tasks" if of_task else "tasks" if _named_id(fields, job) else "",
        expires_at=_number(job.get("expires_at") or fields.get("expires_at")),
        retry_after_s=_retry_after_s(headers),
    )


def parse_failure(status: int, body: bytes | bytearray, *, secret: str = "") -> UpstreamError | None:
    """Return the error of a call that is answered at once with a failed job; None if its response is something else."""
    if not 200 <= status < 300 or len(body) > MAX_ACCEPTED_BYTES or not _FAILED_WORD.search(body):
        return None
    fields = load_object(body)
    job = _job_object(fields) if fields else {}
    if fields is None or _phase(job) != "failed" or _images(fields, 0):
        return None
    return _failure(job, fields, secret).error


def poll_addresses(base: URL, submit: URL, job_id: str, address: str, guess: str = "tasks") -> tuple[URL, ...]:
    """Return where a job may be polled, the most likely address first; all have the base's host.

    An address on another host is not used, since the key would go there. One with the scheme `http` below a base with
    `https` is of a relay behind a proxy: it is requested with `https`.
    """
    name = quote(job_id, safe="")
    urls = [URL(f"{base}/tasks/{name}", encoded=True), URL(f"{base}/images/tasks/{name}", encoded=True)]
    if guess == "images/tasks":
        urls.reverse()
    urls.insert(0 if not guess else 2, URL(f"{submit}/{name}", encoded=True))
    if named_address := same_host(base, address):
        urls.insert(0, named_address)
    return tuple(dict.fromkeys(urls))


def parse_job(
    status: int, headers: Mapping[str, str], body: bytes | bytearray, *, secret: str = "", now_s: float | None = None
) -> JobState:
    """Read the response to a poll. Raises UpstreamError for a failed poll; the job's state is unclear then."""
    fields = load_object(body)
    is_accepted = fields is None and status == _ACCEPTED
    if is_accepted or status in (404, 410):
        return JobState("running" if is_accepted else "forgotten", retry_after_s=_retry_after_s(headers))
    if fields is None or not 200 <= status < 300:
        raise error_from_response(status, headers, body, secret=secret, now_s=now_s)
    job = _job_object(fields)
    phase = _phase(job)
    if not phase and (code := _envelope_status(fields)):
        return parse_job(code, headers, body, secret=secret, now_s=now_s)
    if phase == "failed" or (not phase and fields.get("error")):
        return _failure(job, fields, secret)
    if phase == "forgotten":
        return JobState("forgotten")
    images = () if phase == "running" else tuple(_images(fields, 0)[:MAX_IMAGES_READ])
    if phase == "done":
        images = images or search_images(body)
    if images or phase == "done":
        return JobState("done", reply=Reply(images, details=_details(job, fields)))
    unclear = status != _ACCEPTED and is_unknown(_word(job))
    return JobState("running", progress=_progress(job), retry_after_s=_retry_after_s(headers), unclear=unclear)


def _failure(job: dict[str, object], fields: dict[str, object], secret: str) -> JobState:
    """Return the state of a failed job; some services report a job that they do not find as a failed one.

    Refunds are documented for new-api (https://docs.newapi.pro/en/docs/guide/feature-guide/user/task) and others, but
    not for each relay.
    """
    faults = (where.get(name) for where in (job, fields) for name in _ERROR_NAMES)
    fault = next((fault for fault in faults if fault and str(fault).lower() not in _SUCCESS_CODES), None)
    if isinstance(fault, dict):
        message = str(fault.get("message") or "")
    else:
        message = fault if isinstance(fault, str) else "the job failed"
        fault = {"message": message, "code": job.get("code"), "type": job.get("error_type")}
    if _NOT_FOUND.search(message[:500]):
        return JobState("forgotten")
    body = orjson.dumps({"error": fault})
    status = _status_of(job, fields, fault)
    if status is None:
        error = error_from_response(400, {}, body, secret=secret)  # a rate limit may come with it too
        names_field = error.refused or error.max_count or fault.get("type") == "invalid_request_error"
        if error.code not in _DECIDED and not names_field:
            error = error_from_response(500, {}, body, secret=secret)
    else:
        error = error_from_response(status, {}, body, secret=secret)
    if _word(job).lower() in _CANCELLED and error.code not in _DECIDED:
        detail = "The provider's job was cancelled"
        error = UpstreamError("upstream_error", detail, upstream_detail=error.upstream_detail)
    error.refund_unsure = True
    return JobState("failed", error=error)


def _status_of(job: dict[str, object], fields: dict[str, object], fault: dict[str, object]) -> int | None:
    """Return the HTTP status that a failed job names for its error."""
    for value in (job.get("http_status"), job.get("status_code"), fields.get("http_status"), fault.get("code")):
        text = str(value)
        if re.fullmatch(r"[45][0-9]{2}", text):
            return int(text)
    return None


def _job_object(fields: dict[str, object]) -> dict[str, object]:
    """Return the object with the job's state: below an envelope's `data` or `output`, or the whole."""
    data = fields.get("data")
    inner = data[0] if isinstance(data, list) and data else data
    for value in (inner, fields.get("output")):
        if isinstance(value, dict) and (_word(value) or any(value.get(name) for name in _ID_NAMES)):
            return value
    return fields


def _word(job: Mapping[str, object]) -> str:
    for name in _STATUS_NAMES:
        value = job.get(name)
        if isinstance(value, str) and value:
            return value
    return ""


def _phase(job: Mapping[str, object]) -> str:
    """Return the phase that a job's status means; empty if it has none, `running` for an unknown word."""
    word = _word(job)
    return phase_of(word) if word else ""


def _named_id(fields: dict[str, object], job: dict[str, object]) -> object:
    return next((value for where in (job, fields) for name in _ID_NAMES if (value := where.get(name))), None)


def _job_id(fields: dict[str, object], job: dict[str, object], status: int) -> str:
    value = _named_id(fields, job)
    if value is None and (fields.get("object") == "image.generation.task" or (status == 202 and _word(job))):
        value = job.get("id") or fields.get("id")
    if isinstance(value, bool) or not isinstance(value, str | int):
        return ""
    text = str(value)
    return text if 0 < len(text) <= MAX_ID_CHARS and text.isprintable() and text.strip(".") else ""


def _last_segment(address: str) -> str:
    """Return the last segment of a job's address as its id; empty if that is no id."""
    try:
        name = URL(address).name
    except ValueError:
        return ""
    return name if 0 < len(name) <= MAX_ID_CHARS and name.isprintable() and name.strip(".") else ""


def _images(value: object, depth: int) -> list[GivenImage]:
    """Return the images of a result, from each place in which a service may put them."""
    if depth > MAX_DEPTH:
        return []
    if isinstance(value, list):
        return [image for entry in value[:MAX_IMAGES_READ] for image in _images(entry, depth + 1)]
    if isinstance(value, dict):
        return _images_of_object(value, depth)
    is_image = isinstance(value, str) and value[:5].lower() in ("http:", "https", "data:")
    return [image] if is_image and (image := parse_image(value)) else []


def _images_of_object(value: dict[str, object], depth: int) -> list[GivenImage]:
    if any(isinstance(value.get(name), str) for name in ("b64_json", "base64")) and (image := parse_image(value)):
        return [image]
    for name in _IMAGE_NAMES:
        if name in value and (images := _images(value[name], depth + 1)):
            return images
    return []


def _envelope_status(fields: dict[str, object]) -> int | None:
    """Return the status that the envelope of a relay names for an error that came with HTTP 200."""
    code = fields.get("code")
    if isinstance(code, bool) or not isinstance(code, str | int | None) or code in _SUCCESS_CODES:
        return None
    if _NOT_FOUND.search(str(fields.get("message") or fields.get("msg") or "")[:500]):
        return 404
    return int(text) if re.fullmatch(r"[45][0-9]{2}", text := str(code)) else 500


def _progress(job: dict[str, object]) -> float | None:
    """Return the progress; it comes as a number of percent, or as `"40%"`."""
    value = job.get("progress")
    if isinstance(value, str):
        value = _number(value.strip().removesuffix("%"))
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return min(max(value / 100, 0.0), 1.0)


def _details(job: dict[str, object], fields: dict[str, object]) -> ReplyDetails | None:
    result = job.get("result")
    inner = result if isinstance(result, dict) else {}
    return parse_details({**fields, **job, **inner, "cost": job.get("cost", fields.get("cost"))})


def _retry_after_s(headers: Mapping[str, str]) -> float | None:
    return _number(headers.get("Retry-After"))


def _number(value: object) -> float | None:
    if isinstance(value, bool):
        return None
    try:
        number = float(value) if isinstance(value, str | int | float) else -1.0
    except ValueError:
        return None
    return number if 0 <= number < 1e11 else None
