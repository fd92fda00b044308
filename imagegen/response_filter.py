"""Filter before aiohttp's parser for responses with heads that it refuses, and for bodies with ends that it drops.

What answers a paid call, or the link of a paid image, is read even if a proxy writes a head that is no HTTP to the
letter: https://www.rfc-editor.org/rfc/rfc9112.html#name-field-syntax
"""

from __future__ import annotations

import asyncio
import re
from functools import partial

import aiohttp
from aiohttp.client_proto import ResponseHandler
from aiohttp.http import RawResponseMessage

from imagegen.timer_line import LineTimer, TimerLine

MAX_HEAD_BYTES = 2**18
MAX_HEADERS = 4_096
_MAX_LINE_BYTES = 2**15

_STATUS_LINE = re.compile(rb"HTTP/[0-9](?:\.[0-9])?[ \t]+([0-9]{3})(?![0-9])([^\r\n]*)")
_HEAD_END = re.compile(rb"\r?\n\r?\n")
_HEAD_END_BYTES = 4
_LINE_END = re.compile(rb"\r?\n(?![ \t])")
_FIELD = re.compile(rb"\s*([!#$%&'*+.^_`|~0-9A-Za-z-]+)[ \t]*:(.*)", re.DOTALL)
_CONTROLS = re.compile(rb"[\x00-\x1f\x7f]+")
_REGULAR = re.compile(
    rb"HTTP/1\.[01] [2-9][0-9]{2} [\t\x20-\x7e\x80-\xff]{0,200}\r\n"
    rb"(?:[!#$%&'*+.^_`|~0-9A-Za-z-]{1,200}:[\t\x20-\x7e\x80-\xff]{0,8000}\r\n)*"
)
_WHOLE_REGULAR = re.compile(_REGULAR.pattern + rb"\r\n")
_FRAMING = re.compile(rb"\n(content-length|transfer-encoding)[ \t]*:[ \t]*([^\r\n]*)", re.IGNORECASE)
_LENGTH = re.compile(rb"[0-9]{1,15}")
_RESPONSE_START = b"HTTP/1."
_HTTP = b"HTTP/"


class ResponseFilter(asyncio.Protocol):
    """Protocol of a connection in place of aiohttp's, from before a request until the next one.

    It leaves out informational responses, and repairs an irregular head. The head is passed on alone, so that what
    follows the body in the same packet costs the connection, not the response. Bytes of the body are passed on as they
    come.

    Args:
        protocol: aiohttp's, of a connection that has no unread bytes, with the parameters of its response set.
        transport: of the connection.
        stalls: timers of the time without a byte, until the body ends; None: no limit. aiohttp's own timer is set again
            for each piece, which costs a small image a per cent.
    """

    def __init__(
        self, protocol: ResponseHandler, transport: asyncio.Transport, stalls: TimerLine | None = None
    ) -> None:
        self._protocol = protocol
        self._transport = transport
        self._has_passed_head = False
        self._start = bytearray()
        self._searched = 0
        self._body: aiohttp.StreamReader | None = None
        self._timer: LineTimer | asyncio.TimerHandle | None = None
        self._moved_at_s = 0.0
        if stalls is not None:
            self._loop = asyncio.get_running_loop()
            self._moved_at_s = self._loop.time()
            self._timer = stalls.begin(partial(self._check_stall, stalls.duration_s))
        transport.set_protocol(self)

    async def read(self) -> tuple[RawResponseMessage, aiohttp.StreamReader]:
        """Return the head and the body of the response. Raises as the connection; HttpProcessingError."""
        message, self._body = await self._protocol.read()
        self._end_body()
        if self._timer is not None:
            self._body.on_eof(self._timer.cancel)
        return message, self._body

    def data_received(self, data: bytes) -> None:
        if self._timer is not None:
            self._moved_at_s = self._loop.time()
        if self._has_passed_head or (not self._start and _is_usual(data)):
            self._has_passed_head = True
            self._protocol.data_received(data)
            return
        self._start += data
        while (end := _HEAD_END.search(self._start, self._searched)) is not None:
            head = bytes(self._start[: end.start()]) + b"\r\n"
            del self._start[: end.end()]
            self._searched = 0
            if not _is_informational(head):
                self._pass_on(head if _is_regular(head, self._start) else _repaired(head, self._start))
                return
        self._searched = max(len(self._start) - _HEAD_END_BYTES, 0)
        if len(self._start) > MAX_HEAD_BYTES or not _may_be_http(self._start):
            self._pass_on(b"")

    def _pass_on(self, head: bytes) -> None:
        self._has_passed_head = True
        rest, self._start = bytes(self._start), bytearray()
        if head:
            self._protocol.data_received(head + b"\r\n")
        if rest:
            self._protocol.data_received(rest)

    def eof_received(self) -> None:
        if self._start:
            self._pass_on(b"")
        self._protocol.eof_received()

    def connection_lost(self, error: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._protocol.connection_lost(error)
        self._end_body()

    def _end_body(self) -> None:
        """Fail a body that has not ended with its connection: aiohttp's parser drops one with a broken chunk."""
        body = self._body
        if body is not None and not self._protocol.connected and not body.is_eof() and body.exception() is None:
            body.set_exception(aiohttp.ClientPayloadError("the connection has ended within the body"))

    def _check_stall(self, stall_s: float) -> None:
        """Fail a response of which no byte came for too long, unless it is this side that does not read."""
        now_s = self._loop.time()
        if not self._transport.is_reading():
            self._moved_at_s = now_s
        if now_s - self._moved_at_s < stall_s:
            self._timer = self._loop.call_at(self._moved_at_s + stall_s, self._check_stall, stall_s)
            if self._body is not None:
                self._body.on_eof(self._timer.cancel)
            return
        error = aiohttp.SocketTimeoutError("the host sends nothing")
        self._protocol.set_exception(error)
        if self._body is not None:
            self._body.set_exception(error)

    def pause_writing(self) -> None:
        self._protocol.pause_writing()

    def resume_writing(self) -> None:
        self._protocol.resume_writing()


def _is_usual(data: bytes) -> bool:
    """Return whether data begin with a regular head, and nothing in them follows the body."""
    if (head := _WHOLE_REGULAR.match(data)) is None:
        return False
    end = head.end()
    framing = _FRAMING.findall(data, 0, end)
    if len(framing) != 1:
        return False
    ((name, length),) = framing
    return name[:1] in b"cC" and _LENGTH.fullmatch(length) is not None and len(data) - end <= int(length)


def _may_be_http(start: bytearray) -> bool:
    """Return whether data may be the start of a head. Other data may never have the end of one."""
    first = start[: 2 * len(_HTTP)].lstrip(b"\r\n")[: len(_HTTP)]
    return _HTTP.startswith(first)


def _is_informational(head: bytes) -> bool:
    match = _STATUS_LINE.match(head)
    return match is not None and match[1].startswith(b"1") and match[1] != b"101"


def _is_regular(head: bytes, rest: bytearray) -> bool:
    framing = _FRAMING.findall(head)
    if _REGULAR.fullmatch(head) is None or len(framing) > 1:
        return False
    return not framing or framing[0][0][:1] in b"tT" or _length(framing[0][1].rstrip(), rest) == framing[0][1].rstrip()


def _length(declared: bytes, rest: bytearray) -> bytes | None:
    """Return the length of a body; None if the declared one is no number.

    Nothing was requested that could follow it, so that it was declared too short if more than it has come: servers
    count characters.
    """
    if not _LENGTH.fullmatch(declared):
        return None
    is_longer = len(rest) > int(declared) and not rest.startswith(_RESPONSE_START, int(declared))
    return b"%d" % len(rest) if is_longer else declared


def _repaired(head: bytes, rest: bytearray) -> bytes:
    """Return a head that aiohttp's parser takes, without what can't be read; unchanged if it is not HTTP."""
    status, *lines = _LINE_END.split(head.strip(b"\r\n"))
    match = _STATUS_LINE.match(status)
    if match is None or match[1] == b"101":
        return head
    kept = [b"HTTP/1.%d %b " % (not status.startswith(b"HTTP/1.0"), match[1])]
    lengths: set[bytes] = set()
    is_chunked = False
    for line in lines:
        field = _FIELD.match(line)
        if field is None or len(line) > _MAX_LINE_BYTES:
            continue
        name, value = field[1].lower(), _CONTROLS.sub(b" ", field[2]).strip()
        if name == b"content-length":
            lengths.update(part.strip().removeprefix(b"+") for part in value.split(b","))
        elif name == b"transfer-encoding":
            is_chunked = is_chunked or value.lower().endswith(b"chunked")
        else:
            kept.append(field[1] + b": " + value)
    if is_chunked:
        kept.append(b"Transfer-Encoding: chunked")
    elif len(lengths) == 1 and (length := _length(lengths.pop(), rest)) is not None:
        kept.append(b"Content-Length: " + length)
    else:
        kept.append(b"Connection: close")  # its end is that of the connection, or of its content
    return b"\r\n".join(kept) + b"\r\n"
