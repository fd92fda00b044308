"""Owns server-sent events: GET /api/images/{taskId}/events, and of several tasks GET /api/events?tasks=a,b.

https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import orjson
from aiohttp import hdrs, web
from aiohttp_sse import EventSourceResponse

from imagegen.errors import FieldError, InvalidRequest
from imagegen.queue.feed import Subscription
from imagegen.tasks.image import StoredImage
from imagegen.tasks.task import FINAL_OFFSET, Task
from imagegen.web.api.serializers import not_found_view
from imagegen.web.api.task_responses import not_found, render_task
from imagegen.web.context import SERVICES, Services
from imagegen.web.http.disconnect import is_disconnected, on_disconnect
from imagegen.web.http.responses import language

MAX_TASKS = 50
PING_S = 15.0

MAX_STREAM_S = 900.0
"""A stream ends after so long and the client comes again, before a proxy cuts it."""

SEND_TIMEOUT_S = 30.0
"""A client that takes nothing for so long is let go."""

_ONE_KNOWN = re.compile(r"[0-9]{1,18}")
_TASK_KNOWN = re.compile(r"([0-9a-f]{32}):([0-9]{1,18})")


async def task_events(request: web.Request) -> web.StreamResponse:
    """What happens to one task, until it is finished."""
    task = await request.app[SERVICES].queue.get(request.match_info["task_id"])
    if task is None:
        return not_found(request)
    last = request.headers.get("Last-Event-ID", "").strip()
    known = {task.id: int(last)} if _ONE_KNOWN.fullmatch(last) else {}
    return await _answer(request, [task], TaskEventStream(request, known))


async def multi_task_events(request: web.Request) -> web.StreamResponse:
    """What happens to several tasks, until all are finished; one that is unknown is said to be so once.

    The id of an event is `task:sequence`. Where a stream ends as it should, a last id joins those of all its tasks,
    so that a client that comes again misses nothing and is told nothing twice.
    """
    context, ids = request.app[SERVICES], _wanted(request)
    found = await asyncio.gather(*map(context.queue.get, ids))
    tasks = [task for task in found if task is not None]
    if not tasks:
        return not_found(request)
    unknown = [task_id for task_id, task in zip(ids, found, strict=True) if task is None]
    pairs = map(_TASK_KNOWN.fullmatch, request.headers.get("Last-Event-ID", "").strip().split(","))
    known = {pair[1]: int(pair[2]) for pair in pairs if pair}
    return await _answer(request, tasks, TaskEventStream(request, known, joined=True, unknown=unknown))


def _wanted(request: web.Request) -> list[str]:
    ids = [task_id for text in request.query.getall("tasks", ()) for task_id in text.split(",")]
    wanted = list(dict.fromkeys(ids))
    if not 1 <= len(wanted) <= MAX_TASKS or "" in wanted:
        raise InvalidRequest(details=[FieldError("tasks", f"must be 1 to {MAX_TASKS} task ids with commas between")])
    return wanted


async def _answer(request: web.Request, tasks: Sequence[Task], stream: TaskEventStream) -> web.StreamResponse:
    context = request.app[SERVICES]
    if all(task.state.is_final and stream.known(task) == task.sequence for task in tasks):
        return web.Response(status=204)
    with context.feed.subscribe(task.id for task in tasks) as subscription:
        on_disconnect(request, subscription.wake)
        response = EventSourceResponse(ping_interval=PING_S, send_timeout=SEND_TIMEOUT_S)
        response.headers[hdrs.CACHE_CONTROL] = "no-cache, no-transform"
        await response.prepare(request)
        async with response:
            with suppress(ConnectionError, TimeoutError):
                await stream.run(response, tasks, subscription)
    return response


def event_name(before: Task | None, after: Task) -> str:
    """The name of the event that tells a change; `before`: as it was told last, None for the first time."""
    if before is None:
        return "snapshot"
    if after.state.is_final:
        return after.state.value
    same = all(getattr(before, name) == getattr(after, name) for name in ("state", "reason", "retry_at", "attempts"))
    return "progress" if same else "status"


def new_images(before: Task | None, after: Task) -> list[StoredImage]:
    """Pictures that came since; those of before a fresh generation are none."""
    if before is None or after.stale_images:
        return []
    old = () if before.stale_images else before.images
    return [image for image in after.images if image not in old]


class TaskEventStream:
    """What one client is told.

    known: the sequences that it has, by task id, from its Last-Event-ID. joined: several tasks are in one stream.
    """

    def __init__(
        self, request: web.Request, known: Mapping[str, int], *, joined: bool = False, unknown: Sequence[str] = ()
    ) -> None:
        self._request = request
        self._context: Services = request.app[SERVICES]
        self._client_sequences = dict(known)
        self._joined = joined
        self._unknown = unknown
        self._last_sent: dict[str, Task] = {}

    def known(self, task: Task) -> int:
        """The sequence that the client has; one that this task can't have had is none."""
        sequence = self._client_sequences.get(task.id, -1)
        latest = task.sequence if task.state.is_final else task.epoch + 2 * FINAL_OFFSET
        return sequence if sequence <= latest else -1

    async def run(self, response: EventSourceResponse, tasks: Sequence[Task], subscription: Subscription) -> None:
        """Tells all until the tasks are finished, the client has left, the service stops, or it is time to come again.

        Raises ConnectionError or TimeoutError where the client can't be reached.
        """
        clock = asyncio.get_running_loop().time
        ends_at = clock() + MAX_STREAM_S * random.uniform(0.9, 1.1)  # noqa: S311 - spreads the comers
        for task_id in self._unknown:
            view = {"taskId": task_id} | not_found_view(language(self._request))
            await response.send(orjson.dumps(view).decode(), event="snapshot")
        for task in tasks:
            await self._tell(response, await self._context.queue.get(task.id) or task)
        while not self._finished and not self._context.readiness.draining:
            left_s = ends_at - clock()
            if left_s <= 0 or is_disconnected(self._request):
                break
            for task in await subscription.changes(left_s):
                await self._tell(response, task)
        await self._end(response)

    @property
    def _finished(self) -> bool:
        return all(task.state.is_final for task in self._last_sent.values())

    async def _tell(self, response: EventSourceResponse, task: Task) -> None:
        """Sends what changed since the client was told last.

        The id says what the client has with this event: so a picture's is the sequence before, for the rest of its
        change is still to come.
        """
        before, known = self._last_sent.get(task.id), self.known(task)
        if before is not None and task.sequence < before.sequence:
            return
        self._last_sent[task.id] = task
        if task.sequence <= known:
            return
        view, _ = await render_task(self._request, task)
        entries = {entry["index"]: entry for entry in view.get("data", ())}
        for image in new_images(before, task):
            await self._send(response, "image", (task.id, known), entries[image.index])
        here = (task.id, task.sequence)
        await self._send(response, event_name(before, task), here, view)
        if before is None and task.state.is_final:
            await self._send(response, task.state.value, here, view)
        self._client_sequences[task.id] = task.sequence

    async def _send(
        self, response: EventSourceResponse, event: str, here: tuple[str, int], data: Mapping[str, Any]
    ) -> None:
        task_id, sequence = here
        shown = {"taskId": task_id, **data} if self._joined else data
        event_id = f"{task_id}:{sequence}" if self._joined else str(sequence)
        await response.send(orjson.dumps(shown).decode(), id=event_id, event=event)

    async def _end(self, response: EventSourceResponse) -> None:
        """Says where to go on, and when; all at once, lest a client comes again between the two."""
        lines = []
        if self._joined:
            has = {task_id: self._client_sequences[task_id] for task_id in self._last_sent}
            lines.append("id: " + ",".join(f"{task_id}:{sequence}" for task_id, sequence in has.items()))
        if not self._finished:
            lines.append(f"retry: {random.randint(1_000, 3_000)}")  # noqa: S311
        if lines and not is_disconnected(self._request):
            await response.write("\r\n".join([*lines, "", ""]).encode())


async def end_streams(app: web.Application) -> None:
    """Ends every stream and every wait at the end of the service, so that none holds it up."""
    app[SERVICES].readiness.draining = True
    app[SERVICES].feed.wake_all()
