"""One Redis connection that redis-py has opened, read by hiredis from here on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

import hiredis
from redis.asyncio.connection import DefaultParser
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import InvalidResponse, ResponseError


class ReplyProtocol(asyncio.Protocol):
    """Passes on each reply until it is ended, from here or by the other side.

    redis-py's own way to a reply (a pool, a stream and some coroutines for each call) costs more than all else that
    is done for a task. writer: kept, since a stream's writer closes the transport when nothing refers to it.
    """

    def __init__(self, got: Callable[[Any], None], lost: Callable[[Exception], None]) -> None:
        self._reader = hiredis.Reader(protocolError=InvalidResponse, replyError=_error)
        self._got = got
        self._lost = lost
        self._ended = False
        self.writer: asyncio.StreamWriter | None = None

    def end(self, error: Exception) -> None:
        """Report the loss, once."""
        if not self._ended:
            self._ended = True
            self._lost(error)

    def data_received(self, data: bytes) -> None:
        self._reader.feed(data)
        try:
            while not self._ended and (reply := self._reader.gets()) is not False:
                self._got(reply)
        except InvalidResponse as error:
            self.end(error)

    def connection_lost(self, error: Exception | None) -> None:
        self.end(error or RedisConnectionError("Connection closed by server"))


def take_over(connection: Any, protocol: ReplyProtocol) -> asyncio.Transport:
    """Move the transport of redis-py's connection to the protocol; redis-py has nothing to close then."""
    at_end = connection._reader.at_eof()  # noqa: SLF001
    writer, connection._reader, connection._writer = connection._writer, None, None  # noqa: SLF001
    protocol.writer = writer
    transport = cast(asyncio.Transport, writer.transport)
    transport.set_protocol(protocol)
    if at_end or transport.is_closing():  # it was lost before the protocol was set
        transport.abort()
        asyncio.get_running_loop().call_soon(protocol.end, RedisConnectionError("Connection closed by server"))
    return transport


def _error(text: str) -> Exception:
    """Return redis-py's exception; a redirect that it can't read is no reason to lose the connection."""
    try:
        return cast(Exception, DefaultParser.parse_error(text))  # type: ignore[no-untyped-call]
    except (ValueError, TypeError):
        return ResponseError(text)
