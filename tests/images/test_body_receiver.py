"""Tests of bodies that are received into their place in memory, from hosts that stall, break off, and speak TLS."""

from __future__ import annotations

import asyncio
import fcntl
import gc
import os
import shutil
import ssl
import subprocess
import sys
import termios
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import aiohttp
import pytest
from yarl import URL

from imagegen.body_receiver import BodyReceiver, next_piece
from imagegen.images.link_client import LinkBody, LinkClient, LinkResponse
from tests.support import LoopTime, eventually, over_rows

BODY = os.urandom(3_000_000)
Send = Callable[[asyncio.StreamWriter], Awaitable[None]]


class Host:
    """HTTP server that answers each request by `send`, with the head of a body of `BODY`'s length before it."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.connections = self.closed = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        with suppress(asyncio.IncompleteReadError, OSError):
            while await reader.readuntil(b"\r\n\r\n"):
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(BODY))
                await self._send(writer)
        self.closed += 1
        writer.close()


@asynccontextmanager
async def client_of(
    host: Host, *, stall_s: float = 60.0, folder: Path | None = None
) -> AsyncIterator[tuple[LinkClient, URL]]:
    """Yield a client and the host's address; folder: for the certificate of a host with TLS."""
    server_context, client_context = tls(folder) if folder else (None, None)
    server = await asyncio.start_server(host.serve, "127.0.0.1", 0, ssl=server_context)
    connector = aiohttp.TCPConnector(ssl=client_context or True)
    async with server, aiohttp.ClientSession(connector=connector) as session:
        port = server.sockets[0].getsockname()[1]
        yield LinkClient(session, {}, stall_s), URL(f"http{'s' if folder else ''}://localhost:{port}/image")


def tls(folder: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    if shutil.which("openssl") is None:
        pytest.skip("needs the command openssl")
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]  # quickly made, unlike a key of RSA
    command = ["openssl", "req", "-x509", *curve, "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    names = ["-addext", "subjectAltName=DNS:localhost", "-out", str(certificate), "-keyout", str(key)]
    subprocess.run([*command, *names], check=True, capture_output=True)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate, key)
    return server, ssl.create_default_context(cafile=str(certificate))


async def received(response: LinkResponse) -> bytes:
    """Return a body that is received in three parts."""
    whole, receiver = b"", response.receiver(len(BODY))
    buffer = memoryview(bytearray(1_100_000))
    while receiver.left:
        whole += buffer[: await receiver.fill(buffer)]
    return whole


def unread_bytes(connection: asyncio.Transport) -> int:
    """Return how many bytes of a connection the system has that were not read."""
    descriptor = connection.get_extra_info("socket").fileno()
    return int.from_bytes(fcntl.ioctl(descriptor, termios.FIONREAD, bytes(4)), sys.byteorder)


async def send_in_parts(writer: asyncio.StreamWriter) -> None:
    for at in range(0, len(BODY), 70_000):
        writer.write(BODY[at : at + 70_000])
        await writer.drain()


@pytest.mark.parametrize("with_tls", [False, True])
async def test_a_large_body_is_received_in_parts_and_its_connection_is_used_again(
    tmp_path: Path, with_tls: bool
) -> None:
    host = Host(send_in_parts)
    async with client_of(host, folder=tmp_path if with_tls else None) as (client, url):
        for _ in range(3):
            assert await client.get(url, received) == BODY
    assert host.connections == 1


async def test_a_body_that_comes_at_once_is_received_too() -> None:
    async def send(writer: asyncio.StreamWriter) -> None:
        writer.write(BODY)

    host = Host(send)
    async with client_of(host) as (client, url):
        assert [await client.get(url, received) == BODY for _ in range(2)] == [True, True]
    assert host.connections == 1


@pytest.mark.parametrize("with_tls", [False, True])
@pytest.mark.parametrize("sent_bytes", [0, 1_000, 2_999_999])
async def test_a_body_that_ends_early_is_a_failure(tmp_path: Path, with_tls: bool, sent_bytes: int) -> None:
    async def send(writer: asyncio.StreamWriter) -> None:
        writer.write(BODY[:sent_bytes])
        await writer.drain()
        writer.close()

    async with client_of(Host(send), folder=tmp_path if with_tls else None) as (client, url):
        with pytest.raises((aiohttp.ClientError, OSError)):
            await client.get(url, received)


async def test_a_host_that_stalls_within_a_body_is_left() -> None:
    async def send(writer: asyncio.StreamWriter) -> None:
        writer.write(BODY[:700_000])

    host = Host(send)
    async with client_of(host, stall_s=0.2) as (client, url):
        with pytest.raises(TimeoutError):
            await client.get(url, received)
        await eventually(lambda: host.closed)


@pytest.mark.parametrize("passed_s", [1.0, 60.0], ids=["slow", "this process was paused"])
async def test_bytes_that_do_not_wake_the_loop_are_noticed_before_their_host_counts_as_stalled(passed_s: float) -> None:
    noticed = asyncio.Event()

    async def send(writer: asyncio.StreamWriter) -> None:
        writer.write(BODY[:1_000])
        await writer.drain()
        await began.wait()
        writer.write(BODY[1_000:2_000])  # the system does not wake the loop for so little
        await noticed.wait()
        writer.write(BODY[2_000:])

    began = asyncio.Event()

    async def slowly_received(response: LinkResponse) -> bytes:
        whole, receiver = memoryview(bytearray(len(BODY))), response.receiver(len(BODY))
        filling = asyncio.create_task(receiver.fill(whole))
        await eventually(lambda: receiver.left <= len(BODY) - 1_000)
        began.set()
        connection = response.protocol.transport
        assert connection is not None
        await eventually(lambda: unread_bytes(connection) == 1_000)
        await LoopTime().move(passed_s)
        await eventually(lambda: receiver.left <= len(BODY) - 2_000)
        noticed.set()
        await filling
        return bytes(whole)

    async with client_of(Host(send), stall_s=60.0) as (client, url):
        assert await client.get(url, slowly_received) == BODY


async def test_a_receiver_that_is_cancelled_takes_no_bytes_of_the_next_response() -> None:
    async def send(writer: asyncio.StreamWriter) -> None:
        writer.write(BODY[:1_000_000])

    host, receivers = Host(send), list[BodyReceiver]()

    async def read(response: LinkResponse) -> bytes:
        receivers.append(response.receiver(len(BODY)))
        await receivers[0].fill(memoryview(bytearray(len(BODY))))
        return b""

    async with client_of(host) as (client, url):
        getting = asyncio.create_task(client.get(url, read))
        await eventually(lambda: receivers and receivers[0].left < len(BODY))
        getting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await getting
        await eventually(lambda: host.closed == 1)


async def test_a_body_counts_as_ended_where_its_connection_was_closed_before() -> None:
    async with client_of(Host(send_in_parts)) as (client, url):

        async def read(response: LinkResponse) -> bytes:
            response.protocol.close()
            return await received(response)

        with pytest.raises(aiohttp.ClientPayloadError):
            await client.get(url, read)


@over_rows("in_pieces", [False, True])
async def test_what_came_of_a_body_is_read_also_after_its_connection_has_ended(in_pieces: bool) -> None:
    async def send(writer: asyncio.StreamWriter) -> None:
        writer.write(BODY[:90_000])
        writer.close()

    came = bytearray(len(BODY))

    async def read(response: LinkResponse) -> None:
        await eventually(lambda: not response.protocol.connected)
        if not in_pieces:
            await response.receiver(len(BODY)).fill(memoryview(came))
        at = 0
        while piece := await next_piece(response.content):
            came[at : at + len(piece)] = piece
            at += len(piece)

    async with client_of(Host(send)) as (client, url):
        with pytest.raises(aiohttp.ClientPayloadError):
            await client.get(url, read)
    assert came[:90_000] == BODY[:90_000]


@pytest.mark.parametrize("with_tls", [False, True])
@pytest.mark.parametrize("extra", [b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nother", b"more than was declared"])
async def test_bytes_after_a_body_are_never_taken_for_the_next_response(
    tmp_path: Path, with_tls: bool, extra: bytes
) -> None:
    async def send(writer: asyncio.StreamWriter) -> None:
        writer.write(BODY + extra)
        await writer.drain()

    host = Host(send)
    async with client_of(host, folder=tmp_path if with_tls else None) as (client, url):

        async def read(response: LinkResponse) -> bytes:
            assert response.content_length == len(BODY)
            whole = bytearray(len(BODY))
            await response.receiver(len(BODY)).fill(memoryview(whole))
            return bytes(whole)

        for _ in range(3):
            assert await client.get(url, read) == BODY
    assert host.connections == 3


async def read_in_pieces(response: LinkResponse) -> bytes:
    whole = b""
    while piece := await next_piece(response.content):
        whole += piece
    return whole


async def test_a_body_that_this_side_leaves_unread_for_long_is_not_stalled() -> None:
    async def send(writer: asyncio.StreamWriter) -> None:
        writer.write(BODY)

    async def read_late(response: LinkResponse) -> bytes:
        transport = response.protocol.transport
        assert transport is not None
        await eventually(lambda: not transport.is_reading())
        await LoopTime().move(100.0)
        return await read_in_pieces(response)

    async with client_of(Host(send), stall_s=60.0) as (client, url):
        assert await client.get(url, read_late) == BODY


@pytest.mark.parametrize("sent_bytes", [0, 1_000])
async def test_a_host_that_stalls_within_a_body_that_is_read_as_it_comes_is_left(sent_bytes: int) -> None:
    async def send(writer: asyncio.StreamWriter) -> None:
        writer.write(BODY[:sent_bytes])

    async def read(response: LinkResponse) -> bytes:
        if sent_bytes:
            assert await next_piece(response.content) == BODY[:sent_bytes]
        reading = asyncio.create_task(read_in_pieces(response))
        await LoopTime().move(40.0)
        assert not reading.done()
        await LoopTime().move(21.0)
        return await reading

    host = Host(send)
    async with client_of(host, stall_s=60.0) as (client, url):
        with pytest.raises(TimeoutError):
            await client.get(url, read)
        await eventually(lambda: host.closed)


@pytest.mark.parametrize("with_tls", [False, True])
async def test_a_host_that_breaks_bodies_off_leaves_no_buffers_behind(tmp_path: Path, with_tls: bool) -> None:
    async def send(writer: asyncio.StreamWriter) -> None:
        writer.write(BODY[:2_000_000])
        await writer.drain()
        writer.transport.abort()

    async def read(response: LinkResponse) -> None:
        body = LinkBody(response)
        await body.fill(memoryview(bytearray(len(BODY))))
        assert body.error is not None

    def left() -> list[object]:
        """Return what a garbage collection has to look at."""
        kinds = (BodyReceiver, LinkBody, aiohttp.StreamReader, memoryview)
        return [kept for kept in gc.get_objects() if isinstance(kept, kinds)]

    async with client_of(Host(send), folder=tmp_path if with_tls else None) as (client, url):
        gc.collect()
        before = len(left())
        gc.disable()
        try:
            for _ in range(5):
                await client.get(url, read)
            await eventually(lambda: len(left()) < before + 5)
        finally:
            gc.enable()
