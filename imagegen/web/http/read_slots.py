"""Slots of requests that read much of Redis for one response: few of them at once, the others wait."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import wraps

from aiohttp import web
from aiohttp.typedefs import Handler

from imagegen.web.http.disconnect import is_disconnected

READS_AT_ONCE = 4
"""A page of the list reads 500 records at a time and builds 100 tasks: 600 at once took 65 MiB, much of it for good."""


class ReadSlots:
    """Slots of one application, given in order of request."""

    def __init__(self, at_once: int = READS_AT_ONCE) -> None:
        self._slots = asyncio.Semaphore(at_once)

    @asynccontextmanager
    async def slot(self, request: web.Request) -> AsyncIterator[None]:
        """Hold a slot. Raises ConnectionResetError if the client left before its turn."""
        async with self._slots:
            if is_disconnected(request):
                raise ConnectionResetError("the client has left")
            yield


READ_SLOTS = web.AppKey("read_slots", ReadSlots)


def in_read_slot(handler: Handler) -> Handler:
    """Return a handler that makes its response within a slot."""

    @wraps(handler)
    async def reads(request: web.Request) -> web.StreamResponse:
        async with request.app[READ_SLOTS].slot(request):
            return await handler(request)

    return reads
