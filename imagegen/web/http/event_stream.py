"""Event stream for one client, which may leave before it begins."""

from __future__ import annotations

from aiohttp import hdrs, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp_sse import EventSourceResponse

PING_S = 15.0

SEND_TIMEOUT_S = 30.0
"""A client that reads nothing for this time is disconnected."""


class EventStream(EventSourceResponse):
    """Server-sent events, with a comment line each `PING_S`, so that no proxy cuts the connection."""

    def __init__(self) -> None:
        super().__init__(allow_all_methods=True, ping_interval=PING_S, send_timeout=SEND_TIMEOUT_S)
        self.headers[hdrs.CACHE_CONTROL] = "no-cache, no-transform"

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        """Send the head. Raises HTTPMethodNotAllowed for HEAD, and ConnectionResetError if the client has left.

        The library asserts that the client is there.
        """
        if request.method == hdrs.METH_HEAD:
            raise web.HTTPMethodNotAllowed(request.method, (hdrs.METH_GET,))
        if request.transport is None:
            raise ConnectionResetError("the client has left")
        return await super().prepare(request)
