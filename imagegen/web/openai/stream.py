"""Event stream of `stream: true` on `/v1`: OpenAI's image events, each sent when its image exists."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import orjson
from aiohttp import web

from imagegen.errors import ApiError, Draining, StoreUnavailable
from imagegen.images.store import ImageStore
from imagegen.queue.feed import Subscription
from imagegen.tasks.image import StoredImage
from imagegen.tasks.reply_details import ReplyDetails
from imagegen.tasks.task import State, Task
from imagegen.turn_queue import TurnQueue
from imagegen.web.api.images import IMAGE_SENDER
from imagegen.web.handler_services import Readiness
from imagegen.web.http.disconnect import is_disconnected
from imagegen.web.http.event_stream import EventStream
from imagegen.web.http.json_with_images import parts_of, pieces_of
from imagegen.web.openai.client_calls import Ending
from imagegen.web.openai.error_responses import error_fields, failure_fields
from imagegen.web.openai.token_usage import token_usage

COMPLETED, EDITED = "image_generation.completed", "image_edit.completed"

_CHECK_S = 60.0
_USAGE = {
    "input_tokens": 0,
    "output_tokens": 0,
    "total_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
}
"""Required by the clients' types; most providers count no tokens."""

Encode = Callable[[Task, StoredImage], Awaitable[str]]


class ImageEventStream:
    """Events of one task, one for each finished image; no provider shows partial images.

    task: its newest state here. ending: how the client's call ended. encode: returns an image's bytes as base64, or
    their placeholder; may raise ApiError. store: of the images. completed: the name of each event.
    """

    def __init__(
        self,
        subscription: Subscription,
        readiness: Readiness,
        encode: Encode,
        store: ImageStore,
        completed: str = COMPLETED,
    ) -> None:
        self._subscription = subscription
        self._readiness = readiness
        self._encode = encode
        self._store = store
        self._completed = completed
        self._turns = TurnQueue()
        self._sent: set[int] = set()
        self.task: Task | None = None
        self.ending = Ending.LOST

    async def send(self, request: web.Request, task: Task, within_s: float) -> web.StreamResponse | None:
        """Send all events. Return None, with nothing sent, if no image came in time, so that a status can be sent."""
        self.task = task = await self._first_image(request, task, within_s)
        images = self._new(task)
        if not images:
            return None
        first = await self._event(task, images[0])
        response = EventStream()
        self._turns = request.app[IMAGE_SENDER].turns
        await response.prepare(request)
        async with response:
            with suppress(ConnectionError, TimeoutError):
                await self._send(response, first)
                await self._send_rest(request, response, task)
        return response

    async def _first_image(self, request: web.Request, task: Task, within_s: float) -> Task:
        clock = asyncio.get_running_loop().time
        deadline = clock() + within_s
        while not (task.state.is_final or self._new(task) or self._readiness.draining or is_disconnected(request)):
            left_s = deadline - clock()
            if left_s <= 0:
                break
            task = await self._next(task, left_s)
        return task

    async def _send_rest(self, request: web.Request, response: EventStream, task: Task) -> None:
        """Send the rest of the events. Raises ConnectionError or TimeoutError if the client can't be reached."""
        try:
            task = await self._send_images(request, response, task)
        except ApiError as error:
            fields = error_fields(error.status, error.message("en"), error.code, None)
            await self._send(response, {"type": "error", "error": fields})
        else:
            if task.state in (State.FAILED, State.CANCELLED):
                await self._send(response, {"type": "error", "error": failure_fields(task)})
                self.ending = Ending.FAILED
            elif task.state is State.COMPLETED:
                self.ending = Ending.DELIVERED

    async def _send_images(self, request: web.Request, response: EventStream, task: Task) -> Task:
        """Send images until the task is finished or the client has left. Raises Draining, and what `encode` raises."""
        while True:
            for image in self._new(task):
                await self._send(response, await self._event(task, image))
            if task.state.is_final or is_disconnected(request):
                return task
            if self._readiness.draining:
                raise Draining
            task = await self._next(task, _CHECK_S)

    async def _next(self, task: Task, within_s: float) -> Task:
        """Return the newest of the task; a change that was overtaken on its way is none."""
        changes = await self._subscription.changes(within_s)
        return max(task, *changes, key=lambda state: state.sequence) if changes else task

    def _new(self, task: Task) -> list[StoredImage]:
        if task.stale_images or task.state in (State.FAILED, State.CANCELLED):
            return []
        return [image for image in task.images if image.index not in self._sent]

    async def _event(self, task: Task, image: StoredImage) -> dict[str, Any]:
        encoded = await self._encode(task, image)
        self._sent.add(image.index)
        reported = task.details or ReplyDetails()
        return {
            "type": self._completed,
            "b64_json": encoded,
            "created_at": int(task.created_at),
            "background": reported.background or "opaque",
            "output_format": image.content_type.removeprefix("image/"),
            "quality": reported.quality or "high",
            "size": f"{image.width}x{image.height}",
            "usage": token_usage(reported.usage or {}) or _USAGE,
        }

    async def _send(self, response: EventStream, event: dict[str, Any]) -> None:
        """Send an event; the base64 of a large image is read while it is sent. Raises ConnectionError, TimeoutError."""
        parts = parts_of(orjson.dumps(event), event)
        try:
            await response.send_pieces(event["type"], pieces_of(parts, self._store, self._turns))
        except (StoreUnavailable, OSError) as error:
            if isinstance(error, ConnectionError | TimeoutError):
                raise
            raise ConnectionResetError("the image can't be read") from error
