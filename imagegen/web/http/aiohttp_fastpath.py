"""Owns the short cuts through aiohttp: the one file that uses its private names to save time.

Where aiohttp does more than our answers need, less is done here, with the same result on the wire. All else goes the
long way. tests/web/test_shortcuts.py compares the two, so that a new aiohttp can't change one of them unseen.
"""

# ruff: noqa: SLF001

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from functools import cached_property, lru_cache
from typing import cast

from aiohttp import HttpVersion11, hdrs, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.compression_utils import MAX_SYNC_CHUNK_SIZE
from aiohttp.helpers import rfc822_formatted_time
from aiohttp.http_parser import RawRequestMessage
from aiohttp.http_writer import StreamWriter
from aiohttp.web_response import REASON_PHRASES
from aiohttp.web_urldispatcher import UrlMappingMatchInfo
from msgspec import Struct
from multidict import CIMultiDict
from yarl import URL

from imagegen.web.http.headers import SECURITY_HEADERS, SERVER, X_REQUEST_ID, request_id_of

MAX_PATHS, MAX_PATH_CHARS = 2_000, 200

_BODILESS = frozenset({204, 304})
_BUFFERS = (bytes, memoryview)


class RouteCache:
    """Runs the handler of a request. What aiohttp's router found for a path lately is true of it again, as its table
    is frozen; the search walks up the path, with an expression for each route there.

    What follows a question mark has no part in it. A request with an expectation, or for an application with
    middlewares, goes the long way.
    tidy: maps a raw path, without its query, to the one that is looked up.
    """

    def __init__(self, app: web.Application, tidy: Callable[[str], str] = str) -> None:
        self._app, self._apps, self._tidy = app, [app], tidy
        self._known: dict[tuple[str, str], tuple[web.AbstractRoute, dict[str, str]]] = {}

    def handle(self, request: web.Request) -> Awaitable[web.StreamResponse]:
        known = self._known.get((request._method, request._message.path.partition("?")[0]))
        if known is None or hdrs.EXPECT in request._headers:
            return self._handle_unknown(request)
        route, found = known
        match = request._match_info = UrlMappingMatchInfo(found, route)
        match._apps, match._current_app, match._frozen = self._apps, self._app, True
        return route._handler(request)

    async def _handle_unknown(self, request: web.Request) -> web.StreamResponse:
        raw_path = request._rel_url.raw_path
        if (path := self._tidy(raw_path)) != raw_path:
            query = request._rel_url.raw_query_string
            request._rel_url = URL.build(path=path, query_string=query, encoded=True)
        response = await self._app._handle(request)
        self._remember(request)
        return response

    def _remember(self, request: web.Request) -> None:
        name, match = (request._method, request._message.path.partition("?")[0]), request.match_info
        path = name[1]
        if match.http_exception or self._app.middlewares or len(match.apps) > 1 or len(path) > MAX_PATH_CHARS:
            return
        if len(self._known) >= MAX_PATHS:
            self._known.pop(next(iter(self._known)))
        self._known[name] = match.route, dict(match)


def route_of(request: web.Request) -> web.AbstractRoute | None:
    """What was found for it; None where nothing was looked up."""
    match = request._match_info
    return None if match is None else match._route


class FastJsonResponse(web.Response):
    """An answer, of JSON or an image, whose head is made as one text, and sent with the body at once.

    That is done for HTTP/1.1 on a connection that stays; the result is what aiohttp would have sent.
    headers: no name comes twice, whatever its case; without a Content-Type, it is JSON.
    """

    _zlib_executor_size = MAX_SYNC_CHUNK_SIZE
    _zlib_executor = None

    def __init__(self, body: bytes | memoryview, status: int, headers: Mapping[str, str]) -> None:
        self._state = {}
        self._body, self._status, self._reason = cast(bytes, body), status, REASON_PHRASES.get(status, "")
        self._given = {**headers}
        self._given.setdefault(hdrs.CONTENT_TYPE, "application/json; charset=utf-8")

    @cached_property
    def _headers(self) -> CIMultiDict[str]:  # type: ignore[override]
        """Made for who looks at them or adds some."""
        return CIMultiDict(self._given)

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        match = request._match_info if isinstance(request, web.Request) else None
        body = self._body
        if match is None or not isinstance(body, _BUFFERS) or not self._is_plain(request._message):
            return await super().prepare(request)
        headers, fixed = self._headers_and_fixed()
        if fixed.named or len(match._apps[0].on_response_prepare) > 1:
            await request._prepare_hook(self)
            headers, fixed = self._headers_and_fixed()
        own = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
        if fixed.framed or own.count("\r\n") != len(headers) or not own.replace("\r\n", "").isprintable():
            return await super().prepare(request)
        if not fixed.named:
            own = f"{own}X-Request-Id: {request_id_of(cast(web.Request, request))}\r\n"
        date = "" if fixed.dated else f"Date: {rfc822_formatted_time()}\r\n"
        head = f"{fixed.start}{own}{fixed.more}{date}Content-Length: {len(body)}\r\n\r\n".encode()
        self._keep_alive = self._eof_sent = True
        self._body_length = len(head) + len(body)
        await self._send(request, head, body)
        return None

    async def _send(self, request: web.BaseRequest, head: bytes, body: bytes | memoryview) -> None:
        """Send the response, and wait until little enough of it is left to be sent."""
        writer = cast(StreamWriter, request._payload_writer)
        writer._write(head + body)
        if request._protocol._paused:
            await writer.drain()

    def _is_plain(self, message: RawRequestMessage) -> bool:
        return (
            message.version == HttpVersion11
            and not message.should_close
            and message.method != hdrs.METH_HEAD
            and self._status not in _BODILESS
            and not (self._keep_alive is not None or self._cookies or self._compression or self._chunked)
            and not (self._eof_sent or self._payload_writer)
        )

    def _headers_and_fixed(self) -> tuple[Mapping[str, str], _Fixed]:
        headers = self._headers if "_headers" in self.__dict__ else self._given
        return headers, _fixed(self._status, self._reason, tuple(headers))


class _Fixed(Struct, frozen=True, gc=False):
    """What of a head is the same for all answers with headers of these names.

    start: the first line; more: the careful headers that are not among them, and the server's name.
    named: whether an id or a server's name is among them; dated: whether a date is.
    framed: whether aiohttp has to see to the meaning of some.
    """

    start: str
    more: str
    named: bool
    dated: bool
    framed: bool


@lru_cache(maxsize=256)
def _fixed(status: int, reason: str, names: tuple[str, ...]) -> _Fixed:
    has = {name.lower() for name in names}
    named = bool(has & {X_REQUEST_ID.lower(), hdrs.SERVER.lower()})
    more = "".join([f"{name}: {value}\r\n" for name, value in SECURITY_HEADERS.items() if name.lower() not in has])
    return _Fixed(
        start=f"HTTP/1.1 {status} {reason}\r\n",
        more=more if named else f"{more}Server: {SERVER}\r\n",
        named=named,
        dated=hdrs.DATE.lower() in has,
        framed=bool(has & {hdrs.CONNECTION.lower(), hdrs.CONTENT_LENGTH.lower(), hdrs.TRANSFER_ENCODING.lower()}),
    )
