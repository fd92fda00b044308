"""Tests of clients that do not read their responses: what they hold together, and for how long."""

from __future__ import annotations

import asyncio
import socket
import struct
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any
from unittest.mock import Mock

import pytest
from aiohttp import web

from imagegen.metrics import Meter
from imagegen.web.http import middleware
from imagegen.web.http.event_stream import EventStream
from imagegen.web.http.responses import json_bytes
from imagegen.web.http.server import ImagegenRunner
from imagegen.web.http.unread import UnreadResponses
from tests.support import LoopTime, eventually

LENGTH = 1_000_000
SHARED = bytes(LENGTH)
ROUTES = ["/json", "/page", "/events"]


class Server:
    """Server of large responses of each form; its sockets take little of them."""

    def __init__(self, **options: Any) -> None:
        app = web.Application()
        middleware.install_pipeline(app, middleware.RequestPipeline(Meter(), access_log=False))
        app.router.add_get("/json", self._json)
        app.router.add_get("/page", self._page)
        app.router.add_get("/events", self._events)
        self.runner = ImagegenRunner(app, **options)
        self.handled = 0
        self.port = 0
        self._clients: list[socket.socket] = []

    async def start(self) -> None:
        await self.runner.setup()
        listening = socket.create_server(("127.0.0.1", 0))
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        await web.SockSite(self.runner, listening).start()
        self.port = listening.getsockname()[1]

    async def stop(self) -> None:
        for client in self._clients:
            client.close()
        await self.runner.cleanup()

    async def stalled(self, path: str, source: str = "127.0.0.1") -> socket.socket:
        """Return a client that sent a request, to which a response is under way, and reads nothing."""
        before = self.handled
        client = socket.socket()
        self._clients.append(client)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.bind((source, 0))
        client.setblocking(False)
        await asyncio.get_running_loop().sock_connect(client, ("127.0.0.1", self.port))
        client.send(b"GET %s HTTP/1.1\r\nHost: x\r\n\r\n" % path.encode())
        await eventually(lambda: self.handled > before)
        return client

    async def _json(self, _request: web.Request) -> web.StreamResponse:
        self.handled += 1
        return json_bytes(b" " * LENGTH)

    async def _page(self, _request: web.Request) -> web.StreamResponse:
        self.handled += 1
        return web.Response(body=SHARED)

    async def _events(self, request: web.Request) -> web.StreamResponse:
        stream = EventStream()
        await stream.prepare(request)
        self.handled += 1
        await stream.send_encoded(SHARED)
        return stream


MakeServer = Callable[..., Awaitable[Server]]


@pytest.fixture
async def make_server() -> AsyncIterator[MakeServer]:
    async with AsyncExitStack() as stack:

        async def make(**options: Any) -> Server:
            server = Server(**options)
            await server.start()
            stack.push_async_callback(server.stop)
            return server

        yield make


async def received(client: socket.socket) -> int:
    """Return how many bytes a client still gets."""
    count = 0
    while piece := await asyncio.get_running_loop().sock_recv(client, 65_536):
        count += len(piece)
    return count


async def is_cut(client: socket.socket) -> bool:
    try:
        await asyncio.wait_for(received(client), 0.2)
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False
    return True


@pytest.mark.parametrize("path", ROUTES)
async def test_stalled_readers_of_any_response_hold_little_memory_together(make_server: MakeServer, path: str) -> None:
    server = await make_server()
    tracemalloc.start()
    try:
        for _ in range(60):
            await server.stalled(path)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 20_000_000
    await eventually(lambda: len(server.runner.connections) <= 17)


async def test_a_flood_of_stalled_readers_cuts_no_other_client(make_server: MakeServer) -> None:
    server = await make_server(unread=UnreadResponses(max_bytes=3 * LENGTH))
    other = await server.stalled("/json", "127.0.0.2")
    flood = [await server.stalled("/json", "127.0.0.3") for _ in range(20)]
    await eventually(lambda: len(server.runner.connections) <= 4)
    assert await is_cut(flood[0])
    other.send(b"GET /json HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert await asyncio.wait_for(received(other), 20) > 2 * LENGTH


@pytest.mark.parametrize("path", ROUTES)
async def test_a_client_that_reads_nothing_for_over_a_minute_is_cut(make_server: MakeServer, path: str) -> None:
    server, time = await make_server(), LoopTime()
    await server.stalled(path)

    async def is_closed_later() -> bool:
        await time.move(15.0)
        return len(server.runner.connections) == 0

    await eventually(is_closed_later)


async def test_a_client_that_takes_nothing_is_cut_by_the_end_of_a_minute() -> None:
    unread, time, aborted_at = UnreadResponses(), LoopTime(), list[float]()
    transport = Mock(spec=asyncio.Transport)
    transport.get_write_buffer_size.return_value = 1000
    transport.abort.side_effect = lambda: aborted_at.append(time.now())
    unread.begin(transport, "127.0.0.1")
    await time.move(7.3)
    transport.get_write_buffer_size.return_value = 900
    taken_at = time.now()
    while not aborted_at:
        await time.move(0.1)
    assert 55.0 < aborted_at[0] - taken_at <= 60.0


async def test_a_client_that_reads_a_little_each_minute_is_not_cut(make_server: MakeServer) -> None:
    server, time = await make_server(), LoopTime()
    client, began = await server.stalled("/page"), time.now()
    client.send(b"GET /page HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    count, loop = 0, asyncio.get_running_loop()
    while piece := await loop.sock_recv(client, 16_384):
        count += len(piece)
        await time.move(15.0)
    assert count > 2 * LENGTH
    assert time.now() - began > 300.0


async def test_a_stalled_reader_gives_its_descriptor_back_to_a_new_client(make_server: MakeServer) -> None:
    server = await make_server(max_connections=1)
    await server.stalled("/json")
    assert server.runner.connections.close_least_needed("127.0.0.2")
    assert server.runner.server is not None
    await eventually(lambda: not server.runner.server.connections)  # type: ignore[union-attr]


async def test_a_client_that_resets_its_connection_at_a_refusal_is_no_error(
    make_server: MakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, errors, finish = await make_server(), list[object](), web.RequestHandler.finish_response
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: errors.append(context))
    client = socket.create_connection(("127.0.0.1", server.port))
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    async def finish_and_reset(connection: web.RequestHandler, *args: Any) -> Any:
        result = await finish(connection, *args)
        client.close()
        return result

    monkeypatch.setattr(web.RequestHandler, "finish_response", finish_and_reset)
    client.sendall(b"G@T / HTTP/1.1\r\n\r\n")
    await eventually(lambda: client.fileno() < 0)
    await eventually(lambda: not server.runner.server.connections)  # type: ignore[union-attr]
    assert errors == []


async def test_a_refused_client_sees_the_end_of_its_response_before_the_rest_of_its_request_was_awaited(
    make_server: MakeServer,
) -> None:
    server = await make_server(lingering_time=600.0)
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(b"G@T / HTTP/1.1\r\n\r\n")
    assert (await asyncio.wait_for(reader.read(), 20)).startswith(b"HTTP/1.1 400 ")
    writer.close()
    await writer.wait_closed()
