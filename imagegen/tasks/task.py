"""Owns the task: its states, and the edges between them as pure functions side by side.

    pending ──▶ processing ──▶ completed
       │            ├────────▶ failed
       └────────────┴────────▶ cancelled

`pending` covers "in the queue" and "waiting before a retry"; a final task starts again only as a new
generation, under the same id.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

from msgspec import Struct
from msgspec.structs import replace

from imagegen.tasks.image import StoredImage
from imagegen.tasks.webhook import Delivery

ATTEMPT_BLOCK = 1_000
FINAL_OFFSET = 1_000_000

STARTED_PROGRESS = 5
SENT_PROGRESS = 10
STORED_PROGRESS = 95


class State(StrEnum):
    """Where a task is.

    PENDING: `submit` and `retry` put it here; a start takes it out.
    PROCESSING: an attempt runs; `start` puts it here; every outcome takes it out.
    COMPLETED, FAILED, CANCELLED: final; only a new submit (a new generation) takes it out.
    """

    PENDING = "pending"
    PROCESSING = "processing"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    is_final: bool

    def __init__(self, name: str) -> None:
        self.is_final = name not in ("pending", "processing")


class WaitReason(StrEnum):
    """Why an unfinished task waits."""

    QUEUED = "queued"
    UPSTREAM_RATE_LIMITED = "upstream_rate_limited"
    UPSTREAM_OVERLOADED = "upstream_overloaded"
    RETRYING = "retrying"
    STORE_UNAVAILABLE = "store_unavailable"
    DRAINING = "draining"


class TaskError(Struct, frozen=True, gc=False):
    """Why a task failed: a code of docs/api.md, a text for people, and whether asking again may help."""

    code: str
    detail: str
    retryable: bool


class Task(Struct, frozen=True, gc=False):
    """What is known of a task at one moment.

    A struct, since a dataclass of so many fields takes ten times as long to make and to change. No value in it can
    lead back to it, so the collector need not look at it.

    generation: the sequence of the submit that it came from; a resubmission has a higher one.
    sequence: rises with each change. In one generation: the submit, then a block of 1,000 for each start, then the
        final block a million above; the base is the submit time in microseconds, so that an id that expired and
        came again is always above what it was.
    request_json: the request's stored fields as JSON (see GenerationRequest.stored_json).
    digest: of the canonical request; compared on every hit.
    times: Unix seconds; None while it has not happened.
    entry_id: of the stream entry that carries it while it is unfinished; empty where that is not known.
    stale_images: how many of `images` are of the generation before (see `Cache-Control: no-cache`).
    deliveries: to the webhooks of this generation.
    """

    id: str
    epoch: int
    sequence: int
    digest: str
    model: str
    request_json: bytes
    created_at: float
    state: State = State.PENDING
    progress: int = 0
    attempts: int = 0
    started_at: float | None = None
    finished_at: float | None = None
    expires_at: float | None = None
    images: tuple[StoredImage, ...] = ()
    stale_images: bool = False
    error: TaskError | None = None
    warnings: tuple[str, ...] = ()
    possibly_billed_twice: int = 0
    reason: WaitReason | None = None
    retry_at: float | None = None
    entry_id: str = ""
    deliveries: tuple[Delivery, ...] = ()


def started(task: Task, *, attempts: int, starts: int, now: float) -> Task:
    """An attempt begins; `starts` counts every start of the generation, also those that were no attempt."""
    return replace(
        task,
        state=State.PROCESSING,
        sequence=max(task.epoch + starts * ATTEMPT_BLOCK, task.sequence + 1),
        progress=STARTED_PROGRESS,
        attempts=attempts,
        started_at=task.started_at or now,
        reason=None,
        retry_at=None,
    )


def progressed(task: Task, progress: int, images: Sequence[StoredImage] | None = None) -> Task:
    """Something happened: progress rises or a picture is ready. Never falls within an attempt."""
    return replace(
        task,
        sequence=task.sequence + 1,
        progress=max(task.progress, progress),
        images=task.images if images is None else tuple(images),
    )


def requeued(task: Task, *, reason: WaitReason, retry_at: float | None, attempts: int) -> Task:
    """The attempt brought nothing; the next one comes later."""
    return replace(
        task,
        state=State.PENDING,
        sequence=task.sequence + 1,
        progress=0,
        attempts=attempts,
        reason=reason,
        retry_at=retry_at,
    )


def stalled(task: Task, *, reason: WaitReason | None, retry_at: float | None) -> Task:
    """Return a running task that waits for something within its attempt; no reason: it goes on."""
    return replace(task, sequence=task.sequence + 1, reason=reason, retry_at=retry_at)


def completed(task: Task, images: Sequence[StoredImage], warnings: Sequence[str], *, now: float, ttl_s: float) -> Task:
    """All pictures that will come are kept."""
    return replace(
        _ended(task, State.COMPLETED, now, ttl_s),
        progress=100,
        images=tuple(images),
        stale_images=False,
        warnings=tuple(warnings),
    )


def failed(task: Task, error: TaskError, *, now: float, ttl_s: float) -> Task:
    """No picture will come."""
    return replace(_ended(task, State.FAILED, now, ttl_s), error=error)


def cancelled(task: Task, *, now: float, ttl_s: float) -> Task:
    """The client does not want it any more."""
    return _ended(task, State.CANCELLED, now, ttl_s)


def _ended(task: Task, state: State, now: float, ttl_s: float) -> Task:
    return replace(
        task,
        state=state,
        sequence=max(task.epoch + FINAL_OFFSET, task.sequence + 1),
        finished_at=now,
        expires_at=now + ttl_s,
        entry_id="",
        reason=None,
        retry_at=None,
    )


def pending_deliveries(task: Task) -> tuple[Delivery, ...]:
    """The deliveries that are still to be made of a finished task."""
    if not task.deliveries:
        return ()
    return tuple(one for one in task.deliveries if one.pending and one.webhook.subscribes_to(task.state))


def image_progress(received: float, stored: int, wanted: int) -> int:
    """Percent done: a picture that came weighs two thirds of its share, a kept one all; `received` may be a part."""
    span = STORED_PROGRESS - SENT_PROGRESS
    return SENT_PROGRESS + int(span * (received * 2 + stored) / (wanted * 3))
