"""Extension of tasks: an unfinished call is answered with a handle, which is a task of ours.

https://modelcontextprotocol.io/extensions/tasks/overview. A failed task of ours is a completed one there, with a result
that is an error, since `failed` is for errors of the protocol.
"""

from __future__ import annotations

from typing import Any

from aiohttp import web

from imagegen.errors import AlreadyFinished
from imagegen.formats import rfc3339
from imagegen.ratelimit.limits import RATE_LIMITS
from imagegen.tasks.clients import submitter_name
from imagegen.tasks.task import State, Task
from imagegen.web.api.serializers import retry_after_s
from imagegen.web.api.tasks import cancel_task
from imagegen.web.guard import client_of
from imagegen.web.handler_services import SERVICES
from imagegen.web.lookup import find_fresh_task
from imagegen.web.mcp.messages import RpcMessage, invalid_params
from imagegen.web.mcp.tool_results import TaskAnswer, task_result
from imagegen.web.mcp.versions import Protocol


async def created_task(request: web.Request, task: Task) -> dict[str, Any]:
    """Return the handle of an unfinished task in place of a call's result."""
    return {"resultType": "task", **await _task_fields(request, task)}


async def get_task(request: web.Request, protocol: Protocol, message: RpcMessage) -> dict[str, Any]:
    """Return the state of a task, with the result of its call at its end. Raises RpcError."""
    protocol.require_tasks(message)
    await request.app[RATE_LIMITS].spend_call(request, "general")
    task = await _find(request, message)
    fields = await _task_fields(request, task)
    if fields["status"] == "completed":
        result = await task_result(request, protocol, TaskAnswer(task))
        fields["result"] = result.to_dict() | {"resultType": "complete"}
    return fields


async def update_task(request: web.Request, protocol: Protocol, message: RpcMessage) -> dict[str, Any]:
    """Accept input for a task; no task requests any. Raises RpcError."""
    protocol.require_tasks(message)
    await _find(request, message)
    return {}


async def cancel(request: web.Request, protocol: Protocol, message: RpcMessage) -> dict[str, Any]:
    """Cancel a task. Raises RpcError if it is unknown."""
    protocol.require_tasks(message)
    await request.app[RATE_LIMITS].spend_call(request, "general")
    task = await _find(request, message)
    try:
        await cancel_task(request, submitter_name(client_of(request).id), task.id)
    except AlreadyFinished:
        return {}
    return {}


async def _find(request: web.Request, message: RpcMessage) -> Task:
    task_id = message.params.get("taskId")
    task = await find_fresh_task(request, task_id) if isinstance(task_id, str) else None
    if task is None:
        raise invalid_params(message, "Task not found: taskId is unknown or has expired")
    return task


async def _task_fields(request: web.Request, task: Task) -> dict[str, Any]:
    services = request.app[SERVICES]
    place = await services.queue.position(task)
    ends_at = task.expires_at or task.created_at + services.inputs.task_life_s + services.queue.result_ttl_s
    status = "working"
    if task.state.is_final:
        status = "cancelled" if task.state is State.CANCELLED else "completed"
    fields: dict[str, Any] = {
        "taskId": task.id,
        "status": status,
        "createdAt": rfc3339(task.created_at),
        "lastUpdatedAt": rfc3339(task.finished_at or task.started_at or task.created_at),
        "ttlMs": int((ends_at - task.created_at) * 1000),
    }
    if status == "working":
        fields |= {
            "statusMessage": f"{task.state}, {task.progress} %",
            "pollIntervalMs": retry_after_s(place) * 1000,
        }
    return fields
