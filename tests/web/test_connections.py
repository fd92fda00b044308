"""Tests of the connection limit over real sockets: eviction order, and a shortage of descriptors."""

from __future__ import annotations

import asyncio
import errno
import json
import socket
import struct
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import pytest
from aiohttp import web

from imagegen.errors import SettingsError
from imagegen.web.http.connections import Connections, connection_cap
from imagegen.web.http.listening import ACCEPTS_PER_TURN, base_address, open_sockets
from imagegen.web.http.server import FIRST_READ_BYTES, MAX_LONG_READERS
from tests.support import LoopTime, Turns, eventually, logged, over_rows
from tests.web.capped_servers import GET, HELD, MakeServer, capped_servers


@pytest.fixture
def lines() -> Iterator[list[str]]:
    with logged("INFO") as lines:
        yield lines


@pytest.fixture
async def make_server() -> AsyncIterator[MakeServer]:
    async with capped_servers() as make:
        yield make


async def test_a_new_client_replaces_the_oldest_silent_connection(make_server: MakeServer) -> None:
    server = await make_server(cap=4)
    idle = await server.connect()
    await idle.fetch()
    silent = await server.fill(3)
    new = await server.connect()
    assert (await new.fetch()).startswith(b"HTTP/1.1 200")
    assert await silent[0].closed()
    assert (await idle.fetch()).startswith(b"HTTP/1.1 200")
    assert not await silent[1].closed(0.1)
    assert len(server.runner.connections) == 4


async def test_a_whole_request_does_not_wait_for_hundreds_of_unfinished_heads_before_it(
    make_server: MakeServer,
) -> None:
    server = await make_server(cap=1_000)
    with ExitStack() as stack:

        def connect(words: bytes) -> socket.socket:
            client = stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
            client.send(words)
            return client

        for _ in range(300):
            connect(GET[:-2])  # the loop accepts none of them meanwhile
        client = connect(GET)
        client.setblocking(False)
        assert (await asyncio.get_running_loop().sock_recv(client, 100)).startswith(b"HTTP/1.1 200")
        assert len(server.http_connections) < 100
        await eventually(lambda: len(server.http_connections) == 301)


async def test_the_beginnings_of_many_bodies_take_little_of_one_turn(
    make_server: MakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, count, length = await make_server(cap=100), 16, 200_000
    server.sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 * length)
    receive, received = web.RequestHandler.data_received, list[int]()

    def count_bytes(connection: web.RequestHandler, data: bytes) -> None:
        received.append(len(data))
        receive(connection, data)

    monkeypatch.setattr(web.RequestHandler, "data_received", count_bytes)
    clients = [await server.connect() for _ in range(count)]
    for client in clients:
        await client.fetch()
    turns = Turns(lambda: sum(received))
    for client in clients:  # the loop reads none of them meanwhile
        client.writer.write(b"POST /body HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % length + bytes(length))
    for client in clients:
        await asyncio.wait_for(client.reader.readuntil(b"}"), 20)
    assert sum(received) > count * length
    assert turns.most() <= count * 65_536


async def test_few_of_many_large_bodies_are_read_in_long_pieces_and_each_only_until_it_has_come(
    make_server: MakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, sent, rest, received = await make_server(cap=100), 800_000, 100_000, list[int]()
    server.sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, sent)
    receive, long_readers = web.RequestHandler.data_received, set[web.RequestHandler]()

    def note(connection: web.RequestHandler, data: bytes) -> None:
        received.append(len(data))
        if len(data) > FIRST_READ_BYTES:
            long_readers.add(connection)
        receive(connection, data)

    monkeypatch.setattr(web.RequestHandler, "data_received", note)
    head = b"POST /body HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (sent + rest)
    for _ in range(2):  # the connections of the first round stay open
        clients = await server.fill(MAX_LONG_READERS + 4, head)
        received.clear()
        long_readers.clear()
        for client in clients:
            client.writer.write(bytes(sent))
        await eventually(lambda: sum(received) == sent * (MAX_LONG_READERS + 4))
        assert 0 < len(long_readers) <= MAX_LONG_READERS
        for client in clients:
            client.writer.write(bytes(rest))
            await asyncio.wait_for(client.reader.readuntil(b"}"), 20)


async def test_an_unfinished_head_that_came_in_a_flood_is_finished_and_answered(make_server: MakeServer) -> None:
    server = await make_server(cap=1_000)
    clients = [await server.connect() for _ in range(50)]
    for client in clients:
        client.writer.write(GET[:-2])
    await eventually(lambda: len(server.http_connections) == 50)
    for client in clients:
        assert (await client.fetch(GET[-2:])).startswith(b"HTTP/1.1 200")


async def test_a_refused_head_has_the_error_of_its_path_also_if_that_came_in_pieces(make_server: MakeServer) -> None:
    server = await make_server()
    (client,) = await server.fill(1, b"\r\nGET /v")
    assert b'{"error":{' in await client.fetch(b"1/models HTTP/1.1\r\nHost: x\r\nbad\r\n\r\n")


async def test_few_of_a_flood_of_connections_are_accepted_in_one_turn(make_server: MakeServer) -> None:
    server = await make_server(cap=1_000)
    turns = Turns(lambda: len(server.handled))
    clients = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(200)]
    for client in clients:
        client.sendall(HELD)
    await eventually(lambda: len(server.handled) == len(clients))
    assert turns.most() <= ACCEPTS_PER_TURN
    for client in clients:
        client.close()


async def test_a_connection_reaches_the_http_server_with_its_first_byte(make_server: MakeServer) -> None:
    server = await make_server(cap=5)
    silent, other = await server.fill(2)
    assert not server.http_connections
    assert b"200" in await silent.fetch()
    assert len(server.http_connections) == 1
    assert b"200" in await silent.fetch()
    other.writer.write(GET[:5])
    await eventually(lambda: len(server.http_connections) == 2)
    assert b"200" in await other.fetch(GET[5:])


async def test_a_client_that_leaves_without_a_byte_is_forgotten(make_server: MakeServer) -> None:
    server = await make_server(cap=5)
    (silent,) = await server.fill(1)
    silent.writer.close()
    await eventually(lambda: not len(server.runner.connections) + len(server.http_connections))


async def test_silent_connections_are_closed_with_the_server(make_server: MakeServer) -> None:
    server = await make_server(cap=5)
    (silent,) = await server.fill(1)
    await server.runner.cleanup()
    assert await silent.closed()


async def test_silent_connections_of_the_largest_client_close_first(make_server: MakeServer) -> None:
    server = await make_server(cap=5)
    (lone,) = await server.fill(1, source="127.0.0.2")
    many = await server.fill(4, source="127.0.0.3")
    for _ in range(2):
        await (await server.connect("127.0.0.4")).fetch()
    assert await many[0].closed()
    assert await many[1].closed()
    assert (await lone.fetch()).startswith(b"HTTP/1.1 200")


async def test_the_longest_idle_connection_closes_if_none_is_silent(make_server: MakeServer) -> None:
    server = await make_server(cap=3)
    idle = [await server.connect() for _ in range(3)]
    for client in idle:
        await client.fetch()
    assert (await (await server.connect()).fetch()).startswith(b"HTTP/1.1 200")
    assert await idle[0].closed()


async def test_running_requests_are_not_cut_and_excess_clients_get_503(make_server: MakeServer) -> None:
    server = await make_server(cap=3)
    running = await server.fill(3, HELD)
    refused = await server.connect()
    head, _, body = (await refused.fetch(b"")).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 503")
    answer = json.loads(body)
    assert (answer["code"], answer["retryable"], len(answer)) == ("too_many_connections", True, 7)
    assert f"X-Request-Id: {answer['requestId']}".encode() in head
    assert await refused.closed()
    assert not await running[0].closed(0.1)


async def test_stalled_bodies_are_closed_before_running_requests(make_server: MakeServer) -> None:
    server = await make_server(cap=3)
    (running,) = await server.fill(1, HELD)
    stalled = await server.fill(2, b"POST /body HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nab")
    assert (await (await server.connect()).fetch()).startswith(b"HTTP/1.1 200")
    assert await stalled[0].closed()
    assert not await running.closed(0.1)


async def test_a_client_with_most_running_requests_yields_to_another(make_server: MakeServer) -> None:
    server = await make_server(cap=4)
    running = await server.fill(4, HELD, source="127.0.0.2")
    assert (await (await server.connect("127.0.0.3")).fetch()).startswith(b"HTTP/1.1 200")
    assert await running[0].closed()


async def test_unused_connections_time_out_and_used_ones_stay_open(make_server: MakeServer) -> None:
    server, time = await make_server(cap=10, idle_s=60.0), LoopTime()
    used = await server.connect()
    await used.fetch()
    silent = await server.fill(2)
    await time.move(61.0)
    for client in silent:
        assert await client.closed()
    assert (await used.fetch()).startswith(b"HTTP/1.1 200")
    assert len(server.runner.connections) == 1


async def test_a_started_head_has_its_own_time_limit(make_server: MakeServer) -> None:
    server, time = await make_server(cap=10, idle_s=60.0, head_timeout_s=100.0), LoopTime()
    (client,) = await server.fill(1, GET[:10])
    (silent,) = await server.fill(1)
    await time.move(61.0)
    assert await silent.closed()
    client.writer.write(GET[10:])
    assert (await client.fetch(b"")).startswith(b"HTTP/1.1 200")


async def test_a_shortage_is_logged_once(make_server: MakeServer, lines: list[str]) -> None:
    server = await make_server(cap=4)
    for _ in range(30):
        await server.connect()
    await (await server.connect()).fetch()
    assert len(lines) == 1
    assert "All 4 client connections are taken" in lines[0]


class Scarce(socket.socket):
    """Listening socket of a process without free descriptors until `left` is positive."""

    left = 0
    called_at: ClassVar[list[float]] = []

    def accept(self) -> Any:
        self.called_at.append(time.monotonic())
        if self.left <= 0:
            raise OSError(errno.EMFILE, "Too many open files")
        return super().accept()


async def test_running_out_of_descriptors_is_one_log_line_and_a_pause(
    make_server: MakeServer, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("imagegen.web.http.listening.socket.socket", Scarce)
    monkeypatch.setattr("imagegen.web.http.listening.PAUSE_S", 0.05)
    monkeypatch.setattr(Scarce, "called_at", [])
    server = await make_server()
    client = await server.connect()
    client.writer.write(GET)
    await eventually(lambda: len(Scarce.called_at) >= 5)
    assert all(later - earlier > 0.04 for earlier, later in pairwise(Scarce.called_at))
    monkeypatch.setattr(Scarce, "left", 1)
    assert (await client.fetch(b"")).startswith(b"HTTP/1.1 200")
    assert lines == ["WARNING No connection can be accepted for now: Too many open files\n"]


@over_rows(("descriptors", "slots"), [(64, 5), (256, 5), (1024, 5), (1024, 100), (4096, 5), (10**6, 5)])
def test_clients_never_use_the_reserved_descriptors(descriptors: int, slots: int) -> None:
    cap = connection_cap(descriptors, slots)
    assert 0 < cap <= 10_000
    assert cap <= descriptors * 3 // 4
    if descriptors >= 1024:
        assert descriptors - cap >= 160 + 3 * slots
        assert cap >= 500


def test_hosts_share_one_port_and_ipv6_any_accepts_ipv4() -> None:
    for hosts, ways in ((["::"], ["127.0.0.1", "::1"]), (["127.0.0.1", "::1"], ["127.0.0.1", "::1"])):
        sockets = open_sockets(hosts, 0)
        port = sockets[0].getsockname()[1]
        assert {listening.getsockname()[1] for listening in sockets} == {port}
        assert [base_address(listening) for listening in sockets] == [
            f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}" for host in hosts
        ]
        for way in ways:
            socket.create_connection((way, port), 1).close()
        for listening in sockets:
            listening.close()


def test_both_any_addresses_together_are_bound_side_by_side() -> None:
    sockets = open_sockets(["::", "0.0.0.0"], 0)
    assert len(sockets) == 2
    for listening in sockets:
        listening.close()


@over_rows(
    ("hosts", "bound"),
    [
        (["localhost", "127.0.0.1"], ["127.0.0.1"]),
        (["127.0.0.1", "0.0.0.0"], ["0.0.0.0"]),
        (["127.0.0.1", "::1", "::"], ["::"]),
    ],
)
def test_an_address_that_two_hosts_have_is_bound_once(hosts: list[str], bound: list[str]) -> None:
    sockets = open_sockets(hosts, 0)
    assert {listening.getsockname()[0] for listening in sockets} - {"::1"} == set(bound)
    for listening in sockets:
        listening.close()


@over_rows("hosts", [["203.0.113.7"], ["127.0.0.1", "203.0.113.7"], ["no.such.host.invalid"]])
def test_an_unbindable_host_is_one_fault_and_leaves_nothing_open(hosts: list[str]) -> None:
    with pytest.raises(SettingsError, match="HOST"):
        open_sockets(hosts, 0)


async def test_a_registry_without_connections_has_nothing_to_close() -> None:
    assert not Connections(0).admit("127.0.0.1")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs TCP_INFO of a listening socket")
def test_thousands_of_connections_may_wait_while_the_event_loop_is_busy() -> None:
    (listening,) = open_sockets(["127.0.0.1"], 0)
    with listening:
        info = listening.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 32)
    (waiting_at_most,) = struct.unpack_from("I", info, 28)  # tcpi_sacked is the limit of a listening socket
    assert waiting_at_most == min(4_096, int(Path("/proc/sys/net/core/somaxconn").read_text()))
