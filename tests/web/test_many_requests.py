"""Tests of hundreds of requests that come at the same moment: no turn of the event loop is long, memory is bounded."""

from __future__ import annotations

import asyncio
import pkgutil
import socket
import sys
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from types import FrameType
from typing import Any

import pytest
from aiohttp import web

from imagegen.app import METER
from imagegen.metrics import Meter
from imagegen.turn_queue import PER_TURN
from imagegen.web.http import json_with_images, middleware
from imagegen.web.http.connections import Connections
from imagegen.web.http.listening import ACCEPTS_PER_TURN, ListeningSite
from imagegen.web.http.read_slots import READS_AT_ONCE
from imagegen.web.http.responses import json_bytes
from imagegen.web.http.server import ImagegenRunner
from imagegen.web.mcp.tool_definitions import listing
from tests.support import AS_ADMIN, Turns, eventually
from tests.web.conftest import Client

CLIENTS = 200
GET = b"GET /quick HTTP/1.1\r\nHost: x\r\n\r\n"
BODY_BYTES = 1_000_000


class Server:
    """Server with a quick route, and one that waits before it reads its body."""

    def __init__(self) -> None:
        app = web.Application()
        middleware.install_pipeline(app, middleware.RequestPipeline(Meter(), access_log=False))
        app.router.add_get("/quick", self._quick)
        app.router.add_post("/slow", self._slow)
        self.runner = ImagegenRunner(app)
        self.handled = self.connected = 0
        self.reading = asyncio.Event()
        self._clients: list[socket.socket] = []
        self._port = 0

    async def start(self) -> None:
        await self.runner.setup()
        listening = socket.create_server(("127.0.0.1", 0), backlog=CLIENTS)
        listening.setblocking(False)
        self._port = listening.getsockname()[1]
        site = ListeningSite(self.runner, [listening], Connections(10_000, idle_s=60))
        server = self.runner.server
        assert server is not None
        made = server.connection_made

        def count(handler: web.RequestHandler, transport: asyncio.Transport) -> None:
            self.connected += 1
            made(handler, transport)

        server.connection_made = count  # type: ignore[method-assign]
        await site.start()

    async def stop(self) -> None:
        self.reading.set()
        for client in self._clients:
            client.close()
        await self.runner.cleanup()

    async def connect(self, count: int) -> list[socket.socket]:
        """Return clients that have sent nothing yet."""
        loop = asyncio.get_running_loop()
        clients = [socket.socket() for _ in range(count)]
        self._clients += clients
        for client in clients:
            client.setblocking(False)
            await loop.sock_connect(client, ("127.0.0.1", self._port))
        return clients

    async def _quick(self, _request: web.Request) -> web.StreamResponse:
        self.handled += 1
        return json_bytes(b"{}")

    async def _slow(self, request: web.Request) -> web.StreamResponse:
        self.handled += 1
        await self.reading.wait()
        return json_bytes(b'{"bytes":%d}' % len(await request.read()))


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    async with AsyncExitStack() as stack:
        server = Server()
        await server.start()
        stack.push_async_callback(server.stop)
        yield server


async def test_few_of_many_requests_on_open_connections_begin_in_one_turn(server: Server) -> None:
    clients = await server.connect(CLIENTS)
    for client in clients:
        client.send(GET)
    await eventually(lambda: server.handled == CLIENTS)
    turns = Turns(lambda: server.handled)
    for client in clients:
        client.send(GET)
    await eventually(lambda: server.handled == 2 * CLIENTS)
    assert turns.most() <= 2 * PER_TURN


async def test_few_of_many_clients_that_connect_first_and_send_later_are_served_in_one_turn(server: Server) -> None:
    clients = await server.connect(CLIENTS)
    turns = Turns(lambda: server.connected)
    for client in clients:
        client.send(GET)
    await eventually(lambda: server.handled == CLIENTS)
    assert turns.most() <= 2 * ACCEPTS_PER_TURN


async def test_a_body_that_waits_to_be_read_takes_one_read_of_memory(server: Server) -> None:
    head = f"POST /slow HTTP/1.1\r\nHost: x\r\nContent-Length: {BODY_BYTES}\r\n\r\n".encode()
    clients, loop = await server.connect(30), asyncio.get_running_loop()
    data = head + bytes(BODY_BYTES)
    tracemalloc.start()
    try:
        sending = [asyncio.create_task(loop.sock_sendall(client, data)) for client in clients]
        await eventually(lambda: server.handled == len(clients))
        for _ in range(50):  # turns, in which all that may be read is read
            await asyncio.sleep(0)
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    server.reading.set()
    await asyncio.gather(*sending)
    assert held < len(clients) * 100_000
    assert b'"bytes":%d' % BODY_BYTES in await loop.sock_recv(clients[0], 4096)


@pytest.mark.parametrize(
    ("path", "reader"),
    [
        ("/api/images", "imagegen.queue.task_list.TaskList.page"),
        ("/api/usage", "imagegen.web.ops.usage.UsageReport.of"),
        ("/api/admin/board", "imagegen.queue.unfinished.UnfinishedTasks.list"),
        ("/api/admin/board/history", "imagegen.history.history_store.HistoryStore.read"),
    ],
)
async def test_few_of_many_lists_are_read_at_once_and_each_client_gets_its_own(
    service: Client, monkeypatch: pytest.MonkeyPatch, path: str, reader: str
) -> None:
    owner, _, name = reader.rpartition(".")
    read, release, reading = getattr(pkgutil.resolve_name(owner), name), asyncio.Event(), list[None]()

    async def read_later(*args: Any) -> Any:
        reading.append(None)
        await release.wait()
        return await read(*args)

    async def get() -> int:
        async with service.get(path, headers=AS_ADMIN) as response:
            await response.read()
            return response.status

    monkeypatch.setattr(pkgutil.resolve_name(owner), name, read_later)
    requests = [asyncio.create_task(get()) for _ in range(20)]
    await eventually(lambda: len(reading) >= READS_AT_ONCE)
    await eventually(lambda: service.app[METER].open_requests == len(requests))
    async with service.get("/healthz"):  # all that could be read by now is read
        assert len(reading) == READS_AT_ONCE
    requests.pop().cancel()
    release.set()
    assert await asyncio.gather(*requests) == [200] * len(requests)


async def test_the_list_of_tools_is_sent_without_a_look_at_each_part_of_it(service: Client) -> None:
    message, calls = {"jsonrpc": "2.0", "id": 1, "method": "tools/list"}, 0
    async with service.post("/mcp", json=message) as first:
        assert (await first.json())["result"] == {"tools": listing()}

    def count(frame: FrameType, event: str, _argument: object) -> None:
        nonlocal calls
        calls += event == "call" and frame.f_code.co_filename == json_with_images.__file__

    sys.setprofile(count)
    try:
        async with service.post("/mcp", json=message) as second:
            assert second.status == 200
    finally:
        sys.setprofile(None)
    assert calls < 20
