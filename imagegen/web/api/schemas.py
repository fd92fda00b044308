"""Types of the JSON responses of `/api`, which serializers build and the OpenAPI document shows.

Descriptions here are for the readers of that document.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from imagegen.tasks.image import CONTENT_TYPES
from imagegen.tasks.request import UPLOAD_PATTERN
from imagegen.tasks.task import State, WaitReason
from imagegen.tasks.webhook import DeliveryStatus

TASK_ERRORS = (
    "content_policy",
    "upstream_invalid_request",
    "upstream_auth",
    "upstream_billing",
    "upstream_rate_limited",
    "upstream_overloaded",
    "upstream_error",
    "upstream_timeout",
    "upstream_bad_response",
    "model_not_available",
    "interrupted",
    "internal_error",
)

TaskId = Annotated[str, Field(pattern="^[0-9a-f]{32}$", description="The MD5 of the canonical request.")]
Timestamp = Annotated[str, Field(description="RFC 3339, UTC.", json_schema_extra={"format": "date-time"})]
Link = Annotated[str, Field(json_schema_extra={"format": "uri"})]
Count = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(ge=0)]
Dollars = Annotated[float, Field(ge=0)]
Sequence = Annotated[int, Field(ge=0, description="Rises with each change of the task, over restarts too; not dense.")]
Position = Annotated[int, Field(ge=0, description="1 is next, null: not waiting; an estimate with several instances.")]
Eta = Annotated[float, Field(ge=0, description="Seconds left, from measured run times; null while there are too few.")]
Message = Annotated[str, Field(description="For people: Chinese, or English where `Accept-Language` prefers it.")]


class ImageView(TypedDict):
    """One image. If only the provider has the bytes, there are just `url`, `index` and `seed`."""

    url: Annotated[Link, Field(description="On this service, and absolute; with its `?v=` it may be cached.")]
    index: Annotated[Count, Field(description="Its place in the task, from 0.")]
    contentType: NotRequired[Annotated[str, Field(json_schema_extra={"enum": list(CONTENT_TYPES)})]]
    bytes: NotRequired[Count]
    width: NotRequired[Count]
    height: NotRequired[Count]
    sha256: NotRequired[Annotated[str, Field(pattern="^[0-9a-f]{64}$")]]
    expiresAt: NotRequired[Timestamp | None]
    seed: Annotated[int | None, Field(description="The seed that was sent for this image.")]
    stale: NotRequired[Annotated[Literal[True], Field(description="From before the fresh generation that now runs.")]]
    reused: NotRequired[
        Annotated[Literal[True], Field(description="Of this task before, or of one that differs only in `n`.")]
    ]


class CostView(TypedDict):
    """Money of a task, in dollars with at most 6 decimals."""

    currency: Literal["USD"]
    estimated: Annotated[Dollars | None, Field(description="Of the images that it generates, by the model table.")]
    charged: Annotated[
        Dollars | None,
        Field(
            description="Of the calls that were sent, also those that lost their answer; by the upstream's own figures "
            "where it gives them. Null until the task is finished, and where the price is unknown."
        ),
    ]
    saved: Annotated[Dollars, Field(description="What this submit saves by a hit or a join, or by images it reuses.")]


Cost = Annotated[CostView | None, Field(description="Null where the price is unknown.")]


class TaskErrorView(TypedDict):
    """Why no image came."""

    code: Annotated[str, Field(json_schema_extra={"enum": list(TASK_ERRORS)})]
    retryable: Annotated[bool, Field(description="Whether the same request may succeed later.")]


class DeliveryView(TypedDict):
    """How far the call of one webhook is; of its address, scheme and host are shown."""

    url: str
    status: DeliveryStatus
    attempts: Count
    lastStatus: Annotated[int | None, Field(description="Of the receiver's last answer; null if there was none.")]


class TaskView(TypedDict):
    """The current state of a task."""

    success: Literal[True]
    status: State
    taskId: TaskId
    sequence: Sequence
    progress: Annotated[int, Field(ge=0, le=100, description="Rises only when something happened, never by a timer.")]
    attempts: Count
    maxAttempts: Count
    model: str
    createdAt: Timestamp
    startedAt: Timestamp | None
    finishedAt: Timestamp | None
    cost: Cost
    message: NotRequired[Message]
    error: NotRequired[TaskErrorView]
    reason: NotRequired[Annotated[WaitReason | None, Field(description="Why an unfinished task waits.")]]
    retryAt: NotRequired[Timestamp | None]
    queuePosition: NotRequired[Position | None]
    etaSeconds: NotRequired[Eta | None]
    data: NotRequired[Annotated[list[ImageView], Field(description="The images that are ready, also before the end.")]]
    warnings: NotRequired[Annotated[list[str], Field(description="Changes to the request, and an end of its model.")]]
    cancelledUpstream: NotRequired[
        Annotated[bool, Field(description="Whether the provider confirmed the cancel, so that nothing is paid.")]
    ]
    left: NotRequired[Annotated[bool, Field(description="It goes on for its other clients.", examples=[True])]]
    usage: NotRequired[
        Annotated[dict[str, int | dict[str, int]], Field(description="Counts of all calls, by the upstream's names.")]
    ]
    possiblyBilledTwice: NotRequired[
        Annotated[Count, Field(description="Calls that may have been paid for without an image.")]
    ]
    webhook: NotRequired[list[DeliveryView]]
    channel: NotRequired[
        Annotated[str, Field(description="Channel of the last call, once a call was made.", examples=["together"])]
    ]


class FinishedView(TaskView):
    """The end of a task that a POST has waited for."""

    cached: bool


class NotFoundView(TypedDict):
    """A task that is unknown or expired."""

    success: Literal[False]
    status: Literal["not_found"]
    message: Message


class UploadView(TypedDict):
    """An input image that is kept for requests."""

    success: Literal[True]
    uploadId: Annotated[
        str,
        Field(
            pattern=f"^{UPLOAD_PATTERN}$",
            description="`upload:` and the SHA-256 of the image; the value of `imageUrl`, `referenceImages` or `mask`.",
        ),
    ]
    contentType: Annotated[str, Field(json_schema_extra={"enum": list(CONTENT_TYPES)})]
    bytes: Count
    width: Count
    height: Count
    expiresAt: Timestamp


class SubmittedView(TypedDict):
    """A request that was taken."""

    success: Literal[True]
    taskId: TaskId
    cached: Annotated[bool, Field(description="The same request was completed before: its result can be read now.")]
    message: Message
    status: State
    sequence: Sequence
    statusUrl: Link
    eventsUrl: Link
    cancelUrl: Annotated[Link, Field(description="Takes POST.")]
    queuePosition: Position | None
    etaSeconds: Eta | None
    cost: Cost
    coalesced: NotRequired[Annotated[Literal[True], Field(description="The same request runs already and was joined.")]]
    warnings: NotRequired[Annotated[list[str], Field(description="Changes to the request, and an end of its model.")]]


class FieldErrorView(TypedDict):
    """One error in a field of a request."""

    field: Annotated[str, Field(description="As the client spelled it.")]
    message: str


class ErrorView(TypedDict):
    """An answer that is an error. `code` never changes; `message` is for people."""

    success: Literal[False]
    statusCode: int
    code: str
    message: Message
    retryable: Annotated[bool, Field(description="Whether the same request may succeed later.")]
    requestId: Annotated[str, Field(description="The same as the header `X-Request-Id`.")]
    details: list[FieldErrorView]
    resetsAt: NotRequired[Annotated[Timestamp, Field(description="When the budget of the next day begins.")]]


class AcceptedEntry(SubmittedView):
    """An entry of a batch that was taken."""

    statusCode: Literal[200, 202]


class RefusedEntry(ErrorView):
    """An entry of a batch that was refused."""

    retryAfterSeconds: NotRequired[Count]


class BatchView(TypedDict):
    """The answer for each entry, in order."""

    success: Literal[True]
    results: list[AcceptedEntry | RefusedEntry]


class ListedTaskView(TaskView):
    """A task in the admin's list."""

    request: Annotated[
        Mapping[str, Any] | None, Field(description="The fields that it was submitted with; null if unknown.")
    ]
    key: Annotated[str | None, Field(description="Name of the API key that submitted it.")]


class TaskListView(TypedDict):
    """A page of tasks, newest first."""

    success: Literal[True]
    tasks: list[ListedTaskView]
    nextCursor: Annotated[str | None, Field(description="For the next page; null at the end.")]


class HealthView(TypedDict):
    """The service answers."""

    success: Literal[True]
    message: Literal["Service is healthy"]
    timestamp: Timestamp


class AliveView(TypedDict):
    """The process lives."""

    status: Literal["ok"]


class ReadyView(TypedDict):
    """Whether traffic should come."""

    status: Literal["ready", "not ready"]
    paused: NotRequired[Annotated[Literal[True], Field(description="The admin paused claiming: no task starts.")]]
    causes: NotRequired[list[str]]


class WebhookEvent(TypedDict):
    """The body that a webhook receives."""

    type: Literal["image.completed", "image.failed", "image.cancelled"]
    timestamp: Annotated[Timestamp, Field(description="When the task ended.")]
    data: TaskView


class InstanceStats(TypedDict):
    """This process, and the number of processes on the same queue."""

    name: str
    version: str
    uptimeSeconds: Seconds
    instances: Count
    loops: Mapping[str, Count]


class QueueStats(TypedDict):
    """The tasks that wait on all instances, and those that this instance holds."""

    depth: Count
    oldestAgeSeconds: Seconds
    limit: Count
    inFlight: Count
    retrying: Count
    loopsFree: Count
    waiters: Count
    pausedSince: Annotated[Timestamp | None, Field(description="Since when no instance starts a task; null: they do.")]


class TaskStats(TypedDict):
    """Counts by state; the ended ones since the start of this process."""

    pending: Count
    processing: Count
    completed: Count
    failed: Count
    cancelled: Count
    errors: Annotated[Mapping[str, Count], Field(description="Failed tasks by error code.")]
    takenOver: Count


class RateStats(TypedDict):
    """Over about the last minute."""

    windowSeconds: Seconds
    submitsPerMinute: Seconds
    finishedPerMinute: Seconds
    requestsPerMinute: Seconds
    redisCommandsPerMinute: Seconds


class BlockedStats(TypedDict):
    """Why the provider may not be called now, and until when."""

    reason: str
    until: Timestamp


class UpstreamStats(TypedDict):
    """The provider, its limits, and the calls by how they ended."""

    concurrency: Count
    ratePerMinute: float | None
    blocked: BlockedStats | None
    calls: Mapping[str, Count]
    ambiguous: Count


class RedisStats(TypedDict):
    """Commands, those inside of scripts too, by what they were for.

    server: name and version of the server program, null if unknown.
    maxmemoryPolicy: what Redis does when its memory is full, null if unknown; warning: why that loses tasks.
    """

    up: bool
    server: str | None
    maxmemoryPolicy: str | None
    warning: str | None
    commands: Mapping[str, Count]
    commandsTotal: Count
    monthProjected: Count
    vanished: Annotated[Count, Field(description="Records of tasks that Redis lost before their time.")]
    writtenBack: Annotated[
        Mapping[str, Count],
        Field(description="Waiting, running and finished tasks that were written back after Redis had lost them."),
    ]


class ImageStats(TypedDict):
    """Images of tasks that were completed here."""

    count: Count
    bytes: Count


class DeadLetterStats(TypedDict):
    """Entries that could not be read."""

    sinceStart: Count
    kept: Count


class HttpStats(TypedDict):
    """Requests that are open, and those answered by status."""

    open: Count
    byStatus: Mapping[str, Count]


class BudgetStats(TypedDict):
    """A budget of today, in US dollars."""

    key: Annotated[str | None, Field(description="Name of the key; null: all clients together.")]
    limit: Dollars
    used: Annotated[Dollars, Field(description="Reserved and charged.")]
    left: Dollars
    resetsAt: Timestamp


class StatsView(TypedDict):
    """Counters of the service. The queue is shared; all else is of the instance that responds."""

    success: Literal[True]
    timestamp: Timestamp
    instance: InstanceStats
    queue: QueueStats
    tasks: TaskStats
    submits: Mapping[str, Count]
    rates: RateStats
    upstream: UpstreamStats
    redis: RedisStats
    images: ImageStats
    deadLetters: DeadLetterStats
    budgets: Annotated[list[BudgetStats], Field(description="That of all clients first, then at most 100 of keys.")]
    http: HttpStats


class StepsView(TypedDict):
    """Steps of a model; null: not published."""

    default: Count | None
    max: Annotated[Count | None, Field(description="0: the model takes no steps.")]


class CapabilitiesView(TypedDict):
    """Published limits of a model; null: not published, and then not checked."""

    sizes: Annotated[list[str] | None, Field(description="The only sizes, as `1024x768`.")]
    maxPixels: Count | None
    multipleOf: Annotated[Count | None, Field(description="Of each side, in pixels.")]
    maxN: Annotated[Count | None, Field(description="Images of one call; a request of more is split.")]
    steps: StepsView
    seed: bool | None
    edit: Annotated[bool | None, Field(description="Whether it takes input images.")]
    maxInputImages: Count | None
    mask: bool | None
    transparent: Annotated[bool | None, Field(description="Whether the background may be transparent.")]
    qualities: list[str] | None
    promptMax: Annotated[Count | None, Field(description="Characters.")]


class ModelView(TypedDict):
    """A model that a request may name."""

    id: str
    provider: str
    channel: Annotated[str | None, Field(description="The preferred channel; null: none serves it here.")]
    capabilities: CapabilitiesView
    price: Annotated[dict[str, Any] | None, Field(description="Rules in dollars, and `certainty`; null: unknown.")]
    endsAt: Annotated[
        str | None, Field(description="First day without the model.", json_schema_extra={"format": "date"})
    ]
    successor: str | None


class ModelsView(TypedDict):
    """The models."""

    success: Literal[True]
    models: list[ModelView]
    defaultModel: Annotated[str, Field(description="The model of a request that names none.")]
