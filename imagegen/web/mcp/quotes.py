"""Quote of a call: price, waiting time and limits, without a submit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec.structs import replace

from imagegen.queue.client_queue import Submission
from imagegen.queue.eta import QueuePosition
from imagegen.tasks.cost import dollars
from imagegen.tasks.request import GenerationRequest
from imagegen.tasks.task import State, Task
from imagegen.web.api.models import capabilities_view
from imagegen.web.context import Services
from imagegen.web.guard import client_of
from imagegen.web.http.json_images import ReceivedBody
from imagegen.web.mcp.views import QuoteView
from imagegen.web.submitter import SubmitOptions, parse_fields


async def quote(services: Services, fields: Mapping[str, Any], body: ReceivedBody, options: SubmitOptions) -> QuoteView:
    """Return what the submit of these fields would cost now. Nothing is stored or counted as a submit.

    Raises InvalidRequest, NotAllowed, UnsupportedImage, QueueUnavailable.
    """
    parsed = parse_fields(services, fields, options)
    settled = await services.inputs.identify(parsed.request, body, scope=client_of(options.request).scope)
    request, submission = parsed.request, replace(parsed, request=settled).submission(services.identity, options)
    task = await services.queue.fresh(submission.task_id)
    is_joined = task is not None and not task.state.is_final
    is_hit = task is not None and await _is_whole(services, task)
    if task is not None and is_joined:
        place = await services.queue.position(task)
    else:
        place = QueuePosition(None, 0.0) if is_hit else await _outlook(services, submission)
    estimated = None if submission.cost is None else submission.cost.estimated
    view: QuoteView = {
        "model": request.model,
        "n": request.n,
        "width": request.width,
        "height": request.height,
        "costUsd": 0.0 if is_hit or is_joined else None if estimated is None else dollars(estimated),
        "cached": is_hit,
        "joins": is_joined,
        "taskId": submission.task_id,
        "queuePosition": place.position,
        "etaSeconds": place.eta_s,
        "limits": _limits(services, request),
    }
    if warnings := services.with_notices(_as_task(services, submission)).warnings:
        view["warnings"] = list(warnings)
    return view


async def _is_whole(services: Services, task: Task) -> bool:
    return task.state is State.COMPLETED and await services.store.contains_all(task.id, task.images)


async def _outlook(services: Services, submission: Submission) -> QueuePosition:
    """Return the place that a new task would have behind all that wait."""
    return await services.queue.position(_as_task(services, submission))


def _as_task(services: Services, submission: Submission) -> Task:
    """Return a task as the submit would make it now."""
    now = services.queue.clock()
    return Task(
        submission.task_id,
        0,
        0,
        submission.digest,
        submission.model,
        submission.request_json,
        now,
        entry_id=f"{int(now * 1000)}-0",
    )


def _limits(services: Services, request: GenerationRequest) -> Any:
    row = services.models.describe(request.model)
    return None if row is None else capabilities_view(row)
