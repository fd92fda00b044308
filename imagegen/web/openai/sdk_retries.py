"""Time-outs and own retries of the SDKs that call `/v1`."""

from __future__ import annotations

import math
from collections.abc import Mapping

from imagegen.queue.client_queue import ClientQueue
from imagegen.tasks.task import State, Task
from imagegen.web.openai.errors import is_retryable

MAX_PATIENCE_S = 90.0
DEFAULT_READ_TIMEOUT_S = 60.0

REPEAT_S = 180.0
"""Longest time between two POSTs of one call of a client: our longest wait and our longest delay."""

UNSURE_REPEAT_S = 30.0
"""The same for a POST that may also be a new call."""

_SAFETY_FACTOR = 0.9


def client_timeout_s(headers: Mapping[str, str]) -> float:
    """How long the client may be kept waiting: a little less than it reads for."""
    try:
        read_timeout_s = float(headers.get("x-stainless-read-timeout", DEFAULT_READ_TIMEOUT_S))
    except ValueError:
        read_timeout_s = DEFAULT_READ_TIMEOUT_S
    if not math.isfinite(read_timeout_s) or read_timeout_s <= 0:
        read_timeout_s = DEFAULT_READ_TIMEOUT_S
    return min(read_timeout_s * _SAFETY_FACTOR, MAX_PATIENCE_S)


def is_sdk_retry(headers: Mapping[str, str]) -> bool:
    """Return whether the client may have repeated this POST itself; Together's 1.x does not mark its repeats."""
    return _is_counted_repeat(headers) or headers.get("user-agent", "").startswith("Together/v1 ")


def _is_counted_repeat(headers: Mapping[str, str]) -> bool:
    return headers.get("x-stainless-retry-count", "0") != "0"


async def permanent_failure(queue: ClientQueue, task_id: str, headers: Mapping[str, str]) -> Task | None:
    """Return the failed or cancelled task that a client's own repeat meets; None if the repeat may start again.

    A requeued task would be paid for again, though it was requested once: the client's earlier POST timed out, or the
    client repeats every failure. A repeat of Together's 1.x looks like a new call, so a retryable failure is returned
    to it for a shorter time.
    """
    if not is_sdk_retry(headers):
        return None
    task = await queue.read(task_id)
    if task is None or task.state not in (State.FAILED, State.CANCELLED):
        return None
    unsure = is_retryable(task) and not _is_counted_repeat(headers)
    return task if queue.clock() - (task.finished_at or 0.0) < (UNSURE_REPEAT_S if unsure else REPEAT_S) else None
