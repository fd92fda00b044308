"""Routes of tasks, images and events, with their documentation."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from imagegen.errors import (
    AlreadyFinished,
    BudgetExceeded,
    Draining,
    IdempotencyMismatch,
    ImageExpired,
    ImageTooLarge,
    InvalidRequest,
    NotRetryable,
    QueueUnavailable,
    RateLimited,
    RouteNotFound,
    StoreUnavailable,
    TaskNotFound,
    Unauthorized,
    UnsupportedImage,
    UploadNotFound,
)
from imagegen.tasks.image import CONTENT_TYPES
from imagegen.tasks.task import State
from imagegen.tasks.validation import GenerationParams
from imagegen.tasks.webhook import WebhookFields
from imagegen.web.api import events, images, models, tasks
from imagegen.web.api.batch import MAX_ENTRIES, batch
from imagegen.web.api.schemas import (
    BatchView,
    FinishedView,
    ImageView,
    ModelsView,
    NotFoundView,
    SubmittedView,
    TaskListView,
    TaskView,
    UploadView,
)
from imagegen.web.api.tasks import DEFAULT_LIMIT, MAX_LIMIT
from imagegen.web.api.upload_routes import upload
from imagegen.web.openapi import parameters as named
from imagegen.web.openapi import samples
from imagegen.web.openapi.document import Body, EventStreamDoc, Operation, Parameter, ResponseDoc, Route

SUBMIT, FOLLOW, CHANGE, LOOK_UP, OPERATE = "Submit", "Follow", "Change", "Models", "Operate"

_TASK_HEADERS = ("ETag", "Cache-Control")
_SUBMIT_HEADERS = ("Location", "X-Cache", "Retry-After", "Preference-Applied")
_IMAGE_HEADERS = ("ETag", "Cache-Control", "Accept-Ranges", "Content-Disposition")
_TEXT = {"type": "string"}
_BYTES = {"type": "string", "format": "binary"}
_IMAGE_TYPES = (*CONTENT_TYPES, "application/octet-stream")
"""The last one is never sent: generators without image types read and send bytes by it."""
_EVENTS = ("snapshot", "status", "progress", "image", "completed", "failed", "cancelled")
_NOT_FOUND = ResponseDoc(404, "Unknown or expired.", NotFoundView, {"not_found": samples.NOT_FOUND})
_OWN_ID = {"taskId": "$response.body#/taskId"}
_LINKS = {
    "read": ("getTask", _OWN_ID),
    "follow": ("followTask", _OWN_ID),
    "cancel": ("cancelTask", _OWN_ID),
    "image": ("getImage", _OWN_ID | {"index": "0"}),
}


class GenerationBody(GenerationParams):
    """A request for images. `null` is the same as absent."""

    model: named.ModelField = ""
    webhook: Annotated[WebhookFields, Field(description="Receiver of the end of the task.")] | None = None
    max_cost_usd: named.MaxCostField | None = None


class BatchBody(BaseModel):
    """Many requests for images."""

    model_config = ConfigDict(extra="forbid")

    requests: Annotated[list[GenerationBody], Field(min_length=1, max_length=MAX_ENTRIES)]


GENERATE = Operation(
    "post",
    "/api/images/generate",
    "generate",
    SUBMIT,
    "Submit a request for images",
    "Responds immediately with the id of a task; with `Prefer: wait=N` when it is finished.\n\n"
    "`taskId` is the MD5 of the canonical request: defaults filled in, aliases resolved, keys sorted, `null` as absent,"
    ' `512`, `512.0` and `"512"` one number. So the same request is the same task: while it is unfinished it '
    "is joined and paid for once (`coalesced`), when it is completed its result is there already (`cached`), and when "
    "it failed or was cancelled it is queued again under the same id. Images of a completed request that differs only "
    "in `n` are used too (`reused`): only missing ones are generated.\n\n"
    "snake_case spellings of the fields are accepted too; both spellings of one field and unknown fields are refused. "
    "The prompt is trimmed at its ends, and a carriage return in it is a newline. A body has at most 1 MiB, 10,000 "
    "values and 32 levels; `data:` URIs of images in it do not count, and become uploads.",
    (
        ResponseDoc(
            202,
            "A new task, or an unfinished task that was joined.",
            SubmittedView,
            {"new": samples.NEW, "joined": samples.JOINED},
            _SUBMIT_HEADERS,
            links=_LINKS,
        ),
        ResponseDoc(
            200,
            "Completed before; or, after a wait, the finished task, as GET of the task shows it.",
            SubmittedView | FinishedView,
            {"hit": samples.HIT, "ended": samples.ENDED},
            (*_SUBMIT_HEADERS, *_TASK_HEADERS),
            links=_LINKS,
        ),
    ),
    (named.WAIT, named.PREFER, named.IDEMPOTENCY_KEY, named.CACHE_CONTROL, named.LANGUAGE),
    Body(
        GenerationBody,
        {
            "plain": samples.REQUEST,
            "with a webhook": samples.REQUEST_WITH_WEBHOOK,
            "with options": samples.REQUEST_WITH_OPTIONS,
        },
    ),
    (*named.SUBMIT_ERRORS, *named.MONEY_ERRORS, *named.INPUT_ERRORS, IdempotencyMismatch),
    limit="generation",
)

BATCH = Operation(
    "post",
    "/api/images/batch",
    "generateBatch",
    SUBMIT,
    "Submit many requests at once",
    f"1 to {MAX_ENTRIES} requests; each has its own response with its `statusCode`, in order, and a bad one does not "
    "affect the others. The call counts once against the general limit, each entry against that for generations: "
    "those over it get their own 429. An `Idempotency-Key` holds for each entry by its place.",
    (
        ResponseDoc(
            200,
            "An answer for each entry.",
            BatchView,
            {"one taken, one refused": samples.BATCH},
        ),
    ),
    (named.IDEMPOTENCY_KEY, named.CACHE_CONTROL, named.LANGUAGE),
    Body(BatchBody, {"two": {"requests": [samples.REQUEST, {"prompt": "the same in spring"}]}}),
    (Draining, StoreUnavailable),
    limit="entries",
)


UPLOAD = Operation(
    "post",
    "/api/uploads",
    "upload",
    SUBMIT,
    "Upload an input image",
    "A PNG, JPEG or WebP, recognised by its content: the body itself, or the field `file` of a form. It is whole, and "
    "has at most `UPLOAD_MAX_BYTES` (20 MiB) and 50 megapixels. `uploadId` goes into `imageUrl`, `referenceImages` or "
    "`mask`. The same bytes are the same upload, which then lives longer. An upload lives `UPLOAD_TTL` (a day), and "
    "until all tasks that were submitted with it have ended.",
    (
        ResponseDoc(201, "A new upload.", UploadView, {"new": samples.UPLOAD}),
        ResponseDoc(200, "The same bytes were uploaded before.", UploadView, {"again": samples.UPLOAD}),
    ),
    (named.LANGUAGE,),
    Body(
        None,
        others={
            "multipart/form-data": {"type": "object", "required": ["file"], "properties": {"file": named.FILE_BYTES}},
            **dict.fromkeys(_IMAGE_TYPES, named.FILE_BYTES),
        },
    ),
    (ImageTooLarge, UnsupportedImage, QueueUnavailable, Draining, StoreUnavailable),
    limit="general",
)

READ = Operation(
    "get",
    "/api/images/{taskId}",
    "getTask",
    FOLLOW,
    "Read a task, or wait for its end",
    "While a task is unfinished, `Retry-After` has the seconds until the next request; `wait` is better, an event "
    "stream best. `sequence` rises with each change and never falls for an id, so a lower one is older. `progress` "
    "rises only when something happened (claimed, sent, each image received, stored), never by a timer.",
    (
        ResponseDoc(
            200,
            "The current task. A failed or cancelled task is a 200 too.",
            TaskView,
            {state.value: view for state, view in samples.TASKS.items()},
            (*_TASK_HEADERS, "Retry-After", "Preference-Applied"),
        ),
        ResponseDoc(304, "Nothing changed.", headers=("ETag", "Cache-Control", "Retry-After", "Preference-Applied")),
        _NOT_FOUND,
    ),
    (named.TASK, named.WAIT, named.PREFER, named.IF_NONE_MATCH, named.LANGUAGE),
    errors=(InvalidRequest, QueueUnavailable),
    limit="general",
)

FOLLOW_ONE = Operation(
    "get",
    "/api/images/{taskId}/events",
    "followTask",
    FOLLOW,
    "Follow a task by server-sent events",
    "`snapshot` first, then `status`, `progress`, `image`, and last `completed`, `failed` or `cancelled`, and then "
    "the stream ends. `data` is what GET of the task answers; in `image` it is that image's entry. `id` is the "
    "sequence. A comment comes every 15 s. A stream ends after about 15 minutes: the client reconnects.",
    (
        ResponseDoc(
            200,
            "The events.",
            headers=("Cache-Control",),
            events=EventStreamDoc(_EVENTS, TaskView | ImageView, samples.EVENTS),
        ),
        ResponseDoc(204, "`Last-Event-ID` is that of the end: there is nothing more, so a browser stops reconnecting."),
        _NOT_FOUND,
    ),
    (named.TASK, named.EXPIRY, named.SIGNATURE, named.LAST_EVENT_ID, named.LANGUAGE),
    errors=(QueueUnavailable,),
    limit="general",
    needs="link",
)

FOLLOW_MANY = Operation(
    "get",
    "/api/events",
    "followTasks",
    FOLLOW,
    "Follow several tasks in one stream",
    "The events of several tasks: each `data` has its `taskId`, each `id` is `task:sequence`. The stream ends "
    "when all are finished; an unknown task has one event. 404 if all are unknown.",
    (
        ResponseDoc(
            200,
            "The events.",
            headers=("Cache-Control",),
            events=EventStreamDoc(_EVENTS, TaskView | ImageView | NotFoundView, samples.MANY_EVENTS),
        ),
        ResponseDoc(204, "`Last-Event-ID` shows that the client has the last event of each."),
        _NOT_FOUND,
    ),
    (named.TASKS, named.EXPIRY, named.SIGNATURE, named.LAST_EVENT_ID, named.LANGUAGE),
    errors=(InvalidRequest, QueueUnavailable),
    limit="general",
    needs="link",
)

IMAGE = Operation(
    "get",
    "/api/images/{taskId}/{index}",
    "getImage",
    FOLLOW,
    "Get the bytes of an image",
    "Take the `url` from `data`: with its `?v=` an image may be cached as long as it lives. Images count against no "
    "limit, but a request for a missing image counts against the general limit (`RATE_LIMIT_MAX`). `&size=256` behind "
    "it requests a thumbnail, which is made once, kept with the image, and cached alike; a `Range` is ignored then.",
    (
        ResponseDoc(200, "The image, or its thumbnail.", _BYTES, headers=_IMAGE_HEADERS, media=_IMAGE_TYPES),
        ResponseDoc(206, "A part of it.", _BYTES, headers=(*_IMAGE_HEADERS, "Content-Range"), media=_IMAGE_TYPES),
        ResponseDoc(302, "Only the provider keeps it, there (`IMAGE_STORE=upstream`).", headers=("Location",)),
        ResponseDoc(304, "The client has this version.", headers=_IMAGE_HEADERS),
        ResponseDoc(412, "It is no version of `If-Match`.", headers=_IMAGE_HEADERS),
        ResponseDoc(416, "It has no such bytes.", headers=(*_IMAGE_HEADERS, "Content-Range")),
    ),
    (
        named.TASK,
        named.INDEX,
        named.VERSION,
        named.SIZE,
        named.EXPIRY,
        named.SIGNATURE,
        named.IF_NONE_MATCH,
        named.IF_MATCH,
        named.RANGE,
        named.IF_RANGE,
        named.LANGUAGE,
    ),
    errors=(
        InvalidRequest,
        TaskNotFound,
        RouteNotFound,
        ImageExpired,
        UnsupportedImage,
        RateLimited,
        StoreUnavailable,
        QueueUnavailable,
    ),
    limit="misses",
    needs="link",
)


_CANCELS = {
    "cancelled": samples.TASKS[State.CANCELLED],
    "left": {**samples.TASKS[State.PROCESSING], "left": True},
}


def _cancel(method: str, path: str, name: str) -> Operation:
    return Operation(
        method,
        path,
        name,
        CHANGE,
        "Cancel a task",
        "A pending task is never sent; of a processing one the call is dropped. **While others joined it too, a client "
        "(API key, else address) leaves it**: `left` is true, and it goes on. Its webhooks count as one more, which "
        "leave by its next cancel; the last client's cancel ends the task with its own. A provider that began a job "
        "is requested to end it: `cancelledUpstream` is true if it confirmed that. Else the call may have been paid.",
        (
            ResponseDoc(200, "Cancelled, or left.", TaskView, _CANCELS, _TASK_HEADERS),
            _NOT_FOUND,
        ),
        (named.TASK, named.FORCE, named.LANGUAGE),
        errors=(AlreadyFinished, InvalidRequest, QueueUnavailable, Unauthorized),
        limit="general",
    )


CANCEL = _cancel("post", "/api/images/{taskId}/cancel", "cancelTask")
DELETE = _cancel("delete", "/api/images/{taskId}", "deleteTask")

RETRY = Operation(
    "post",
    "/api/images/{taskId}/retry",
    "retryTask",
    CHANGE,
    "Try a failed or cancelled task again",
    "It is queued again under the same id, its attempts from zero. Only the webhooks of the requesting client are "
    "called at its end.",
    (
        ResponseDoc(202, "Queued.", SubmittedView, {"queued": samples.NEW}, _SUBMIT_HEADERS, links=_LINKS),
        ResponseDoc(
            200,
            "Completed with images of a task that differs only in `n`.",
            SubmittedView,
            {"hit": samples.HIT},
            _SUBMIT_HEADERS,
            links=_LINKS,
        ),
        _NOT_FOUND,
    ),
    (named.TASK, named.LANGUAGE),
    errors=(NotRetryable, UploadNotFound, *named.SUBMIT_ERRORS, BudgetExceeded),
    limit="generation",
)

LIST = Operation(
    "get",
    "/api/images",
    "listTasks",
    OPERATE,
    "List the tasks, newest first",
    "For the operator: it reads every record.",
    (
        ResponseDoc(
            200,
            "A page.",
            TaskListView,
            {"one": {"success": True, "tasks": [samples.LISTED], "nextCursor": None}},
        ),
    ),
    (
        Parameter(
            "status", "query", "Only tasks in this state.", {"type": "string", "enum": [*State]}, example="failed"
        ),
        Parameter(
            "cursor",
            "query",
            "The `nextCursor` of the page before.",
            _TEXT | {"pattern": "^(0|[1-9][0-9]{0,17})-[0-9a-f]{32}$"},
            example=f"1767225600000000-{samples.TASK_ID}",
        ),
        Parameter(
            "limit",
            "query",
            "Tasks on a page.",
            {"type": "integer", "minimum": 1, "maximum": MAX_LIMIT, "default": DEFAULT_LIMIT},
            example=DEFAULT_LIMIT,
        ),
        named.LANGUAGE,
    ),
    errors=(InvalidRequest, QueueUnavailable),
    limit="general",
    needs="admin",
)

MODELS = Operation(
    "get",
    "/api/models",
    "listModelCapabilities",
    LOOK_UP,
    "List the models with their limits and prices",
    "The default model, image models of the provider's list, those of the model table, aliases and fallbacks. "
    "A value that a model's limits exclude is a 400 at the submit and costs nothing; the error names the nearest "
    "allowed value. What is not published is null. A task with a model that ends within 30 days has a warning.",
    (ResponseDoc(200, "The models.", ModelsView, {"one": samples.MODELS}),),
    (named.LANGUAGE,),
    limit="general",
)

ROUTES: tuple[Route, ...] = (
    (GENERATE, tasks.generate),
    (BATCH, batch),
    (UPLOAD, upload),
    (READ, tasks.get_task),
    (FOLLOW_ONE, events.task_events),
    (FOLLOW_MANY, events.multi_task_events),
    (IMAGE, images.get_image),
    (CANCEL, tasks.cancel),
    (DELETE, tasks.cancel),
    (RETRY, tasks.retry),
    (LIST, tasks.list_tasks),
    (MODELS, models.models),
)
