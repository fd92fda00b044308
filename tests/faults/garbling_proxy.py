"""Proxy before Redis that answers single commands with other replies, as broken proxies and services do."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

import hiredis

from tests.faults.proxy import FaultProxy

WRONG_REPLIES = (
    b":7\r\n",
    b"+OK\r\n",
    b"$-1\r\n",
    b"*0\r\n",
    b"*2\r\n:1\r\n$3\r\nabc\r\n",
    b"*1\r\n*1\r\n*1\r\n:1\r\n",
    b"$4\r\n\xff\xfe\x00\x01\r\n",
    b"-ERR upstream failure\r\n",
    b"HTTP/1.1 502 Bad Gateway\r\n\r\n",
)


class GarblingProxy(FaultProxy):
    """Proxy to a unix socket. garble: called with the words of each command; returns a reply to pass in its place."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.garble: Callable[[list[bytes]], bytes | None] = lambda _words: None
        self.garbled = 0
        self._instead: dict[int, deque[bytes | None]] = {}

    async def _requests(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, state: dict[str, bool]
    ) -> None:
        commands, instead = hiredis.Reader(), self._instead.setdefault(id(state), deque())
        while chunk := await reader.read(2**16):
            commands.feed(chunk)
            while (words := commands.gets()) is not False:
                instead.append(self.garble(words))
            writer.write(chunk)
            await writer.drain()
        raise ConnectionResetError

    async def _replies(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, state: dict[str, bool]
    ) -> None:
        rest, instead = b"", self._instead.setdefault(id(state), deque())
        while chunk := await reader.read(2**16):
            rest += chunk
            while end := _end(rest, 0):
                other = instead.popleft() if instead else None  # a message has no command
                self.garbled += other is not None
                writer.write(rest[:end] if other is None else other)
                rest = rest[end:]
            await writer.drain()
        raise ConnectionResetError


def _end(data: bytes, start: int) -> int:
    """Return the index after the reply that begins at `start`, 0 if it is not complete."""
    line_end = data.find(b"\r\n", start) + 2
    if line_end < 2 or data[start] not in b"$*":
        return line_end if line_end >= 2 else 0
    count = int(data[start + 1 : line_end - 2])
    if data[start] in b"$":
        end = line_end + count + 2 if count >= 0 else line_end
        return end if end <= len(data) else 0
    for _ in range(count):
        if not (line_end := _end(data, line_end)):
            return 0
    return line_end
