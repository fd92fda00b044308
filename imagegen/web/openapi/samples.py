"""Examples of the OpenAPI document: one task in all its states, made by the serializers of real responses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson
from msgspec.structs import replace

from imagegen.channels_file import Channel
from imagegen.errors import ApiError, FieldError, InvalidJson, InvalidRequest
from imagegen.images.upload_records import UploadRecord
from imagegen.images.uploads import Upload
from imagegen.providers.model_table import load_table
from imagegen.queue.client_queue import CacheResult, SubmitResult
from imagegen.queue.eta import QueuePosition
from imagegen.tasks import validation as fields
from imagegen.tasks.image import StoredImage
from imagegen.tasks.submission import TaskIdentity
from imagegen.tasks.task import State, Task, TaskError, WaitReason
from imagegen.tasks.transitions import cancelled, completed, failed, progressed, started
from imagegen.tasks.webhook import Webhook, after_attempt, event_body, initial_deliveries
from imagegen.web.api.models import model_view
from imagegen.web.api.schemas import TaskView
from imagegen.web.api.serializers import TaskLinks, not_found_view, submitted_view, task_view
from imagegen.web.api.upload_routes import upload_view
from imagegen.web.http.error_responses import error_view
from imagegen.web.model_list import ListedModel
from imagegen.web.openai.error_responses import error_fields
from imagegen.web.openai.models import entry_of
from imagegen.web.openai.stream import COMPLETED, EDITED

MODEL = "black-forest-labs/FLUX.1-schnell"
REQUEST = {"prompt": "a lighthouse in a storm", "width": 512, "height": 512, "outputFormat": "png"}
REQUEST_WITH_WEBHOOK = REQUEST | {"n": 2, "seed": 7, "webhook": {"url": "https://example.com/hooks/images"}}
REQUEST_WITH_OPTIONS = {
    "prompt": "a lighthouse in a storm",
    "aspectRatio": "16:9",
    "quality": "high",
    "background": "opaque",
    "outputCompression": 80,
    "extra": {"watermark": False},
}
OPENAI_REQUEST = {"model": MODEL, "prompt": "a lighthouse in a storm", "size": "1024x1024", "response_format": "url"}
EDIT_REQUEST = {
    "model": "black-forest-labs/FLUX.1-kontext-pro",
    "prompt": "make it night",
    "images": [{"image_url": "https://example.com/lighthouse.png"}],
}

_BASE = "https://images.example.com"
_LINKS = TaskLinks(_BASE)
_REQUEST_ID = "5d1f0c6ab2e94c37"
_AT = 1_767_225_600.0
_SHA256 = "3c1e0a7d5b2f49688d7e6c5b4a39281706f5e4d3c2b1a0998877665544332211"

_submission = TaskIdentity("together", MODEL, {}, None).submission(
    fields.parse(REQUEST, default_model=MODEL, aliases={}), None
)
TASK_ID = _submission.task_id

_new = Task(
    TASK_ID,
    epoch=int(_AT * 1e6),
    sequence=int(_AT * 1e6),
    digest=_submission.digest,
    model=MODEL,
    request_json=b"",
    created_at=_AT,
)
_waiting = replace(_new, reason=WaitReason.QUEUED)
_running = progressed(started(_waiting, attempts=1, starts=1, now=_AT + 1.2), 70)
_image = StoredImage(0, "image/png", size_bytes=401_223, width=512, height=512, sha256=_SHA256)
_done = completed(_running, [_image], [], now=_AT + 4.5, ttl_s=86_400)
_lost = TaskError("upstream_timeout", "the provider did not answer in time", retryable=True)
_failed = failed(_running, _lost, now=_AT + 121, ttl_s=86_400)
_cancelled = cancelled(_running, now=_AT + 2, ttl_s=86_400)
_NOWHERE, _THIRD = QueuePosition(), QueuePosition(3, 4.2)
_hook = Webhook("https://example.com/hooks/images", _BASE)
_published = replace(
    _done,
    deliveries=tuple(
        after_attempt(delivery, 204, None, now=_AT, random=lambda: 0.0) for delivery in initial_deliveries([_hook])
    ),
)


def _view(task: Task, place: QueuePosition = _NOWHERE) -> TaskView:
    return task_view(task, _LINKS.image, language="zh", max_attempts=3, place=place)


TASKS: Mapping[State, Any] = {
    State.COMPLETED: _view(_published),
    State.PROCESSING: _view(_running, QueuePosition(None, 3.1)),
    State.PENDING: _view(_waiting, _THIRD),
    State.FAILED: _view(_failed),
    State.CANCELLED: _view(_cancelled),
}
NOT_FOUND = not_found_view("zh")

NEW = submitted_view(SubmitResult(_waiting, CacheResult.MISS), _THIRD, _LINKS, "zh")
JOINED = submitted_view(SubmitResult(_running, CacheResult.COALESCED), QueuePosition(None, 3.1), _LINKS, "zh")
UPLOAD = upload_view(Upload.of(UploadRecord(_image, _AT + 86_400)))
HIT = submitted_view(SubmitResult(_done, CacheResult.HIT), _NOWHERE, _LINKS, "zh")
ENDED = {**TASKS[State.COMPLETED], "cached": False}
LISTED = {**TASKS[State.COMPLETED], "request": REQUEST | {"model": MODEL, "n": 1}, "key": "web"}


def _event(event: str, event_id: str, view: Any) -> Mapping[str, str]:
    return {"event": event, "id": event_id, "data": orjson.dumps(view).decode()}


EVENTS = {
    "first": _event("snapshot", str(_running.sequence), TASKS[State.PROCESSING]),
    "last": _event("completed", str(_done.sequence), _view(_done)),
}
MANY_EVENTS = {"a latecomer's first": _event("snapshot", f"{TASK_ID}:{_done.sequence}", _view(_done))}


def _image_event(name: str) -> dict[str, str]:
    data = f'{{"type":"{name}","b64_json":"iVBORw0KGgo…","created_at":{int(_AT)},"size":"1024x1024"}}'
    return {"event": name, "data": data}


IMAGE_EVENTS = {"an image": _image_event(COMPLETED)}
EDIT_EVENTS = {"an image": _image_event(EDITED)}

IMAGES = {
    "id": TASK_ID,
    "object": "list",
    "created": int(_AT),
    "model": MODEL,
    "data": [{"index": 0, "type": "url", "url": _LINKS.image(_done, _image)}],
}
ACCEPTED = {
    "id": TASK_ID,
    "object": "image.task",
    "created": int(_AT),
    "model": MODEL,
    "status": "pending",
    "status_url": f"{_BASE}/api/images/{TASK_ID}",
    "events_url": f"{_BASE}/api/images/{TASK_ID}/events",
    "cancel_url": f"{_BASE}/api/images/{TASK_ID}/cancel",
}
ASYNC_TASK: dict[str, Any] = {
    "id": TASK_ID,
    "task_id": TASK_ID,
    "object": "image.generation.task",
    "status": "processing",
    "created_at": int(_AT),
    "expires_at": int(_AT) + 86_400,
    "poll_url": f"{_BASE}/v1/images/tasks/{TASK_ID}",
}
_url = _LINKS.image(_done, _image)
ASYNC_TASK_COMPLETED = ASYNC_TASK | {
    "status": "completed",
    "http_status": 200,
    "image_url": _url,
    "result": {"created": int(_AT), "data": [{"url": _url}]},
}
_listed = ListedModel(MODEL, None, load_table("together").find(MODEL), ended=False)
_channel = Channel("together", "together")
MODELS = {"success": True, "models": [model_view(_listed, _channel, "together")], "defaultModel": _listed.id}
MODEL_ENTRY = entry_of(_listed)


def hook_event(state: State) -> Any:
    """Return the body of a webhook."""
    task = {State.COMPLETED: _done, State.FAILED: _failed, State.CANCELLED: _cancelled}[state]
    return orjson.loads(event_body(state, task.finished_at or _AT, {**_view(task)}))


def error(kind: type[ApiError], envelope: str) -> Any:
    """Return an answer that is this error."""
    sample = _sample(kind)
    if envelope == "openai":
        fault = sample.details[0] if sample.details else None
        text = f"{fault.field}: {fault.message}" if fault else sample.message("en")
        return {"error": error_fields(sample.status, text, sample.code, fault.field if fault else None)}
    return error_view(sample, _REQUEST_ID, "en")


def failure(status: int, code: str) -> Any:
    """Return a `/v1` response for a task that failed or is unfinished."""
    return {"error": error_fields(status, "Why there is no image", code, None)}


def error_text(kind: type[ApiError]) -> str:
    """Return the English text of an error."""
    return _sample(kind).message("en")


_VALUES: dict[str, Any] = {
    "limit": 2**20,
    "model": "new-model",
    "resets_at": "2026-11-30T00:00:00.000Z",
    "allowed": "GET, HEAD",
    "estimated": "0.04",
    "max_usd": "0.01",
}


def _sample(kind: type[ApiError]) -> ApiError:
    if kind is InvalidRequest:
        return kind(details=[FieldError("width", "must be a multiple of 8")])
    return kind(reason="it can't be parsed") if kind is InvalidJson else kind(**_VALUES)


BATCH = {
    "success": True,
    "results": [NEW | {"statusCode": 202}, error(InvalidRequest, "api")],
}

STATS = {
    "success": True,
    "timestamp": "2026-01-01T00:10:00.000Z",
    "instance": {
        "name": "web-1-4f21-9c0a17",
        "version": "0.5.0",
        "uptimeSeconds": 601.5,
        "instances": 2,
        "loops": {"loop": 10, "reader": 1, "renewal": 1, "takeover": 1},
    },
    "queue": {
        "depth": 12,
        "oldestAgeSeconds": 3.4,
        "limit": 10_000,
        "inFlight": 5,
        "retrying": 1,
        "loopsFree": 0,
        "waiters": 3,
        "pausedSince": None,
    },
    "tasks": {
        "pending": 12,
        "processing": 5,
        "completed": 240,
        "failed": 2,
        "cancelled": 1,
        "errors": {"content_policy": 2},
        "takenOver": 0,
    },
    "submits": {"miss": 260, "coalesced": 14, "hit": 91, "refresh": 1, "full": 0, "over_budget": 0},
    "rates": {
        "windowSeconds": 60.0,
        "submitsPerMinute": 31.0,
        "finishedPerMinute": 29.0,
        "requestsPerMinute": 120.5,
        "redisCommandsPerMinute": 262.0,
    },
    "upstream": {
        "concurrency": 5,
        "ratePerMinute": 60.0,
        "blocked": None,
        "calls": {"ok": 240, "content_policy": 2},
        "ambiguous": 0,
    },
    "redis": {
        "up": True,
        "server": "redis 7.4.2",
        "maxmemoryPolicy": "noeviction",
        "warning": None,
        "commands": {"submit": 520, "claim": 480, "finish": 486, "read": 12},
        "commandsTotal": 1_498,
        "monthProjected": 6_471_000,
        "vanished": 0,
        "writtenBack": {"waiting": 0, "running": 0, "finished": 0},
    },
    "images": {"count": 240, "bytes": 96_293_520},
    "deadLetters": {"sinceStart": 0, "kept": 0},
    "budgets": [{"key": None, "limit": 20.0, "used": 3.2, "left": 16.8, "resetsAt": "2026-01-02T00:00:00.000Z"}],
    "http": {"open": 4, "byStatus": {"200": 1_032, "202": 260, "429": 3}},
}
