"""The task and its states; the transitions between them are in transitions.py.

    pending ──▶ processing ──▶ completed
       │            ├────────▶ failed
       └────────────┴────────▶ cancelled

`pending` covers "in the queue" and "waiting before a retry"; a final task starts again only in a new
epoch, under the same id.
"""

from __future__ import annotations

import re
from enum import StrEnum

from msgspec import Struct

from imagegen.tasks.cost import Cost
from imagegen.tasks.image import StoredImage
from imagegen.tasks.reply_details import ReplyDetails
from imagegen.tasks.webhook import Delivery

TASK_ID = re.compile(r"[0-9a-f]{32}")

ATTEMPT_BLOCK = 1_000
FINAL_OFFSET = 1_000_000

SENT_PROGRESS = 10
STORED_PROGRESS = 95

IN_LINE = "line"
"""In place of an entry id: the task waits in the line of its client, outside of the stream."""


class State(StrEnum):
    """State of a task.

    PENDING: `submit` and `retry` put it here; a start takes it out.
    PROCESSING: an attempt runs; `start` puts it here; every outcome takes it out.
    COMPLETED, FAILED, CANCELLED: final; only a new submit (a new epoch) takes it out.
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
    """Reason why an unfinished task waits."""

    QUEUED = "queued"
    UPSTREAM_RATE_LIMITED = "upstream_rate_limited"
    UPSTREAM_OVERLOADED = "upstream_overloaded"
    RETRYING = "retrying"
    STORE_UNAVAILABLE = "store_unavailable"
    DRAINING = "draining"


class TaskError(Struct, frozen=True, gc=False):
    """Cause of a failed task: a code of docs/api.md, a text for people, and whether a new submit may help."""

    code: str
    detail: str
    retryable: bool


class Task(Struct, frozen=True, gc=False):
    """A task at one moment.

    A struct, since a dataclass of this size takes ten times as long to make and to change. No value in it can
    lead back to it, so the collector need not look at it.

    epoch: the sequence of the submit that it came from; a resubmission has a higher one.
    sequence: rises with each change. In one epoch: the submit, then a block of 1,000 for each start, then the
        final block a million above; the base is the submit time in microseconds, so that an id that expired and
        came again is always above what it was.
    request_json: the request's stored fields as JSON (see GenerationRequest.to_json).
    digest: of the canonical request; compared on every hit.
    times: Unix seconds; None while it has not happened.
    entry_id: of the stream entry that carries it while it is unfinished; empty if unknown, or IN_LINE.
    stale_images: how many of `images` are of the epoch before (see `Cache-Control: no-cache`).
    deliveries: to the webhooks of this epoch.
    details: of a completed task, as the upstream reported them.
    client: name of the key that submitted this epoch first, empty without keys.
    submitter: name of the client that did so, by its key or address; empty for a task of an earlier version.
    scope: name of the key that alone may see it; None if all may.
    cost: None for a task of an earlier version.
    cancelled_upstream: whether the provider confirmed the end of a cancelled task's job, so that it is not paid.
    sandbox: whether the sandbox is to draw it; stored while it is unfinished, None for a task of an earlier version.
    channel: name of the channel of its last call, empty before one.
    jobs: ids of its provider jobs, set at its end.
    begun_calls: paid calls before a release that count as lost if Redis has lost the checkpoint.
    counted_in: report of the ledger that counts its end (see imagegen.queue.end_marks).
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
    details: ReplyDetails | None = None
    client: str = ""
    scope: str | None = None
    cost: Cost | None = None
    counted_in: str = ""
    cancelled_upstream: bool = False
    sandbox: bool | None = None
    channel: str = ""
    submitter: str = ""
    jobs: tuple[str, ...] = ()
    begun_calls: int = 0


def pending_deliveries(task: Task) -> tuple[Delivery, ...]:
    """Return the deliveries of a finished task that are still to be made."""
    if not task.deliveries:
        return ()
    return tuple(
        delivery for delivery in task.deliveries if delivery.pending and delivery.webhook.subscribes_to(task.state)
    )


def missing_images_warning(count: int, wanted: int, why: str = "") -> str:
    """Return the warning of a task that is completed with fewer images than requested."""
    return f"only {count} of {wanted} images came" + (f": {why}" if why else "")


def image_progress(received: float, stored: int, wanted: int) -> int:
    """Return percent done: a received image counts two thirds, a stored one all; `received` may be a part."""
    span = STORED_PROGRESS - SENT_PROGRESS
    return SENT_PROGRESS + int(span * (received * 2 + stored) / (wanted * 3))
