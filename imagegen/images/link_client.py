"""GET requests of image links, straight over a session's connector: no redirects, no cookies, no credentials.

`ClientSession.get` costs 0.2 ms more for each image, a fifth of what a small one costs in all. Of aiohttp, the same
parts are used here as for the paid calls in `imagegen.providers.post`, and tests/images/test_fetch_wire.py holds them.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from typing import TypeVar

import aiohttp
from aiohttp.client_proto import ResponseHandler
from aiohttp.connector import Connection
from aiohttp.http import HttpProcessingError
from msgspec import Struct
from yarl import URL

from imagegen.body_receiver import BodyReceiver, next_piece
from imagegen.errors import forget_frames
from imagegen.response_filter import MAX_HEADERS, ResponseFilter
from imagegen.timer_line import TimerLine

T = TypeVar("T")

MAX_ORIGINS = 64
"""Origins of which the prepared request is kept."""

_READ_BYTES = 256 * 1024
_MAX_HEAD_BYTES = 64 * 1024


class LinkResponse(Struct, frozen=True, gc=False):
    """Response to a GET, of which the body is still to be read, as it was sent: compressed if the host did that.

    The names of its headers are in any case.
    """

    status: int
    headers: Mapping[str, str]
    content: aiohttp.StreamReader
    protocol: ResponseHandler
    stall_s: float

    def receiver(self, length: int) -> BodyReceiver:
        """Return the receiver of a body of this length."""
        return BodyReceiver(self.protocol, self.content, length, self.stall_s)

    @property
    def content_length(self) -> int | None:
        """The body's length in bytes as the host declared it; None if it did not, or sends it in chunks."""
        if "Transfer-Encoding" in self.headers:
            return None
        length = self.headers.get("Content-Length", "")
        return int(length) if length.isascii() and length.isdigit() and len(length) < 20 else None


class LinkBody:
    """Body of a response, read as far as it comes. error: that ended it too early; None if none did."""

    def __init__(self, response: LinkResponse) -> None:
        self.length = response.content_length
        self.error: aiohttp.ClientError | OSError | None = None
        self._response = response
        self._receiver: BodyReceiver | None = None

    @property
    def is_received(self) -> bool:
        """Whether nothing more comes of a body of declared length, which is read by `fill`."""
        return self.error is not None or (self._receiver is not None and not self._receiver.left)

    async def next_piece(self) -> bytes:
        """Return the next bytes as they come, none at the end."""
        try:
            return await next_piece(self._response.content)
        except (aiohttp.ClientError, OSError) as error:
            self._end(error)
            return b""

    async def rest(self) -> bytes:
        """Return the rest of a small body."""
        content = self._response.content
        if content.is_eof() and content.exception() is None:  # all of it has come, as that of a small image mostly has
            return content.read_nowait()
        pieces = []
        while piece := await self.next_piece():
            pieces.append(piece)
        return b"".join(pieces)

    async def fill(self, buffer: memoryview) -> memoryview:
        """Return the next bytes of a body of declared length, in `buffer`, which is full but for the end."""
        receiver = self._receiver = self._receiver or self._response.receiver(self.length or 0)
        left = receiver.left
        try:
            await receiver.fill(buffer)
        except (aiohttp.ClientError, OSError) as error:
            self._end(error)
        return buffer[: left - receiver.left]

    def take_error(self) -> aiohttp.ClientError | OSError | None:
        """Return the error, and forget it: raised, it refers to frames that refer to this body."""
        error, self.error = self.error, None
        return error

    def _end(self, error: aiohttp.ClientError | OSError) -> None:
        forget_frames(error)  # they form a cycle with this body, and would hold what came until a garbage collection
        self.error = error


class LinkClient:
    """Client for GET requests with the same headers to many hosts.

    Args:
        session: its connector is used.
        headers: of each request.
        stall_s: limit of a connect, and of the time without a byte.
    """

    def __init__(self, session: aiohttp.ClientSession, headers: Mapping[str, str], stall_s: float) -> None:
        self._session = session
        self._headers = headers
        self._stalls = TimerLine(stall_s)
        self._timeout = aiohttp.ClientTimeout(total=None, sock_connect=stall_s, sock_read=stall_s)
        self._origins: OrderedDict[tuple[str, str], _Origin] = OrderedDict()

    async def get(self, url: URL, read: Callable[[LinkResponse], Awaitable[T]]) -> T:
        """Return what `read` makes of the response. The connection is used again if the body was read to its end.

        A connection that the host closed while it was idle is replaced once.

        Raises: aiohttp.ClientError, OSError.
        """
        try:
            connection, response = await self._open(url)
        except (aiohttp.ClientConnectorError, aiohttp.ServerTimeoutError):
            raise
        except (aiohttp.ServerDisconnectedError, ConnectionError):
            connection, response = await self._open(url)
        try:
            result = await read(response)
        except BaseException:
            connection.close()
            raise
        connection.release()
        return result

    async def _open(self, url: URL) -> tuple[Connection, LinkResponse]:
        connector = self._session.connector
        if connector is None:
            raise aiohttp.ClientConnectionError("the session is closed")
        origin = self._origin(url)
        connection = await connector.connect(origin.request, [], self._timeout)
        try:
            return connection, await self._exchange(connection, origin.head(url))
        except HttpProcessingError as error:
            connection.close()
            raise aiohttp.ClientPayloadError("the response is not HTTP") from error
        except BaseException:
            connection.close()
            raise

    async def _exchange(self, connection: Connection, head: bytes) -> LinkResponse:
        protocol, transport = connection.protocol, connection.transport
        if protocol is None or transport is None or transport.is_closing():
            raise aiohttp.ServerDisconnectedError
        protocol.set_response_params(
            read_until_eof=True,
            auto_decompress=False,
            read_bufsize=_READ_BYTES,
            max_line_size=_MAX_HEAD_BYTES,
            max_field_size=_MAX_HEAD_BYTES,
            max_headers=MAX_HEADERS,
        )
        response = ResponseFilter(protocol, transport, self._stalls)
        transport.write(head)
        message, content = await response.read()
        return LinkResponse(message.code, message.headers, content, protocol, self._stalls.duration_s)

    def _origin(self, url: URL) -> _Origin:
        key = (url.scheme, url.raw_authority)
        origin = self._origins.get(key)
        if origin is None:
            loop = asyncio.get_running_loop()
            origin = _Origin(aiohttp.ClientRequest("GET", url.origin(), headers=self._headers, loop=loop))
            self._origins[key] = origin
            if len(self._origins) > MAX_ORIGINS:
                self._origins.popitem(last=False)
        return origin


class _Origin:
    """Requests to one origin. request: everything that the connector needs, and the headers."""

    def __init__(self, request: aiohttp.ClientRequest) -> None:
        self.request = request
        self._proxy: URL | None = None
        self._headers = b""

    def head(self, url: URL) -> bytes:
        """Return a request's head, after the connector has set the proxy: through one without TLS, its target is the
        whole address.
        """
        request = self.request
        if not self._headers or request.proxy != self._proxy:
            self._headers = _headers(request)
            self._proxy = request.proxy
        target = str(url.with_fragment(None)) if request.proxy and not request.is_ssl() else url.raw_path_qs
        if not target.isprintable():
            raise aiohttp.InvalidURL(url)
        return b"GET %b HTTP/1.1\r\n%b" % (target.encode(), self._headers)


def _headers(request: aiohttp.ClientRequest) -> bytes:
    lines = [f"{name}: {value}" for name, value in request.headers.items()]
    if not all(map(str.isprintable, lines)):
        raise aiohttp.InvalidURL(request.url)
    return ("\r\n".join(lines) + "\r\n\r\n").encode()
