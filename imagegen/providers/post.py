"""One paid POST, written in one piece, so that the caller learns whether it was sent.

`ClientSession.request` costs four times as much (about 0.1 ms of each paid call), most of it for features that a paid
call must not have: redirects, cookies, repeats, credentials of other hosts. This module, and no other, uses the layer
below it: the connector (pool, names, TLS, time limits), a connection's protocol and parser, the reader of a body. They
have public names, but aiohttp's documentation does not promise them, so tests/providers/test_post*.py hold the use.
"""

from __future__ import annotations

import asyncio
import re
import select
from collections.abc import Awaitable, Callable, Mapping
from contextlib import aclosing
from functools import cached_property
from typing import Any
from weakref import WeakSet

import aiohttp
from aiohttp.client_proto import ResponseHandler
from aiohttp.connector import Connection
from aiohttp.http import RawResponseMessage, StreamWriter
from msgspec import Struct
from yarl import URL

from imagegen.providers.input_bodies import Body, StreamedBody
from imagegen.providers.response_body import ResponseBody
from imagegen.proxies import Proxies, ProxyConnector
from imagegen.response_filter import MAX_HEADERS, ResponseFilter
from imagegen.timer_line import TimeLimit, TimerLine

_CONNECT_S = 10.0
MAX_RESPONSE_HEAD_BYTES = 2**16
"""Of each header's value: policies and cookies of gateways have passed the usual 8 KiB, and the image is paid for."""

_READ_BYTES = 2**18

_LAST_WORD_S = 1.0
"""How long a response may still come after its connection took no more of the request."""

_NOT_IN_A_HEADER = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")


class NotSent(Exception):
    """No byte of the request has left, so nothing can have been paid for; the cause is why."""


class PartlySent(Exception):
    """The connection or the time ended before the whole request was sent, so nothing was paid for; the cause is why."""


class RawResponse(Struct, frozen=True, gc=False):
    """Response of an upstream, not parsed yet.

    headers: their names in any case, as aiohttp's are.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes | bytearray


class UpstreamConnector(ProxyConnector):
    """Connector of requests to providers that may be repeated, such as polls; `paid` is that of paid calls.

    A request on a connection that the upstream closes at that moment counts as sent. aiohttp repeats a GET then, so
    its connections are kept for longer: each new one costs a TLS handshake.
    """

    def __init__(self, paid: aiohttp.BaseConnector, proxies: Proxies, **options: Any) -> None:
        super().__init__(proxies, **options)
        self.paid = paid


class PaidPost:
    """One URL, and the headers that go with each request to it and to no other host.

    session: its connector is used. timeout_s: over everything, from the wait for a connection to the body's last byte.
    """

    def __init__(self, session: aiohttp.ClientSession, url: URL, headers: Mapping[str, str], timeout_s: float) -> None:
        self._session = session
        self._url = url
        self._headers = headers
        self._time_limits = TimerLine(timeout_s)
        self._connect_timeout = connect_timeout(timeout_s)

    async def send(
        self,
        body: Body,
        on_sent: Callable[[], None],
        on_sending: Callable[[], Awaitable[None] | None] = lambda: None,
    ) -> RawResponse:
        """Send the request and return its response. on_sent: called when the system has taken the whole request.
        on_sending: returns what is awaited before its first byte, on an open connection.

        Raises NotSent, PartlySent; of a request that was sent TimeoutError, aiohttp.ClientError, OSError or, where the
        answer is not HTTP, HttpProcessingError. Raises UpstreamError for a body that is over the limit or can't be
        decompressed, and for an input image that can't be read.
        """
        sending = _Sending(body, on_sent, on_sending)
        try:
            with TimeLimit(self._time_limits):
                return await self._send(sending)
        except (aiohttp.ClientError, OSError) as error:
            if isinstance(error, TimeoutError) and not sending.begun:
                raise NotSent from error
            if isinstance(error, TimeoutError) and not sending.done:
                raise PartlySent from error
            if (answer := await sending.whole_part()) is None:
                raise
            return answer
        finally:
            sending.release_body()

    async def _send(self, sending: _Sending) -> RawResponse:
        connection = await self._connect()
        try:
            if wait := sending.on_sending():
                await wait
            answer = await self._exchange(connection, sending)
        except BaseException:
            connection.close()
            raise
        unsent = connection.transport is not None and connection.transport.get_write_buffer_size()
        if unsent or not sending.done:
            connection.close()  # answered before all of it was sent: the rest would precede the next request
        if connection.protocol is not None:
            _kept.add(connection.protocol)
        connection.release()
        return answer

    async def _connect(self) -> Connection:
        """Take a free connection or a new one, within a shorter time limit than the whole.

        A free one with anything to read is closed: it has no request that a response could be for.
        """
        while _has_unasked_data(connection := await self._next_connection()):
            connection.close()
        return connection

    async def _next_connection(self) -> Connection:
        connector = self._session.connector
        if isinstance(connector, UpstreamConnector):
            connector = connector.paid
        if connector is None:
            raise NotSent
        try:
            if self._url.scheme not in connector.allowed_protocol_schema_set:
                raise aiohttp.NonHttpUrlClientError(self._url)
            return await connector.connect(self._request, [], self._connect_timeout)
        except (aiohttp.ClientError, OSError) as error:
            raise NotSent from error

    async def _exchange(self, connection: Connection, sending: _Sending) -> RawResponse:
        protocol, transport = connection.protocol, connection.transport
        if protocol is None or transport is None or transport.is_closing():
            raise NotSent
        protocol.set_response_params(
            read_until_eof=True,
            read_bufsize=_READ_BYTES,
            auto_decompress=False,
            max_line_size=MAX_RESPONSE_HEAD_BYTES,
            max_field_size=MAX_RESPONSE_HEAD_BYTES,
            max_headers=MAX_HEADERS,
        )
        response = ResponseFilter(protocol, transport)
        message, content = await sending.exchange(protocol, transport, self._head, response)
        return await sending.read(message, content, protocol)

    @cached_property
    def _request(self) -> aiohttp.ClientRequest:
        """Return the request that the connector needs, with aiohttp's own headers. Raises InvalidURL."""
        return aiohttp.ClientRequest("POST", self._url, headers=self._headers, loop=asyncio.get_running_loop())

    @cached_property
    def _head(self) -> bytes:
        """Return the head without the length of the body; made after the connector has set the proxy."""
        headers = [(name, value) for name, value in self._request.headers.items() if name != "Content-Length"]
        if any(_NOT_IN_A_HEADER.search(name + value) for name, value in headers):
            raise ValueError("a header has control characters")
        target = str(self._url) if self._request.proxy and not self._request.is_ssl() else self._url.raw_path_qs
        lines = [f"POST {target} HTTP/1.1", *(f"{name}: {value}" for name, value in headers)]
        return "\r\n".join([*lines, "Content-Length: "]).encode()


_kept: WeakSet[ResponseHandler] = WeakSet()
"""Protocols of the connections that had a request before."""


def _has_unasked_data(connection: Connection) -> bool:
    """Return whether a kept connection was closed, or has sent something since its last response.

    The upstream may have done so in this turn of the event loop: then the request would count as sent. Servers also
    send a 408 before they close an idle connection, which would be taken for the response.
    """
    protocol, transport = connection.protocol, connection.transport
    if protocol is None or transport is None or protocol not in _kept:
        return False
    poll = select.poll()
    poll.register(transport.get_extra_info("socket"), select.POLLIN)
    return protocol.should_close or bool(poll.poll(0))


class _Sending:
    """One request on its way. begun, done: whether its first and its last byte were handed to the system."""

    def __init__(
        self, body: Body, on_sent: Callable[[], None], on_sending: Callable[[], Awaitable[None] | None]
    ) -> None:
        self._body = body
        self._on_sent = on_sent
        self.on_sending = on_sending
        self.begun = self.done = False
        self._response: tuple[RawResponseMessage, ResponseBody] | None = None

    async def exchange(
        self, protocol: ResponseHandler, transport: asyncio.Transport, head: bytes, response: ResponseFilter
    ) -> tuple[RawResponseMessage, aiohttp.StreamReader]:
        """Send the request and return the head of its response, which may come before all of it was sent."""
        body = self._body
        self.begun = True
        if isinstance(body, bytes):
            transport.write(b"%b%d\r\n\r\n%b" % (head, len(body), body))
            self._finish()
            return await response.read()
        transport.write(b"%b%d\r\n\r\n" % (head, len(body)))
        writing = asyncio.create_task(self._write(protocol, body))
        reading = asyncio.create_task(response.read())
        try:
            await asyncio.wait((writing, reading), return_when=asyncio.FIRST_COMPLETED)
            if writing.done() and not reading.done() and isinstance(writing.exception(), OSError):
                await asyncio.wait((reading,), timeout=_LAST_WORD_S)
            if reading.done() and reading.exception() is None:
                return reading.result()
            if not writing.done() or isinstance(writing.exception(), OSError):
                raise PartlySent from (writing.exception() if writing.done() else reading.exception())
            writing.result()
            return await reading
        finally:
            for task in (writing, reading):
                task.cancel()
            await asyncio.gather(writing, reading, return_exceptions=True)

    async def read(
        self, message: RawResponseMessage, content: aiohttp.StreamReader, protocol: ResponseHandler
    ) -> RawResponse:
        """Read the body of the response. Raises UpstreamError; as the connection."""
        body = ResponseBody(message.code, message.headers, content, protocol if self.done else None)
        self._response = message, body
        response = RawResponse(message.code, message.headers, await body.read())
        self._response = None
        return response

    async def whole_part(self) -> RawResponse | None:
        """Return a response that broke off if its body is complete in content; None otherwise. Raises UpstreamError."""
        if self._response is None:
            return None
        message, body = self._response
        if (part := await body.whole_part()) is None:
            return None
        self._response = None
        return RawResponse(message.code, message.headers, part)

    def release_body(self) -> None:
        """Free the memory of a body that could not be read: the traceback of an error would hold it."""
        if self._response is not None:
            self._response[1].release()

    async def _write(self, protocol: ResponseHandler, body: StreamedBody) -> None:
        writer = StreamWriter(protocol, asyncio.get_running_loop())
        async with aclosing(body.pieces()) as pieces:
            async for piece in pieces:
                await writer.write(piece)
        self._finish()

    def _finish(self) -> None:
        self.done = True
        self._on_sent()


def connect_timeout(timeout_s: float) -> aiohttp.ClientTimeout:
    """Return the limits of connecting, for a request that must end in `timeout_s`."""
    connect_s = min(_CONNECT_S, timeout_s / 2)
    return aiohttp.ClientTimeout(total=None, connect=connect_s, sock_connect=connect_s)
