"""Servers with a cap of connections, over real sockets, and clients of them."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

from imagegen.metrics import Meter
from imagegen.web.http import middleware
from imagegen.web.http.connections import IDLE_S, Connections
from imagegen.web.http.listening import ListeningSite, open_sockets
from imagegen.web.http.responses import json_response
from imagegen.web.http.server import ImagegenRunner
from tests.support import eventually

GET = b"GET /hello HTTP/1.1\r\nHost: x\r\n\r\n"
HELD = b"GET /held HTTP/1.1\r\nHost: x\r\n\r\n"


class Client:
    """Connection to the server from any address of the loopback network."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def fetch(self, request: bytes = GET) -> bytes:
        self.writer.write(request)
        return await asyncio.wait_for(self.reader.readuntil(b"}"), 20)

    async def closed(self, within_s: float = 20.0) -> bool:
        try:
            return await asyncio.wait_for(self.reader.read(), within_s) == b""
        except ConnectionResetError:
            return True
        except TimeoutError:
            return False


class Server:
    def __init__(self, runner: ImagegenRunner, sockets: list[socket.socket], handled: list[web.Request]) -> None:
        self.runner, self.sockets, self.handled = runner, sockets, handled
        self.port = sockets[0].getsockname()[1]
        self.clients: list[Client] = []

    async def connect(self, source: str = "127.0.0.1") -> Client:
        client = Client(*await asyncio.open_connection("127.0.0.1", self.port, local_addr=(source, 0)))
        self.clients.append(client)
        return client

    async def fill(self, count: int, request: bytes = b"", source: str = "127.0.0.1") -> list[Client]:
        """Open connections one after the other: each is registered, and its request with a whole head is handled."""
        return [await self._open(request, source) for _ in range(count)]

    async def _open(self, request: bytes, source: str) -> Client:
        before, handled = len(self.runner.connections), len(self.handled)
        client = await self.connect(source)
        await eventually(lambda: len(self.runner.connections) > before)
        client.writer.write(request)
        if b"\r\n\r\n" in request:
            await eventually(lambda: len(self.handled) > handled)
        elif request:
            await eventually(lambda: self.has_read(client))
        return client

    def has_read(self, client: Client) -> bool:
        """Return whether the HTTP server has a connection with a part of a head from this client."""
        name = client.writer.get_extra_info("sockname")
        return any(each.peername == name and each.head_begun for each in self.http_connections)

    @property
    def http_connections(self) -> list[Any]:
        """Return the connections of the HTTP server: those that have sent a byte."""
        assert self.runner.server is not None
        return self.runner.server.connections


MakeServer = Callable[..., Awaitable[Server]]


@asynccontextmanager
async def capped_servers() -> AsyncIterator[MakeServer]:
    """Yield a function that starts a server within a cap of connections."""
    servers: list[Server] = []
    handled: list[web.Request] = []

    async def hello(request: web.Request) -> web.StreamResponse:
        return json_response({})

    async def held(request: web.Request) -> web.StreamResponse:
        handled.append(request)
        await asyncio.Event().wait()
        return json_response({})

    async def body(request: web.Request) -> web.StreamResponse:
        handled.append(request)
        return json_response({"bytes": len(await request.read())})

    async def make(cap: int = 4, *, idle_s: float = IDLE_S, **options: Any) -> Server:
        app = web.Application()
        app.router.add_get("/hello", hello)
        app.router.add_get("/held", held)
        app.router.add_post("/body", body)
        middleware.install_pipeline(app, middleware.RequestPipeline(Meter(), access_log=False))
        runner = ImagegenRunner(app, shutdown_timeout=0.1, **options)
        loop = asyncio.get_running_loop()
        runner.connections = Connections(cap, idle_s=idle_s, clock=lambda: loop.time())  # noqa: PLW0108 - a test sets it
        await runner.setup()
        sockets = open_sockets(["127.0.0.1"], 0)
        await ListeningSite(runner, sockets, runner.connections).start()
        servers.append(Server(runner, sockets, handled))
        return servers[-1]

    yield make
    for server in servers:
        for client in server.clients:
            client.writer.close()
        await server.runner.cleanup()
