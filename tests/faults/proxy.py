"""TCP proxy between the service and Redis that simulates network faults."""

from __future__ import annotations

import asyncio
import random
import socket
import ssl
import struct
from collections.abc import Callable
from typing import Self

Judge = Callable[[bytes], bool]


class FaultProxy:
    """Proxy from a free loopback port, with TLS if given, to a unix socket.

    latency_s: added to each chunk of a reply. drop_reply: called with each request chunk; if it returns True, the reply
    is dropped and the connection closed after the server has done the work. black_hole: bytes go in and nothing comes
    out. refuse: new connections are closed at once.
    """

    def __init__(self, path: str, tls: ssl.SSLContext | None = None) -> None:
        self._path = path
        self._tls = tls
        self._pairs: set[asyncio.StreamWriter] = set()
        self._silent: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self.latency_s = 0.0
        self.drop_reply: Judge = lambda _request: False
        self.black_hole = False
        self.refuse = False
        self.dropped = 0
        self.port = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, ssl=self._tls)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        self.refuse = True
        self.cut()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def connected(self) -> bool:
        """Return whether a client is connected."""
        return bool(self._pairs)

    def silence(self) -> None:
        """Pass nothing more on the connections that are open, and leave them open; new ones work."""
        self._silent |= self._pairs

    def to(self, path: str) -> None:
        """Send new connections to another server."""
        self._path = path

    @property
    def url(self) -> str:
        return f"{'rediss' if self._tls else 'redis'}://127.0.0.1:{self.port}/0"

    def drop_some(self, share: float, seed: int, commands: tuple[bytes, ...] = (b"EVALSHA", b"SET")) -> None:
        """Drop this share of the replies to these commands."""
        chance = random.Random(seed)
        self.drop_reply = lambda request: any(c in request for c in commands) and chance.random() < share

    def cut(self, *, reset: bool = False) -> None:
        """End every connection; with `reset` by RST."""
        for writer in list(self._pairs):
            sock: socket.socket | None = writer.get_extra_info("socket")
            if reset and sock is not None and sock.family == socket.AF_INET:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort() if reset else writer.close()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.refuse:
            writer.transport.abort()
            return
        self._pairs.add(writer)
        task = asyncio.create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            upstream_reader, upstream_writer = await asyncio.open_unix_connection(self._path)
        except OSError:
            writer.transport.abort()
            return
        self._pairs.add(upstream_writer)
        state = {"drop": False}
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._requests(reader, upstream_writer, state))
                group.create_task(self._replies(upstream_reader, writer, state))
        except* (OSError, ConnectionError):
            pass
        finally:
            self._pairs -= {writer, upstream_writer}
            for stream in (writer, upstream_writer):
                stream.transport.abort()

    async def _requests(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, state: dict[str, bool]
    ) -> None:
        while chunk := await reader.read(2**16):
            if self.drop_reply(chunk):
                state["drop"] = True
            if self.black_hole or writer in self._silent:
                continue
            writer.write(chunk)
            await writer.drain()
        raise ConnectionResetError

    async def _replies(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, state: dict[str, bool]
    ) -> None:
        while chunk := await reader.read(2**16):
            if state["drop"]:
                self.dropped += 1
                raise ConnectionResetError
            if self.latency_s:
                await asyncio.sleep(self.latency_s)
            if self.black_hole or writer in self._silent:
                continue
            writer.write(chunk)
            await writer.drain()
        raise ConnectionResetError
