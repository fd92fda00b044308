"""Tests of a server at its cap of connections: none is closed whose request may be on its way."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack

import pytest

from tests.support import LoopTime, eventually
from tests.web.capped_servers import GET, MakeServer, Server, capped_servers


@pytest.fixture
async def make_server() -> AsyncIterator[MakeServer]:
    async with capped_servers() as make:
        yield make


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a small server spare its connections for long."""
    monkeypatch.setattr("imagegen.web.http.connections.SPARED_S", 30.0)
    monkeypatch.setattr("imagegen.web.http.connections.SPARED_PER_S", 0.01)


@pytest.fixture
def sockets() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def connect(server: Server, sockets: ExitStack) -> socket.socket:
    """Connect at once: the server accepts nothing meanwhile."""
    client = sockets.enter_context(socket.create_connection(("127.0.0.1", server.port)))
    client.setblocking(False)
    return client


async def answer(client: socket.socket) -> bytes:
    return await asyncio.wait_for(asyncio.get_running_loop().sock_recv(client, 65_536), 20)


async def pass_time() -> None:
    """Let the server do all that it does in 0.1 s."""
    loop = asyncio.get_running_loop()
    begun = loop.time()
    await eventually(lambda: loop.time() > begun + 0.1)


@pytest.mark.usefixtures("patient")
async def test_in_a_burst_no_new_connection_is_closed_before_its_request_can_come(
    make_server: MakeServer, sockets: ExitStack
) -> None:
    server = await make_server(cap=100)
    clients = [connect(server, sockets) for _ in range(300)]
    await eventually(lambda: len(server.runner.connections) == 100)
    await pass_time()
    for client in clients:
        client.send(GET)
    for client in clients:
        assert (await answer(client)).startswith(b"HTTP/1.1 200")
    assert len(server.runner.connections) <= 100


@pytest.mark.usefixtures("patient")
async def test_a_connection_that_sends_nothing_for_a_while_gives_its_place(
    make_server: MakeServer, sockets: ExitStack
) -> None:
    server, time = await make_server(cap=4), LoopTime()
    silent = [connect(server, sockets) for _ in range(4)]
    await eventually(lambda: len(server.runner.connections) == 4)
    new = connect(server, sockets)
    new.send(GET)
    await time.move(31.0)
    assert (await answer(new)).startswith(b"HTTP/1.1 200")
    assert await answer(silent[0]) == b""


@pytest.mark.parametrize("request_before", [b"", GET, GET[:5]], ids=["silent", "kept alive", "half a head"])
async def test_a_connection_is_not_closed_while_its_request_waits_to_be_read(
    make_server: MakeServer, sockets: ExitStack, request_before: bytes
) -> None:
    server = await make_server(cap=4)
    clients = [connect(server, sockets) for _ in range(4)]
    for number, client in enumerate(clients, 1):
        if request_before:
            client.send(request_before)
            await eventually(lambda: len(server.http_connections) == number)  # noqa: B023 - awaited at once
        if request_before == GET:
            assert (await answer(client)).startswith(b"HTTP/1.1 200")
    await eventually(lambda: len(server.runner.connections) == 4)
    await pass_time()
    new = connect(server, sockets)
    new.send(GET)
    for client in clients[:-1]:  # the server sees the new connection first
        client.send(GET.removeprefix(request_before) or GET)
    for client in (new, *clients[:-1]):
        assert (await answer(client)).startswith(b"HTTP/1.1 200")
    assert await answer(clients[-1]) == b""


@pytest.mark.usefixtures("patient")
async def test_a_connection_that_waits_for_a_place_is_closed_with_the_server(
    make_server: MakeServer, sockets: ExitStack
) -> None:
    server = await make_server(cap=4)
    clients = [connect(server, sockets) for _ in range(5)]
    await eventually(lambda: len(server.runner.connections) == 4)
    await server.runner.cleanup()
    for client in clients:
        assert await answer(client) == b""
