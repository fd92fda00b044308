"""Response to a tool's call as a stream of events: its progress, then its result."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

from aiohttp import web

from imagegen.errors import StoreUnavailable
from imagegen.tasks.task import Task
from imagegen.web.api.images import IMAGE_SENDER
from imagegen.web.handler_services import SERVICES
from imagegen.web.http.disconnect import is_disconnected
from imagegen.web.http.event_stream import EventStream
from imagegen.web.http.json_with_images import parts_of, pieces_of
from imagegen.web.mcp.messages import RequestId, progress_notification
from imagegen.web.mcp.versions import accepts_events

_STEP = 0.1
"""Each notification has a higher progress than the one before, also if nothing happened."""

Report = Callable[[Task], Awaitable[None]]


class ProgressStream:
    """Answer to a request as a stream of events, which begins with the first progress."""

    def __init__(self, request: web.Request, token: RequestId | None) -> None:
        self._request = request
        self._token = token
        self._progress = -_STEP
        self._response: EventStream | None = None

    @property
    def report(self) -> Report | None:
        """Return what sends progress; None without a token of the client."""
        wanted = self._token is not None and accepts_events(self._request.headers)
        return self._send_progress if wanted else None

    @property
    def has_begun(self) -> bool:
        return self._response is not None

    async def end(self, body: bytes, result: Mapping[str, Any]) -> web.StreamResponse:
        """Send the response to the request. result: of which the body is made."""
        response, app = await self._begun(), self._request.app
        store, turns = app[SERVICES].store, app[IMAGE_SENDER].turns
        with suppress(ConnectionError, TimeoutError, OSError, StoreUnavailable):  # a cut event is no event
            await response.send_pieces("message", pieces_of(parts_of(body, result), store, turns))
        return response

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._response is not None:
            await self._response.__aexit__(kind, error, trace)

    async def _send_progress(self, task: Task) -> None:
        self._progress = max(self._progress + _STEP, float(task.progress))
        place = await self._request.app[SERVICES].queue.position(task)
        ahead = f", position {place.position} in the queue" if place.position else ""
        left = f", about {place.eta_s:g} s left" if place.eta_s else ""
        params: dict[str, Any] = {
            "progressToken": self._token,
            "progress": round(self._progress, 1),
            "total": 100,
            "message": f"{task.state}{ahead}{left}",
        }
        if is_disconnected(self._request):
            return
        response = await self._begun()
        with suppress(ConnectionError, TimeoutError):  # the wait ends when the connection is lost
            await response.send(progress_notification(params), event="message")

    async def _begun(self) -> EventStream:
        if self._response is None:
            response = EventStream()
            await response.prepare(self._request)
            self._response = response
        return self._response
