"""Lookup of a task by the id that a client sent: a task that the client may not see is unknown to it.

Every handler finds its task here, so that the answers about another client's task and about an unknown id are equal.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from aiohttp import web

from imagegen.tasks.task import Task
from imagegen.web.guard import client_of
from imagegen.web.handler_services import SERVICES


async def find_task(request: web.Request, task_id: str | None = None) -> Task | None:
    """Return the task of an id, or of the path, at most some seconds old; None if unknown. Raises QueueUnavailable."""
    return _visible(request, await request.app[SERVICES].queue.get(_id_of(request, task_id)))


async def find_fresh_task(request: web.Request, task_id: str | None = None) -> Task | None:
    """Return the task of an id, or of the path, in its present state; None if unknown. Raises QueueUnavailable."""
    return _visible(request, await request.app[SERVICES].queue.fresh(_id_of(request, task_id)))


async def find_tasks(request: web.Request, ids: Sequence[str]) -> list[Task | None]:
    """Return the tasks of these ids in their order, None for each unknown one. Raises QueueUnavailable."""
    tasks = await asyncio.gather(*map(request.app[SERVICES].queue.get, ids))
    return [_visible(request, task) for task in tasks]


def is_cached(request: web.Request) -> bool:
    """Return whether `find_task` returns an up-to-date task without a Redis command."""
    queue, task_id = request.app[SERVICES].queue, _id_of(request)
    return _visible(request, queue.cached(task_id)) is not None and not queue.may_be_outdated(task_id)


def _id_of(request: web.Request, task_id: str | None = None) -> str:
    """Return the id, which may be empty where a client sent it in a body; None for that of the path."""
    return request.match_info["task_id"] if task_id is None else task_id


def _visible(request: web.Request, task: Task | None) -> Task | None:
    return task if task is not None and client_of(request).may_see(task.scope) else None
