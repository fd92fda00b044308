"""Event stream for one client, which may leave before it begins."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import suppress

from aiohttp import hdrs, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp_sse import EventSourceResponse

from imagegen.web.http.half_closed import on_half_close

PING_S = 15.0

SEND_TIMEOUT_S = 30.0
"""A client that reads nothing for this time is disconnected."""


class EventStream(EventSourceResponse):
    """Server-sent events, with a comment line each `PING_S`, so that no proxy cuts the connection."""

    def __init__(self) -> None:
        super().__init__(allow_all_methods=True, ping_interval=PING_S, send_timeout=SEND_TIMEOUT_S)
        self._writing = asyncio.Lock()
        self._request: web.BaseRequest | None = None
        self._probing: asyncio.Future[None] | None = None
        self.headers[hdrs.CACHE_CONTROL] = "no-cache, no-transform"

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        """Send the head. Raises HTTPMethodNotAllowed for HEAD, and ConnectionResetError if the client has left.

        The library asserts that the client is there.
        """
        if request.method == hdrs.METH_HEAD:
            raise web.HTTPMethodNotAllowed(request.method, (hdrs.METH_GET,))
        if request.transport is None:
            raise ConnectionResetError("the client has left")
        self._request = request
        writer = await super().prepare(request)
        if isinstance(request, web.Request):
            on_half_close(request, self._probe)
        return writer

    def _probe(self) -> None:
        """Send a comment line, which shows whether a client that has closed its own side still reads."""
        self._probing = asyncio.ensure_future(self._write_probe())

    async def _write_probe(self) -> None:
        with suppress(ConnectionError, RuntimeError):
            await self.write(b":\r\n\r\n")

    async def write(self, data: bytes | bytearray | memoryview) -> None:
        """Write one event or comment line; not within an event that is written in pieces."""
        async with self._writing:
            await super().write(data)

    async def send_encoded(self, events: bytes) -> None:
        """Send events that are encoded already. Raises ConnectionError, TimeoutError."""
        async with self._writing:
            await self._in_time(super().write(events))

    async def end(self, events: bytes) -> None:
        """Send the last events and the end of the stream in one write. Raises ConnectionError, TimeoutError."""
        async with self._writing:
            await self._in_time(self.write_eof(events))

    async def send_pieces(self, event: str, pieces: AsyncIterator[bytes]) -> None:
        """Send an event with data of one line, which comes in pieces. Raises ConnectionError, TimeoutError."""
        async with self._writing:
            await self._in_time(super().write(f"event: {event}\r\ndata: ".encode()))
            async for piece in pieces:
                await self._in_time(super().write(piece))
            await self._in_time(super().write(b"\r\n\r\n"))

    async def _in_time(self, write: Coroutine[None, None, None]) -> None:
        try:
            async with asyncio.timeout(SEND_TIMEOUT_S):
                await write
        except TimeoutError:
            if self._request is not None and self._request.transport is not None:
                self._request.transport.abort()
            raise


def encode_event(event: str, data: bytes, event_id: str | None = None) -> bytes:
    """Return an event as a stream has it. data: of one line."""
    first = "" if event_id is None else f"id: {event_id}\r\n"
    return b"%bevent: %b\r\ndata: %b\r\n\r\n" % (first.encode(), event.encode(), data)
