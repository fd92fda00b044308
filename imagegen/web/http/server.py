"""Server connections: limits of a request's head, and error responses for what aiohttp's parser refuses."""

from __future__ import annotations

import asyncio
import re
from contextlib import suppress
from typing import Any, cast

from aiohttp import EMPTY_PAYLOAD, HttpVersion11, StreamReader, web
from aiohttp.http_exceptions import HttpProcessingError, LineTooLong
from aiohttp.http_parser import RawRequestMessage
from aiohttp.web_protocol import _ErrInfo
from loguru import logger

from imagegen.errors import ApiError, BadRequest, HeadersTooLarge, InternalError
from imagegen.web.http.connections import IDLE_S, MAX_CONNECTIONS, Connections, has_bytes_waiting
from imagegen.web.http.disconnect import end_wait, is_resumable, is_sending, is_waiting, notify_disconnect
from imagegen.web.http.half_closed import HalfClosedWatch, RequestsToTheEnd, notify_half_close
from imagegen.web.http.middleware import PIPELINE, RouteCache, response_on
from imagegen.web.http.responses import REQUEST_ID, fresh_request_id, refuse_route
from imagegen.web.http.unread import UnreadResponses

KEEPALIVE_S = 130.0
"""Longer than a proxy keeps an idle connection: if we closed first, its client would get a 502."""

HEAD_TIMEOUT_S = 10.0
MAX_HEAD_BYTES = 64 * 1024
"""Limit of the request line and all headers; aiohttp alone takes 128 headers of 8 KiB each."""

_HEAD_PIECE = MAX_HEAD_BYTES + 1
"""Bytes given to the parser before it shows whether a head ends in them."""

_LINE_BYTES = 256
_TARGET = re.compile(rb"(?:https?://[^/?\s]*)?(/[!-~]*?)(?:[?\s]|$)")
"""Path of a request's target, in either form: https://www.rfc-editor.org/rfc/rfc9112#section-3.2"""

FIRST_READ_BYTES, READ_BYTES, SHORT_READS = 24 * 1024, 256 * 1024, 10
"""Bytes read from a connection in one turn of the event loop; the first full reads of a request are short.

With asyncio's own limit, `READ_BYTES`, the beginnings of 200 bodies that come at once take 47 ms in one turn, not 15.
Short reads alone would take 20 % more CPU for an upload of 6 MB.
"""

MAX_LONG_READERS = 16
"""Connections with long reads at once, each of which takes 0.4 ms of a turn."""

UNREAD_BODY_BYTES = 16 * 1024
"""Bytes of a body that make its connection wait until they are read. Of one that waits for memory, one read has come.

With aiohttp's own limit it is three, and 600 bodies of 1 MiB take 200 MiB before the first of them is read.
"""

HALF_CLOSED_S = 1.0
"""How long the response to a client of HTTP/1.0 that has closed its side is awaited: it can't be probed."""

LINGERING_S = 2.0
SHUTDOWN_S = 2.0


class ImagegenRunner(web.AppRunner):
    """Runner of an application in its pipeline, on our connections; takes the options of `web.AppRunner`.

    head_timeout_s: how long the head of a request may take from its first byte. idle_s: how long a connection may
    stay open without one. max_connections: see `connections`. unread: bounds what clients do not read.
    """

    def __init__(
        self,
        app: web.Application,
        *,
        head_timeout_s: float = HEAD_TIMEOUT_S,
        idle_s: float = IDLE_S,
        max_connections: int = MAX_CONNECTIONS,
        unread: UnreadResponses | None = None,
        **options: Any,
    ) -> None:
        defaults: dict[str, Any] = {
            "access_log": None,
            "auto_decompress": False,
            "keepalive_timeout": KEEPALIVE_S,
            "lingering_time": LINGERING_S,
            "read_bufsize": UNREAD_BODY_BYTES // 2,  # twice as much pauses the connection
            "shutdown_timeout": SHUTDOWN_S,
        }
        super().__init__(app, **{**defaults, **options})
        self._head_timeout_s = head_timeout_s
        self.connections = Connections(max_connections, idle_s=idle_s)
        self._unread = unread or UnreadResponses()

    async def cleanup(self) -> None:
        self.connections.close()
        await super().cleanup()

    async def _make_server(self) -> web.Server:
        server, pipeline = await super()._make_server(), self.app[PIPELINE]
        return _Server(
            pipeline.wrap(RouteCache(self.app, pipeline.tidy_path).handle, self.app),
            request_factory=server.request_factory,
            app=self.app,
            head_timeout_s=self._head_timeout_s,
            connections=self.connections,
            unread=self._unread,
            **self._kwargs,
        )


class _Server(web.Server):
    def __call__(self) -> web.RequestHandler:
        return _Connection(self, loop=asyncio.get_running_loop(), **self._kwargs)


class _Connection(web.RequestHandler):
    __slots__ = (
        "_app",
        "_body",
        "_connections",
        "_full_reads",
        "_head_bytes",
        "_head_timeout_s",
        "_head_timer",
        "_long_reads",
        "_paused_transport",
        "_request_line",
        "_takes_probes",
        "_unread",
        "_used",
        "_watch",
        "address",
        "half_closed",
    )

    def __init__(
        self,
        manager: web.Server,
        *,
        app: web.Application,
        head_timeout_s: float,
        connections: Connections,
        unread: UnreadResponses,
        **options: Any,
    ) -> None:
        super().__init__(manager, **options)
        self._app = app
        self._connections = connections
        self._unread = unread
        self._paused_transport: asyncio.Transport | None = None
        self._used = False
        self.address = ""
        self._head_timeout_s = head_timeout_s
        self._head_timer: asyncio.TimerHandle | None = None
        self._head_bytes = 0
        self._request_line = b""
        self._full_reads = 0
        self._long_reads = False
        self._takes_probes = False
        self._watch: HalfClosedWatch | None = None
        self.half_closed = False
        self._body: StreamReader = EMPTY_PAYLOAD

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        peer = transport.get_extra_info("peername")
        self.address = str(peer[0]) if peer else ""
        self._connections.add(self)
        cast(asyncio.Transport, transport).set_write_buffer_limits(high=0)  # any unread byte pauses writing
        self._limit_reads(FIRST_READ_BYTES)

    def pause_writing(self) -> None:
        super().pause_writing()
        if (transport := self.transport) is not None:
            self._paused_transport = transport
            self._unread.begin(transport, self.address)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._end_unread()

    def _end_unread(self) -> None:
        if self._paused_transport is not None:
            self._unread.end(self._paused_transport)
            self._paused_transport = None

    def force_close(self) -> None:
        """Close the connection, without waiting for a client that does not read."""
        super().force_close()
        if self._paused_transport is not None:
            self._paused_transport.abort()

    @property
    def idle(self) -> bool:
        """Return whether it waits for a request."""
        return self._waiter is not None and not self._waiter.done()

    @property
    def has_unread(self) -> bool:
        """Return whether bytes came that were not read yet."""
        return self.transport is not None and has_bytes_waiting(self.transport.get_extra_info("socket").fileno())

    @property
    def receiving(self) -> bool:
        """Return whether the rest of a request's body is to come."""
        return not self._body.is_eof()

    @property
    def resumable(self) -> bool:
        """Return whether its client continues after a reconnect where the response broke off."""
        return is_resumable(self._current_request)

    @property
    def waiting(self) -> bool:
        """Return whether its client waits for a change."""
        return is_waiting(self._current_request)

    def end_wait(self) -> None:
        """Answer the client that waits, and close the connection."""
        self.close()  # after the response
        end_wait(self._current_request)

    @property
    def head_begun(self) -> bool:
        """Return whether a part of a request's head came."""
        return self._head_timer is not None

    def _limit_reads(self, max_bytes: int) -> None:
        if self.transport is not None:
            self.transport.max_size = max_bytes  # type: ignore[attr-defined]

    def _lengthen_reads(self) -> None:
        """Let the rest of a large body come in long reads, unless many others do."""
        if not self._long_reads and self._connections.long_readers < MAX_LONG_READERS:
            self._long_reads = True
            self._connections.long_readers += 1
            self._limit_reads(READ_BYTES)

    def _shorten_reads(self) -> None:
        if self._long_reads:
            self._long_reads = False
            self._connections.long_readers -= 1
            self._limit_reads(FIRST_READ_BYTES)

    def data_received(self, data: bytes) -> None:
        if self._head_bytes > MAX_HEAD_BYTES:
            return
        if len(data) >= FIRST_READ_BYTES:
            self._full_reads += 1
            if self._full_reads >= SHORT_READS:
                self._lengthen_reads()
        if len(data) > _HEAD_PIECE and self._body.is_eof():  # asyncio reads up to 256 KiB at once
            self.data_received(data[:_HEAD_PIECE])
            data = data[_HEAD_PIECE:]
            if self._head_bytes > MAX_HEAD_BYTES:
                return
        count, reads_head = self._request_count, self._body.is_eof()
        super().data_received(data)
        self._bound_head(data, self._request_count - count, reads_head=reads_head)
        if self._body.is_eof():
            self._shorten_reads()
        if not self._used and self._request_count:
            self._used = True
            self._connections.use(self)
        waiter = self._waiter
        awaits_head = self._request_count == 0 if waiter is None else not waiter.done()
        if not awaits_head:
            self._stop_head_timer()
        elif self._head_timer is None and data.strip(b"\r\n"):
            self._head_timer = asyncio.get_running_loop().call_later(self._head_timeout_s, self._give_up_head)

    def _bound_head(self, data: bytes, new_messages: int, *, reads_head: bool) -> None:
        """Refuse a head over `MAX_HEAD_BYTES`, whether it is complete or not.

        Args:
            data: given to the parser, which shows neither where a head ends nor how much of one it holds.
            new_messages: messages that the parser made of it.
            reads_head: whether no body was under way before.
        """
        if new_messages:
            if self._head_bytes + len(data) > MAX_HEAD_BYTES:
                self._refuse_long_heads(new_messages)
            message, self._body = self._messages[-1]
            if isinstance(message, _ErrInfo) and reads_head and new_messages == 1:
                self._note_request_line(data)
            self._head_bytes = 0
            if self._full_reads:
                self._full_reads = 0
                self._shorten_reads()
            if isinstance(message, _ErrInfo):
                self._messages[-1] = message, self._drop_rest()
                self._takes_probes = False
            else:
                self._takes_probes = message.version >= HttpVersion11
        elif not reads_head or self._upgraded:
            self._head_bytes = 0
        else:
            self._note_request_line(data)
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._add_refusal()

    def _note_request_line(self, data: bytes) -> None:
        """Keep the first bytes of a head, of which `data` is the next piece."""
        kept = self._request_line if self._head_bytes else b""
        self._request_line = kept + data[: _LINE_BYTES - len(kept)]

    def _refuse_long_heads(self, new_messages: int) -> None:
        messages = [self._messages.pop() for _ in range(new_messages)]
        for message, body in reversed(messages):
            too_long = not isinstance(message, _ErrInfo) and _head_bytes(message) > MAX_HEAD_BYTES
            self._messages.append((_too_long() if too_long else message, body))

    def _add_refusal(self) -> None:
        self._request_count += 1
        self._messages.append((_too_long(), self._drop_rest()))
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _drop_rest(self) -> StreamReader:
        """Return a body of what follows: it is read, dropped and lingered for, since a reset undoes the answer."""
        self._head_bytes = MAX_HEAD_BYTES + 1
        self._body = StreamReader(self, 1, loop=asyncio.get_running_loop())
        return self._body

    def _end_writing(self) -> None:
        """Let the client see the end of the response while the rest of its request is dropped."""
        if self.transport is not None and self.transport.can_write_eof() and not self.transport.is_closing():
            with suppress(OSError):  # the client has reset the connection
                self.transport.write_eof()

    def resume_reading(self, resume_parser: bool = True) -> None:  # noqa: FBT001, FBT002 - aiohttp's signature
        """Resume only if reading was paused: aiohttp calls it after each body and would run its parser for nothing."""
        if self._reading_paused:
            super().resume_reading(resume_parser)

    def eof_received(self) -> bool:  # type: ignore[override]
        """Return whether the connection stays open, for the responses to requests that have come whole."""
        super().eof_received()
        if self._head_bytes > MAX_HEAD_BYTES:
            self._body.feed_eof()  # the rest of a refused head has come
        if self.idle or self.receiving or self.transport is None:
            return False
        self.half_closed = True
        if self._messages:
            self._messages = RequestsToTheEnd(self._messages, self.close)
        else:
            self.close()  # after the response
        if self._takes_probes:
            self._watch = HalfClosedWatch(self.transport, self._can_probe)
        else:
            asyncio.get_running_loop().call_later(HALF_CLOSED_S, self._leave_half_closed)
        notify_half_close(self._current_request)
        return True

    def _can_probe(self) -> bool:
        """Return whether a request is handled, and its response has not begun."""
        request = self._current_request
        return request is not None and not (request.writer.output_size or is_sending(request))

    def _leave_half_closed(self) -> None:
        """Close the connection unless a response is on its way."""
        if self.transport is None or self.transport.get_write_buffer_size() or is_sending(self._current_request):
            return
        self.transport.close()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._stop_head_timer()
        self._shorten_reads()
        if self._watch is not None:
            self._watch.stop()
        self._connections.discard(self)
        self._end_unread()
        request = self._current_request
        super().connection_lost(exc)
        if self._head_bytes > MAX_HEAD_BYTES:
            self._body.feed_eof()
        if request is not None:
            notify_disconnect(request)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,  # noqa: ARG002 - aiohttp's signature
        exc: BaseException | None = None,
        message: str | None = None,  # noqa: ARG002
    ) -> web.StreamResponse:
        """Answer what the parser refused, or an error that the pipeline let pass; repeat nothing of the client's."""
        if request.writer.output_size > 0:
            raise ConnectionError("The answer is already on its way")
        request_id = fresh_request_id()
        error: ApiError
        if isinstance(exc, HttpProcessingError):
            error = _refusal(exc)
            self._log_refusal(exc, request_id)
        else:
            error = InternalError()
            logger.opt(exception=exc).error("Unforeseen error outside of a handler, request {}", request_id)
        request._version = HttpVersion11  # noqa: SLF001 - aiohttp's placeholder for an unreadable request is HTTP/1.0
        path = self._app[PIPELINE].tidy_path(_path_of(self._request_line))
        response = response_on(path, error, request_id, "zh")
        response.force_close()
        asyncio.get_running_loop().call_soon(self._end_writing)  # after the response, which is written in this turn
        request[REQUEST_ID] = request_id
        refuse_route(cast(web.Request, request), self._app)
        return response

    def log_exception(self, *args: Any, **options: Any) -> None:
        """Log nothing of a body's bad framing: aiohttp's own trace quotes the body."""
        error = options.get("exc_info")
        if isinstance(error, (HttpProcessingError, web.RequestPayloadError)):
            self._log_refusal(error, "-")
        else:
            super().log_exception(*args, **options)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _log_refusal(self, error: Exception, request_id: str) -> None:
        name = type(error).__name__
        if self._connections.refused.admits(name):
            logger.info("Refused a request that is no HTTP: {}, request {}", name, request_id)

    def _give_up_head(self) -> None:
        self._head_timer = None
        if self._connections.slow_heads.begins():
            logger.info("A request head took too long: connection closed")
        self.force_close()


def _path_of(request_line: bytes) -> str:
    """Return the path of a request that the parser refused, as far as it can be read; `/` if it can't."""
    words = request_line.lstrip(b"\r\n").partition(b"\n")[0].split(b" ", 2)
    match = _TARGET.match(words[1]) if len(words) > 1 else None
    return "/" if match is None else match[1].decode("ascii")


def _head_bytes(message: RawRequestMessage) -> int:
    return len(message.path) + sum(len(name) + len(value) + len(": \r\n") for name, value in message.raw_headers)


def _too_long() -> _ErrInfo:
    error = LineTooLong(b"", MAX_HEAD_BYTES)
    return _ErrInfo(status=error.code, exc=error, message=error.message)


def _refusal(error: HttpProcessingError) -> ApiError:
    if isinstance(error, LineTooLong) or error.message.startswith("Too many headers"):
        return HeadersTooLarge()
    return BadRequest()
