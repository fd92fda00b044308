"""Owns the short cuts through aiohttp: the one file that uses its private names to save time.

Where aiohttp does more than our answers need, less is done here, with the same result on the wire. All else goes the
long way. tests/web/test_shortcuts.py compares the two, so that a new aiohttp can't change one of them unseen.
"""

# ruff: noqa: SLF001

from __future__ import annotations

import asyncio
import sys
from collections.abc import Coroutine, Mapping
from functools import lru_cache
from typing import Any, TypeVar, cast

from aiohttp import HttpVersion11, hdrs, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.compression_utils import MAX_SYNC_CHUNK_SIZE
from aiohttp.helpers import rfc822_formatted_time
from aiohttp.http_parser import RawRequestMessage
from aiohttp.http_writer import StreamWriter
from aiohttp.web_urldispatcher import UrlMappingMatchInfo
from multidict import CIMultiDict

from imagegen.web.headers import CAREFUL, SERVER, X_REQUEST_ID, request_id_of

T = TypeVar("T")

MAX_PATHS, MAX_PATH_CHARS = 2_000, 200

_BODILESS = frozenset({204, 304})


class DirectLoop:
    """An event loop for `RequestHandler.start`, where a coroutine is awaited as it stands and no task is made of it.

    aiohttp starts a task for each request, which the connection's own task does nothing but wait for: two more turns
    of the loop. From Python 3.12 on aiohttp starts it eagerly, to the same effect. What it is for, that context
    variables of one request end with it, none of our handlers needs.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.create_future = loop.create_future
        self.time = loop.time
        self.call_at = loop.call_at
        self.call_later = loop.call_later

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loop, name)

    @staticmethod
    def create_task(coroutine: Coroutine[Any, Any, T]) -> Coroutine[Any, Any, T]:
        return coroutine


def run_directly(connection: web.RequestHandler) -> None:
    """Has a connection, whose own task is made but did not run yet, run its requests in that task."""
    if sys.version_info < (3, 12):
        connection._loop = cast(asyncio.AbstractEventLoop, DirectLoop(connection._loop))


class Router:
    """Runs the handler of a request. What aiohttp's router found for a path lately is true of it again, as its table
    is frozen; the search walks up the path, with an expression for each route there.

    A request with a query, an expectation, or for an application with middlewares goes the long way.
    """

    def __init__(self, app: web.Application) -> None:
        self._app, self._apps = app, [app]
        self._known: dict[tuple[str, str], tuple[web.AbstractRoute, dict[str, str]]] = {}

    async def handle(self, request: web.Request) -> web.StreamResponse:
        name = request._method, request._message.path
        known = self._known.get(name)
        if known is None or hdrs.EXPECT in request._headers:
            response = await self._app._handle(request)
            self._learn(name, request.match_info)
            return response
        route, found = known
        match = request._match_info = UrlMappingMatchInfo(found, route)
        match._apps, match._current_app, match._frozen = self._apps, self._app, True
        return await route.handler(request)

    def _learn(self, name: tuple[str, str], match: UrlMappingMatchInfo) -> None:
        path = name[1]
        if (
            match.http_exception
            or self._app.middlewares
            or len(match.apps) > 1
            or "?" in path
            or len(path) > MAX_PATH_CHARS
        ):
            return
        if len(self._known) >= MAX_PATHS:
            self._known.pop(next(iter(self._known)))
        self._known[name] = match.route, dict(match)


class QuickResponse(web.Response):
    """An answer of JSON whose head is made as one text, and sent with the body at once.

    That is done for HTTP/1.1 on a connection that stays; the result is what aiohttp would have sent.
    """

    _zlib_executor_size = MAX_SYNC_CHUNK_SIZE
    _zlib_executor = None

    def __init__(self, body: bytes, status: int, headers: Mapping[str, str]) -> None:
        every = CIMultiDict(headers)
        every[hdrs.CONTENT_TYPE] = "application/json; charset=utf-8"
        web.StreamResponse.__init__(self, status=status, _real_headers=every)
        self._body = body

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        match = request._match_info if isinstance(request, web.Request) else None
        body, headers = self._body, self._headers
        if match is None or not isinstance(body, bytes) or not self._is_plain(request._message):
            return await super().prepare(request)
        if len(match.current_app.on_response_prepare) > 1 or X_REQUEST_ID in headers or hdrs.SERVER in headers:
            await request._prepare_hook(self)
        if not "".join(headers.values()).isprintable():
            return await super().prepare(request)
        head = self._head(request_id_of(cast(web.Request, request)), len(body)).encode()
        self._keep_alive = self._eof_sent = True
        self._body_length = len(head) + len(body)
        writer = cast(StreamWriter, request._payload_writer)
        writer._write(head + body)
        await writer.drain()
        return None

    def _is_plain(self, message: RawRequestMessage) -> bool:
        headers = self._headers
        return (
            message.version == HttpVersion11
            and not message.should_close
            and message.method != hdrs.METH_HEAD
            and self._status not in _BODILESS
            and not (self._keep_alive is not None or self._cookies or self._compression or self._chunked)
            and not (self._eof_sent or self._payload_writer)
            and not (hdrs.CONNECTION in headers or hdrs.CONTENT_LENGTH in headers or hdrs.TRANSFER_ENCODING in headers)
        )

    def _head(self, request_id: str, length: int) -> str:
        headers = self._headers
        careful, named, dated = _added(tuple(headers))
        own = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
        ours = "" if named else f"Server: {SERVER}\r\nX-Request-Id: {request_id}\r\n"
        date = "" if dated else f"Date: {rfc822_formatted_time()}\r\n"
        return f"HTTP/1.1 {self._status} {self._reason}\r\n{own}{careful}{ours}{date}Content-Length: {length}\r\n\r\n"


@lru_cache(maxsize=256)
def _added(names: tuple[str, ...]) -> tuple[str, bool, bool]:
    """The careful headers that an answer with these has not, and whether it has an id and a date."""
    has = {name.lower() for name in names}
    careful = "".join([f"{name}: {value}\r\n" for name, value in CAREFUL.items() if name.lower() not in has])
    return careful, X_REQUEST_ID.lower() in has, hdrs.DATE.lower() in has
