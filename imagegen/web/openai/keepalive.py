"""Response that is held with spaces until its task is finished, so that no proxy cuts the connection.

Its status is sent before the task has ended: a failure comes as a 200 with an error in the body.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

import orjson
from aiohttp import web

from imagegen.errors import ApiError
from imagegen.tasks.task import Task
from imagegen.web.api.tasks import wait_until_final
from imagegen.web.handler_services import Services
from imagegen.web.http.disconnect import is_disconnected
from imagegen.web.http.json_with_images import JsonWithImages
from imagegen.web.openai.error_responses import error_fields

KEEPALIVE_S = 20.0

_HEADERS = {
    "content-type": "application/json",
    "cache-control": "no-store, no-transform",
    "x-accel-buffering": "no",
}


class KeepaliveResponse:
    """Response of one request. Nothing is sent if the task ends before the first space is due.

    has_error: whether it ended with an error of ours in place of the task.
    """

    def __init__(self, request: web.Request, services: Services) -> None:
        self._request = request
        self._services = services
        self._stream: web.StreamResponse | None = None
        self.has_error = False

    async def wait(self, task: Task, within_s: float) -> Task:
        """Return the task when it is finished, after `within_s` seconds, or when the client or this service leaves."""
        clock = asyncio.get_running_loop().time
        deadline = clock() + within_s
        while not task.state.is_final:
            task = await wait_until_final(self._services, task, min(KEEPALIVE_S, deadline - clock()), self._request)
            is_over = self._services.readiness.draining or is_disconnected(self._request)
            if task.state.is_final or is_over or clock() >= deadline:
                break
            with suppress(ConnectionError):
                await self._send_space()
        return task

    async def complete(self, build: Callable[[], Awaitable[web.StreamResponse]]) -> web.StreamResponse:
        """Return the response, as the rest of the stream if that has begun."""
        if self._stream is None:
            return await build()
        response = None
        try:
            response = await build()
            body = getattr(response, "body", None)
        except ApiError as error:
            fields = error_fields(error.status, error.message("en"), error.code, None)
            body = orjson.dumps({"error": fields})
            self.has_error = True
        with suppress(ConnectionError):
            if isinstance(response, JsonWithImages):
                await response.send_to(self._stream, self._request)
            else:
                await self._stream.write(bytes(body or b""))
        return self._stream

    async def _send_space(self) -> None:
        if self._stream is None:
            stream = web.StreamResponse(headers=_HEADERS)
            await stream.prepare(self._request)
            self._stream = stream
        await self._stream.write(b" ")
