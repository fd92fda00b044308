"""Routes of server-sent events: GET /api/images/{taskId}/events, and of several tasks GET /api/events?tasks=a,b.

https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress

import orjson
from aiohttp import web

from imagegen.errors import FieldError, InvalidRequest
from imagegen.queue.feed import Subscription
from imagegen.tasks.image import StoredImage
from imagegen.tasks.task import FINAL_OFFSET, Task
from imagegen.web.api.serializers import not_found_view
from imagegen.web.api.tasks import cached_image_body, cached_task_body, not_found
from imagegen.web.guard import still_admits
from imagegen.web.handler_services import SERVICES, Services
from imagegen.web.http.disconnect import begin_resumable, is_disconnected, on_disconnect
from imagegen.web.http.event_stream import EventStream, encode_event
from imagegen.web.http.responses import language
from imagegen.web.lookup import find_task, find_tasks

MAX_TASKS = 50

MAX_STREAM_S = 900.0
"""A stream ends after this time and the client reconnects, before a proxy cuts it."""

MAX_UNSENT_BYTES = 64 * 1024
"""Events of more bytes are sent in several writes."""

_ONE_KNOWN = re.compile(r"[0-9]{1,18}")
_TASK_KNOWN = re.compile(r"([0-9a-f]{32}):([0-9]{1,18})")


async def task_events(request: web.Request) -> web.StreamResponse:
    """Stream the changes of one task until it is finished."""
    task = await find_task(request)
    if task is None:
        return not_found(request)
    last = request.headers.get("Last-Event-ID", "").strip()
    sequences = {task.id: int(last)} if _ONE_KNOWN.fullmatch(last) else {}
    return await _stream(request, [task], TaskEventStream(request, sequences))


async def multi_task_events(request: web.Request) -> web.StreamResponse:
    """Stream the changes of several tasks until all are finished; an unknown task has one event.

    The id of an event is `task:sequence`. The last id of a complete stream joins those of all its tasks, so that a
    client that reconnects misses nothing and receives nothing twice.
    """
    ids = _task_ids(request)
    tasks_or_none = await find_tasks(request, ids)
    tasks = [task for task in tasks_or_none if task is not None]
    if not tasks:
        return not_found(request)
    unknown = [task_id for task_id, task in zip(ids, tasks_or_none, strict=True) if task is None]
    pairs = map(_TASK_KNOWN.fullmatch, request.headers.get("Last-Event-ID", "").strip().split(","))
    sequences = {pair[1]: int(pair[2]) for pair in pairs if pair}
    return await _stream(request, tasks, TaskEventStream(request, sequences, joined=True, unknown=unknown))


def _task_ids(request: web.Request) -> list[str]:
    ids = [task_id for text in request.query.getall("tasks", ()) for task_id in text.split(",")]
    task_ids = list(dict.fromkeys(ids))
    if not 1 <= len(task_ids) <= MAX_TASKS or "" in task_ids:
        raise InvalidRequest(details=[FieldError("tasks", f"must be 1 to {MAX_TASKS} task ids with commas between")])
    return task_ids


async def _stream(request: web.Request, tasks: Sequence[Task], stream: TaskEventStream) -> web.StreamResponse:
    services = request.app[SERVICES]
    if all(task.state.is_final and stream.known(task) == task.sequence for task in tasks):
        return web.Response(status=204)
    with services.feed.subscribe(task.id for task in tasks) as subscription:
        on_disconnect(request, subscription.wake)
        begin_resumable(request)
        await subscription.turn()
        response = EventStream()
        await response.prepare(request)
        async with response:
            with suppress(ConnectionError, TimeoutError):
                await stream.run(response, tasks, subscription)
    return response


def event_name(before: Task | None, after: Task) -> str:
    """Return the name of the event for a change. before: the task as it was sent last, None for the first event."""
    if before is None:
        return "snapshot"
    if after.state.is_final:
        return after.state.value
    same = all(getattr(before, name) == getattr(after, name) for name in ("state", "reason", "retry_at", "attempts"))
    return "progress" if same else "status"


def new_images(before: Task | None, after: Task) -> list[StoredImage]:
    """Return the images that are new; not the stale ones of an earlier generation."""
    if before is None or after.stale_images:
        return []
    old = () if before.stale_images else before.images
    return [image for image in after.images if image not in old]


class TaskEventStream:
    """Event stream of one client.

    sequences: those that the client has, by task id, from its Last-Event-ID. joined: the stream has several tasks.
    """

    def __init__(
        self, request: web.Request, sequences: Mapping[str, int], *, joined: bool = False, unknown: Sequence[str] = ()
    ) -> None:
        self._request = request
        self._services: Services = request.app[SERVICES]
        self._client_sequences = dict(sequences)
        self._joined = joined
        self._unknown = unknown
        self._last_sent: dict[str, Task] = {}
        self._unsent = b""

    def known(self, task: Task) -> int:
        """Return the sequence that the client has; -1 if it has none, or an impossible one."""
        sequence = self._client_sequences.get(task.id, -1)
        latest = task.sequence if task.state.is_final else task.epoch + 2 * FINAL_OFFSET
        return sequence if sequence <= latest else -1

    async def run(self, response: EventStream, tasks: Sequence[Task], subscription: Subscription) -> None:
        """Send events until the tasks are finished, the client has left, the service stops, or the stream is too old.

        Raises ConnectionError or TimeoutError if the client can't be reached.
        """
        clock = asyncio.get_running_loop().time
        ends_at = clock() + MAX_STREAM_S * random.uniform(0.9, 1.1)  # noqa: S311 - spreads the reconnects
        for task_id in self._unknown:
            view = {"taskId": task_id} | not_found_view(language(self._request))
            self._unsent += encode_event("snapshot", orjson.dumps(view))
        for task in tasks:
            await self._add_changes(response, await self._services.queue.get(task.id) or task)
        while not self._finished and not self._services.readiness.draining and still_admits(self._request):
            if self._unsent:
                await self._send(response)
                continue  # a wake meanwhile does not end the next wait
            left_s = ends_at - clock()
            if left_s <= 0 or is_disconnected(self._request):
                break
            for task in await subscription.changes(left_s):
                await self._add_changes(response, task)
        await self._end(response)

    @property
    def _finished(self) -> bool:
        return all(task.state.is_final for task in self._last_sent.values())

    async def _add_changes(self, response: EventStream, task: Task) -> None:
        """Add the events of a change to the unsent ones; send them if they are large.

        The id is what the client has after this event. An image's id is the sequence before, since the rest of its
        change follows.
        """
        before, last_sequence = self._last_sent.get(task.id), self.known(task)
        if before is not None and task.sequence < before.sequence:
            return
        self._last_sent[task.id] = task
        if task.sequence <= last_sequence:
            return
        body, _ = await cached_task_body(self._request, self._services, task)
        for image in new_images(before, task):
            shown = cached_image_body(self._request, self._services, task, image)
            if self._joined:
                shown = b'{"taskId":"%b",%b' % (task.id.encode(), shown.removeprefix(b"{"))
            self._add("image", shown, (task.id, last_sequence))
        position = (task.id, task.sequence)
        self._add(event_name(before, task), body, position)
        if before is None and task.state.is_final:
            self._add(task.state.value, body, position)
        self._client_sequences[task.id] = task.sequence
        if len(self._unsent) > MAX_UNSENT_BYTES:
            await self._send(response)

    def _add(self, event: str, data: bytes, position: tuple[str, int]) -> None:
        task_id, sequence = position
        self._unsent += encode_event(event, data, f"{task_id}:{sequence}" if self._joined else str(sequence))

    async def _send(self, response: EventStream) -> None:
        """Send the events in one write, which costs more time than all else about an event."""
        if self._unsent:
            events, self._unsent = self._unsent, b""
            await response.send_encoded(events)

    async def _end(self, response: EventStream) -> None:
        """Send the last id and the delay of a reconnect in one write, so that no client reconnects between the two."""
        lines = []
        if self._joined:
            has = {task_id: self._client_sequences[task_id] for task_id in self._last_sent}
            lines.append("id: " + ",".join(f"{task_id}:{sequence}" for task_id, sequence in has.items()))
        if not self._finished:
            lines.append(f"retry: {random.randint(1_000, 3_000)}")  # noqa: S311
        if lines:
            self._unsent += "\r\n".join([*lines, "", ""]).encode()
        if not is_disconnected(self._request):
            await response.end(self._unsent)


async def end_streams(app: web.Application) -> None:
    """End every stream and every wait when the service stops, so that none delays it."""
    app[SERVICES].readiness.draining = True
    app[SERVICES].feed.wake_all()
