"""Types of the responses of the board's routes, and the rows of its tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import msgspec
from msgspec import Struct
from pydantic import Field
from typing_extensions import TypedDict

from imagegen.formats import rfc3339
from imagegen.queue.unfinished import UnfinishedTask
from imagegen.tasks.task import State, WaitReason
from imagegen.web.api.schemas import (
    BudgetStats,
    Count,
    Dollars,
    QueueStats,
    Seconds,
    Sequence,
    TaskId,
    Timestamp,
    UpstreamStats,
)

SHOWN_PROMPT_CHARS = 300


class PauseView(TypedDict):
    """Whether claiming is paused on all instances."""

    success: Literal[True]
    paused: bool
    since: Timestamp | None


class BoardTaskView(TypedDict):
    """A task of the board. Fields that the instance lacks of another's task are null."""

    taskId: TaskId
    sequence: Sequence
    status: State
    prompt: Annotated[str | None, Field(description=f"At most its first {SHOWN_PROMPT_CHARS} characters.")]
    model: str
    key: Annotated[str | None, Field(description="Name of the API key that submitted it.")]
    instance: Annotated[str | None, Field(description="The instance that has claimed it.")]
    progress: Count
    attempts: Count
    maxAttempts: Count
    images: Count
    reason: Annotated[WaitReason | None, Field(description="Why it waits.")]
    retryAt: Timestamp | None
    error: Annotated[str | None, Field(description="Code of the failure.")]
    errorDetail: str | None
    createdAt: Timestamp
    startedAt: Timestamp | None
    finishedAt: Timestamp | None


class BoardInstanceView(TypedDict):
    """The instance that responds, and the others on its queue."""

    name: str
    version: str
    uptimeSeconds: Seconds
    alive: Annotated[list[str], Field(description="Names of all instances, this one first.")]
    loops: Annotated[Count, Field(description="Loops here that run tasks; with none no task starts here.")]
    slots: Count
    draining: bool
    storeWritable: bool
    providerKeyAccepted: bool


class BoardRedisView(TypedDict):
    """Redis commands, those inside of scripts too."""

    up: bool
    server: str | None
    commandsPerMinute: Annotated[Seconds, Field(description="Of this instance, over about the last minute.")]
    monthPlan: Annotated[Count, Field(description="Commands a month of the smallest plan that bills them.")]


class SpanView(TypedDict):
    """Median and 95th percentile in seconds, null without values."""

    p50: Seconds | None
    p95: Seconds | None


class TodayView(TypedDict):
    """The usage report of this UTC day so far, of all instances; at most a minute old."""

    completed: Count
    failed: Count
    cancelled: Count
    images: Count
    spent: Dollars
    savedByCache: Dollars
    savedByCoalescing: Dollars


class BoardView(TypedDict):
    """State of the service at this moment."""

    success: Literal[True]
    timestamp: Timestamp
    instance: BoardInstanceView
    queue: QueueStats
    waitSeconds: Annotated[SpanView, Field(description="From a submit to its first attempt; the last minutes, here.")]
    runSeconds: Annotated[SpanView, Field(description="Of attempts; the last minutes, on this instance.")]
    today: TodayView
    budgets: list[BudgetStats]
    upstream: UpstreamStats
    redis: BoardRedisView
    tasks: Annotated[list[BoardTaskView], Field(description="Those that run, wait, or ended here just now.")]


class MinuteView(TypedDict):
    """All instances together in one minute, which begins at `at` (Unix seconds)."""

    at: Count
    depth: Annotated[Count, Field(description="Most tasks that waited.")]
    oldestAgeSeconds: Seconds
    inFlight: Annotated[Count, Field(description="Most attempts that ran at once, summed over the instances.")]
    instances: Annotated[Count, Field(description="That had tasks.")]
    submits: Mapping[str, Count]
    tasks: Annotated[Mapping[str, Count], Field(description="Ended tasks by state.")]
    upstream: Annotated[Mapping[str, Count], Field(description="Calls to the provider by how they ended.")]
    waitSeconds: SpanView
    runSeconds: SpanView
    spent: Dollars
    saved: Dollars
    commands: Annotated[Count, Field(description="Redis commands.")]


class HistoryView(TypedDict):
    """Minutes in which something happened, the oldest first, at most 24 hours."""

    success: Literal[True]
    stepSeconds: Count
    minutes: list[MinuteView]


class _StoredPrompt(Struct, gc=False):
    prompt: str = ""


_read_prompt = msgspec.json.Decoder(_StoredPrompt).decode


def board_task_view(row: UnfinishedTask, max_attempts: int) -> BoardTaskView:
    """Return the row of a task."""
    task, error = row.task, row.task.error
    prompt = _read_prompt(task.request_json).prompt if task.request_json else None
    return {
        "taskId": task.id,
        "sequence": task.sequence,
        "status": task.state,
        "prompt": None if prompt is None else prompt[:SHOWN_PROMPT_CHARS],
        "model": task.model,
        "key": task.client or None,
        "instance": row.instance or None,
        "progress": task.progress,
        "attempts": task.attempts,
        "maxAttempts": max_attempts,
        "images": len(task.images),
        "reason": None if task.state.is_final else task.reason,
        "retryAt": _time(task.retry_at),
        "error": error.code if error else None,
        "errorDetail": error.detail if error else None,
        "createdAt": rfc3339(task.created_at),
        "startedAt": _time(task.started_at),
        "finishedAt": _time(task.finished_at),
    }


def _time(unix_s: float | None) -> str | None:
    return rfc3339(unix_s) if unix_s else None
