"""Calls of `/api` as steps without I/O. None of them pays twice when it is repeated."""

from __future__ import annotations

import hashlib
import math
import uuid
from collections.abc import Callable, Mapping
from typing import Any, TypeVar
from urllib.parse import quote, urlencode

import msgspec
from msgspec.structs import replace

from imagegen.client.exceptions import DownloadBroken, RequestConflict, ResponseError, TaskUnsuccessful, WaitTimeout
from imagegen.client.exchange import PATIENT, HttpRequest, HttpResponse, Pause, RepeatPolicy, Steps, send
from imagegen.client.results import ImageTask, SubmitReceipt, TaskImage, UploadReceipt

_T = TypeVar("_T")

MAX_LONG_POLL_S = 60
SUBMIT_TIMEOUT_S = 60.0
UPLOAD_TIMEOUT_S = 120.0
DOWNLOAD_TIMEOUT_S = 60.0

_JSON = "application/json"
_MAGIC = ((b"\x89PNG\r\n\x1a\n", "image/png"), (b"\xff\xd8\xff", "image/jpeg"), (b"RIFF", "image/webp"))


def submit_steps(
    prompt: str, fields: Mapping[str, Any], policy: RepeatPolicy, *, key: str | None, fresh: bool
) -> Steps[SubmitReceipt]:
    """Submit a task. key: the Idempotency-Key; None: a new one. fresh: no image from before is returned.

    The same key goes with each repeat. Without it a repeat could begin the task again that the first try began, and
    that failed meanwhile.
    """
    headers = {"Content-Type": _JSON, "Idempotency-Key": uuid.uuid4().hex if key is None else key}
    if fresh:
        headers["Cache-Control"] = "no-cache"
    set_fields = {name: value for name, value in fields.items() if value is not None}
    body = msgspec.json.encode({"prompt": prompt, **set_fields})
    request = HttpRequest("POST", "/api/images/generate", headers, body, SUBMIT_TIMEOUT_S)
    response = yield from send(request, policy)
    return replace(_parse(response, SubmitReceipt), repeated=response.attempts > 1)


def get_steps(task_id: str, policy: RepeatPolicy) -> Steps[ImageTask]:
    """Read a task."""
    response = yield from send(HttpRequest("GET", task_path(task_id)), policy)
    return _parse(response, ImageTask)


def wait_steps(task_id: str, timeout_s: float | None, clock: Callable[[], float]) -> Steps[ImageTask]:
    """Wait until a task is finished. clock: monotonic seconds. Raises WaitTimeout."""
    ends_at = math.inf if timeout_s is None else clock() + timeout_s
    while True:
        began_at = clock()
        poll_s = min(max(math.ceil(min(ends_at - began_at, MAX_LONG_POLL_S)), 1), MAX_LONG_POLL_S)
        path = f"{task_path(task_id)}?{urlencode({'wait': poll_s})}"
        response = yield from send(HttpRequest("GET", path, timeout_s=poll_s + 30.0), PATIENT)
        task = _parse(response, ImageTask)
        if task.is_final:
            return task
        if clock() >= ends_at:
            raise WaitTimeout(task)
        if clock() - began_at < 1:  # the service is about to stop, or something in between does not wait
            yield Pause(1.0)


def cancel_steps(task_id: str, policy: RepeatPolicy) -> Steps[ImageTask]:
    """Cancel a task, or leave it if others joined it. Raises RequestConflict if it was finished before."""
    try:
        response = yield from send(HttpRequest("POST", f"{task_path(task_id)}/cancel"), policy)
    except RequestConflict as error:
        if error.attempts == 1:
            raise
        task = yield from get_steps(task_id, policy)
        if task.status != "cancelled":
            raise
        return task  # by an earlier try, which lost its answer
    return _parse(response, ImageTask)


def retry_steps(task_id: str, policy: RepeatPolicy) -> Steps[SubmitReceipt]:
    """Queue a failed or cancelled task again. It is not repeated after a lost answer, since it may pay again."""
    response = yield from send(HttpRequest("POST", f"{task_path(task_id)}/retry", is_repeatable=False), policy)
    return _parse(response, SubmitReceipt)


def upload_steps(data: bytes, policy: RepeatPolicy) -> Steps[UploadReceipt]:
    """Upload an input image; the same bytes are one upload."""
    headers = {"Content-Type": content_type_of(data)}
    response = yield from send(HttpRequest("POST", "/api/uploads", headers, data, UPLOAD_TIMEOUT_S), policy)
    return _parse(response, UploadReceipt)


def models_steps(policy: RepeatPolicy) -> Steps[list[dict[str, Any]]]:
    """Return the models with their capabilities and prices."""
    response = yield from send(HttpRequest("GET", "/api/models"), policy)
    return list(_parse(response, dict[str, Any])["models"])


def download_steps(image: TaskImage | str, policy: RepeatPolicy) -> Steps[bytes]:
    """Return the bytes of an image, or of a link, compared with its length and SHA-256. Raises DownloadBroken."""
    url = image if isinstance(image, str) else image.url
    for attempt in range(1, policy.max_attempts + 1):
        response = yield from send(HttpRequest("GET", url, {"Accept": "image/*"}, None, DOWNLOAD_TIMEOUT_S), policy)
        if isinstance(image, str) or _is_whole(image, response.body):
            return response.body
        if attempt < policy.max_attempts:
            yield Pause(policy.pause_s(attempt))
    raise DownloadBroken(f"the bytes of {url} are not those of the image")


def completed(task: ImageTask) -> ImageTask:
    """Return a completed task. Raises TaskUnsuccessful for another one."""
    if task.status != "completed":
        raise TaskUnsuccessful(task)
    return task


def task_path(task_id: str) -> str:
    """Return the path of a task."""
    return f"/api/images/{quote(task_id, safe='')}"


def content_type_of(data: bytes) -> str:
    """Return the content type of an image by its first bytes."""
    return next((kind for magic, kind in _MAGIC if data.startswith(magic)), "application/octet-stream")


def _is_whole(image: TaskImage, data: bytes) -> bool:
    if image.sha256 is not None:
        return hashlib.sha256(data).hexdigest() == image.sha256
    return image.size_bytes in (None, len(data))


def _parse(response: HttpResponse, kind: type[_T]) -> _T:
    try:
        return msgspec.json.decode(response.body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        message = "the response is not of this service; check the address, and proxies in between"
        raise ResponseError(response.status, "", message) from error
