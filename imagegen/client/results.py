"""Values that the client returns: parsed responses of `/api`. A field of a newer service is ignored."""

from __future__ import annotations

from datetime import datetime

import msgspec
from msgspec import Struct

FINAL = frozenset({"completed", "failed", "cancelled"})


class TaskCost(Struct, frozen=True, rename="camel"):
    """Money of a task in US dollars. charged: None until the task is finished."""

    currency: str = "USD"
    estimated: float | None = None
    charged: float | None = None
    saved: float = 0.0


class TaskImage(Struct, frozen=True, rename="camel"):
    """One image of a task. Only `url` and `index` are sure: the provider may be the only holder of the bytes."""

    url: str
    index: int
    content_type: str | None = None
    size_bytes: int | None = msgspec.field(default=None, name="bytes")
    width: int | None = None
    height: int | None = None
    sha256: str | None = None
    seed: int | None = None
    expires_at: datetime | None = None
    stale: bool = False
    reused: bool = False


class TaskFault(Struct, frozen=True):
    """Cause of a failed task. retryable: the same request may succeed later."""

    code: str
    retryable: bool = False


class ImageTask(Struct, frozen=True, rename="camel"):
    """State of a task at one moment.

    status: `pending`, `processing`, `completed`, `failed` or `cancelled`.
    left: this client left the task, which goes on for others that joined it.
    """

    task_id: str
    status: str
    sequence: int = 0
    progress: int = 0
    attempts: int = 0
    max_attempts: int = 0
    model: str = ""
    channel: str | None = None
    created_at: datetime | None = None
    started_at: datetime | None = None
    finished_at: datetime | None = None
    cost: TaskCost | None = None
    message: str | None = None
    error: TaskFault | None = None
    reason: str | None = None
    retry_at: datetime | None = None
    queue_position: int | None = None
    eta_seconds: float | None = None
    images: tuple[TaskImage, ...] = msgspec.field(default=(), name="data")
    warnings: tuple[str, ...] = ()
    cancelled_upstream: bool | None = None
    possibly_billed_twice: int = 0
    left: bool = False

    @property
    def is_final(self) -> bool:
        """Whether the task is finished."""
        return self.status in FINAL


class SubmitReceipt(Struct, frozen=True, rename="camel"):
    """Response to a submit.

    cached: the same request was completed before. coalesced: an unfinished task of an earlier submit was joined.
    repeated: this call was sent more than once, so the earlier submit may be its own.
    """

    task_id: str
    cached: bool = False
    coalesced: bool = False
    status: str = "pending"
    sequence: int = 0
    queue_position: int | None = None
    eta_seconds: float | None = None
    cost: TaskCost | None = None
    warnings: tuple[str, ...] = ()
    message: str = ""
    status_url: str = ""
    events_url: str = ""
    cancel_url: str = ""
    repeated: bool = False


class UploadReceipt(Struct, frozen=True, rename="camel"):
    """An input image at the service. upload_id: the value of `image_url`, `reference_images` or `mask`."""

    upload_id: str
    content_type: str
    size_bytes: int = msgspec.field(name="bytes")
    width: int
    height: int
    expires_at: datetime


class TaskEvent(Struct, frozen=True):
    """Change of a task.

    name: `snapshot`, `status`, `progress`, `image`, `completed`, `failed` or `cancelled`.
    id: to resume after this event. task: None for `image`. image: only of `image`.
    """

    name: str
    id: str
    task: ImageTask | None = None
    image: TaskImage | None = None


class FieldFault(Struct, frozen=True):
    """A field of the request and the rule that it breaks."""

    field: str
    message: str
