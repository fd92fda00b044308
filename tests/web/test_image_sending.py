"""Tests of sending images: whole, in ranges, to clients that disconnect, and to clients that stop reading."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import socket
import sys
import tracemalloc
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, closing
from io import FileIO
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request
from multidict import CIMultiDict

from imagegen.images.store import OpenedImage
from imagegen.memory_tuning import resident_bytes
from imagegen.metrics import Meter
from imagegen.web.api.images import requested_range
from imagegen.web.http import middleware
from imagegen.web.http import server as http_server
from imagegen.web.http.image_sending import ImageSender
from imagegen.web.http.responses import etag_matches
from imagegen.web.http.server import ImagegenRunner
from tests.support import LoopTime, eventually, over_rows

LARGE = os.urandom(12_000_000)
Serve = Callable[..., Awaitable["Served"]]


class Served:
    """Server of one image, with the sources it opened."""

    def __init__(self, opens: Callable[[], OpenedImage], sender: ImageSender) -> None:
        self.opened: list[OpenedImage] = []
        self.port = 0
        self._opens = opens
        self._sender = sender

    async def handle(self, request: web.Request) -> web.StreamResponse:
        opened = self._opens()
        self.opened.append(opened)
        part = range(*map(int, request.query.get("part", f"0,{opened.size_bytes}").split(",")))
        return await self._sender.send(request, opened, part, 200, {"Content-Type": "image/png"})

    async def get(self, query: str = "", **options: Any) -> bytes:
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"http://127.0.0.1:{self.port}/{query}", **options) as answer,
        ):
            assert answer.headers["Content-Type"] == "image/png"
            return await answer.read()

    async def stalled(self) -> asyncio.StreamWriter:
        """Return a client that sent its request, whose source is opened, and that reads nothing."""
        before = len(self.opened)
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.setblocking(False)
        await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", self.port))
        _, writer = await asyncio.open_connection(sock=connection, limit=1)
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        await eventually(lambda: len(self.opened) > before)
        return writer

    @property
    def closed(self) -> bool:
        """Return whether every opened source is closed."""
        return all(map(is_closed, self.opened))

    async def cut(self, time: LoopTime, stall_s: float) -> None:
        """Let time pass until every opened source is closed."""

        async def closed_later() -> bool:
            await time.move(stall_s)
            return self.closed

        await eventually(closed_later)


def is_closed(opened: OpenedImage) -> bool:
    return opened.data is None and opened.pieces is None and (opened.file is None or opened.file.closed)


@pytest.fixture
def opens(tmp_path: Path) -> dict[str, Callable[[], OpenedImage]]:
    """Return a large image's sources: a file, memory, and pieces of a remote store."""
    (tmp_path / "image").write_bytes(LARGE)

    async def pieces(offset: int, length: int) -> AsyncGenerator[bytes, None]:
        for start in range(offset, offset + length, 2_000_000):
            yield LARGE[start : min(start + 2_000_000, offset + length)]

    return {
        "file": lambda: OpenedImage(len(LARGE), file=FileIO(tmp_path / "image")),
        "data": lambda: OpenedImage(len(LARGE), LARGE),
        "pieces": lambda: OpenedImage(len(LARGE), pieces=pieces),
    }


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    async with AsyncExitStack() as stack:

        async def start(opens: Callable[[], OpenedImage], *, send_buffer: int = 0, **limits: Any) -> Served:
            served = Served(opens, ImageSender(**limits))
            app = web.Application()
            middleware.install_pipeline(app, middleware.RequestPipeline(Meter(), access_log=False))
            app.router.add_get("/", served.handle)
            runner = ImagegenRunner(app)
            stack.push_async_callback(runner.cleanup)
            await runner.setup()
            listening = socket.create_server(("127.0.0.1", 0))
            if send_buffer:
                listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
            await web.SockSite(runner, listening).start()
            served.port = listening.getsockname()[1]
            return served

        yield start


@pytest.mark.parametrize("source", ["file", "data", "pieces"])
async def test_an_image_arrives_whole_and_in_parts(
    serve: Serve, opens: dict[str, Callable[[], OpenedImage]], source: str
) -> None:
    served = await serve(opens[source])
    assert await served.get() == LARGE
    assert await served.get("?part=5,9000000") == LARGE[5:9_000_000]
    assert await served.get("?part=11999999,12000000") == LARGE[-1:]
    assert await served.get(headers={"Connection": "close"}) == LARGE
    assert served.closed


async def test_a_platform_without_sendfile_sends_the_file_in_pieces(
    serve: Serve, opens: dict[str, Callable[[], OpenedImage]], monkeypatch: pytest.MonkeyPatch
) -> None:
    served = await serve(opens["file"])

    def unsupported(*_: object) -> int:
        raise OSError(95, "not supported")

    monkeypatch.setattr(os, "sendfile", unsupported)
    assert await served.get() == LARGE
    monkeypatch.delattr(os, "sendfile")
    assert await served.get("?part=1,300000") == LARGE[1:300_000]
    assert served.closed


@pytest.mark.parametrize("source", ["file", "data", "pieces"])
async def test_a_client_that_stops_reading_is_cut_and_its_image_closed(
    serve: Serve, opens: dict[str, Callable[[], OpenedImage]], source: str
) -> None:
    served, time = await serve(opens[source], stall_s=60.0), LoopTime()
    writer = await served.stalled()
    await served.cut(time, 60.0)
    writer.close()
    assert await served.get() == LARGE


@pytest.mark.parametrize("source", ["file", "data"])
async def test_a_slow_client_that_keeps_reading_is_not_cut(
    serve: Serve, opens: dict[str, Callable[[], OpenedImage]], source: str
) -> None:
    served, time = await serve(opens[source], send_buffer=262_144, stall_s=50.0), LoopTime()
    began = time.now()
    async with aiohttp.ClientSession(read_bufsize=65_536, timeout=aiohttp.ClientTimeout()) as session:
        answer = await session.get(f"http://127.0.0.1:{served.port}/")
        received = bytearray()
        async for piece in answer.content.iter_chunked(262_144):
            received += piece
            await time.move(5.0)
    assert received == LARGE
    assert time.now() - began > 200.0


@pytest.mark.parametrize("source", ["file", "data", "pieces"])
async def test_a_client_that_has_closed_its_own_side_gets_the_whole_image(
    serve: Serve, opens: dict[str, Callable[[], OpenedImage]], source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_server, "HALF_CLOSED_S", 0.0)
    served = await serve(opens[source])
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
    with closing(writer):
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n")
        writer.write_eof()
        assert await reader.read() == LARGE


@pytest.mark.parametrize("source", ["file", "data", "pieces"])
async def test_an_image_is_closed_as_soon_as_its_client_leaves(
    serve: Serve, opens: dict[str, Callable[[], OpenedImage]], source: str
) -> None:
    served = await serve(opens[source])
    for _ in range(20):
        writer = await served.stalled()
        writer.transport.abort()
    await eventually(lambda: served.closed)


@pytest.mark.parametrize("source", ["file", "data"])
async def test_the_longest_waiting_client_is_cut_over_the_limit(
    serve: Serve, opens: dict[str, Callable[[], OpenedImage]], source: str
) -> None:
    served = await serve(opens[source], max_transfers=2)
    writers = [await served.stalled() for _ in range(3)]
    await eventually(lambda: is_closed(served.opened[0]))
    assert [is_closed(opened) for opened in served.opened[1:]] == [False, False]
    for writer in writers:
        writer.transport.abort()
    await eventually(lambda: served.closed)


async def test_a_file_that_is_cut_while_it_is_sent_breaks_the_connection(
    serve: Serve, opens: dict[str, Callable[[], OpenedImage]], tmp_path: Path
) -> None:
    served = await serve(opens["file"])
    os.truncate(tmp_path / "image", 1_000_000)
    with pytest.raises(aiohttp.ClientPayloadError):
        await served.get()


async def test_stalled_and_departed_readers_cost_no_memory(
    serve: Serve, opens: dict[str, Callable[[], OpenedImage]]
) -> None:
    served = await serve(opens["file"])
    await served.get()
    gc.collect()
    before = resident_bytes()
    gc.disable()
    try:
        for _ in range(3):
            writers = [await served.stalled() for _ in range(40)]
            for writer in writers:
                writer.transport.abort()
            await eventually(lambda: served.closed)
        assert resident_bytes() - before < 20_000_000
    finally:
        gc.enable()


@pytest.mark.parametrize("small", [False, True])
async def test_a_platform_without_writev_sends_memory_through_the_transport(
    serve: Serve, opens: dict[str, Callable[[], OpenedImage]], monkeypatch: pytest.MonkeyPatch, *, small: bool
) -> None:
    data = LARGE[:200_000] if small else LARGE
    served = await serve(lambda: OpenedImage(len(data), data))
    monkeypatch.delattr(os, "writev")
    assert await served.get() == data
    assert await served.get("?part=1,190000") == data[1:190_000]
    assert served.closed


@pytest.mark.parametrize("source", ["file", "data"])
async def test_the_transport_sends_the_rest_without_a_free_descriptor(
    serve: Serve, opens: dict[str, Callable[[], OpenedImage]], monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    served = await serve(opens[source])

    def no_descriptor(_: int) -> int:
        raise OSError(errno.EMFILE, "too many open files")

    monkeypatch.setattr(os, "dup", no_descriptor)
    assert await served.get() == LARGE
    assert served.closed


async def test_stalled_readers_of_one_image_in_memory_share_its_bytes(
    serve: Serve, opens: dict[str, Callable[[], OpenedImage]]
) -> None:
    served = await serve(opens["data"])
    await served.get()
    tracemalloc.start()
    try:
        writers = [await served.stalled() for _ in range(30)]
        assert await served.get() == LARGE
        assert tracemalloc.get_traced_memory()[0] < 5_000_000
    finally:
        tracemalloc.stop()
    assert not any(is_closed(opened) for opened in served.opened[1:31])
    for writer in writers:
        writer.transport.abort()
    await eventually(lambda: served.closed)


async def test_slow_readers_of_a_small_image_use_no_descriptor(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    served = await serve(lambda: OpenedImage(200_000, LARGE[:200_000]), send_buffer=4096)
    monkeypatch.setattr(os, "dup", lambda _: pytest.fail("a descriptor was taken"))
    writers = [await served.stalled() for _ in range(5)]
    assert await served.get() == LARGE[:200_000]
    assert not any(is_closed(opened) for opened in served.opened[:5])
    for writer in writers:
        writer.transport.abort()
    await eventually(lambda: served.closed)


async def test_clients_that_left_or_stalled_leave_no_bytes_behind(
    serve: Serve, opens: dict[str, Callable[[], OpenedImage]]
) -> None:
    served, time = await serve(opens["data"], stall_s=60.0), LoopTime()
    await served.get()
    gc.collect()
    before = sys.getrefcount(LARGE)
    gc.disable()
    try:
        writers = [await served.stalled() for _ in range(10)]
        for writer in writers[:5]:
            writer.transport.abort()
        await served.cut(time, 60.0)
        await eventually(lambda: sys.getrefcount(LARGE) <= before)
    finally:
        gc.enable()
    for writer in writers[5:]:
        writer.transport.abort()


async def test_an_idle_connection_holds_no_bytes_of_its_last_image(
    serve: Serve, opens: dict[str, Callable[[], OpenedImage]]
) -> None:
    served = await serve(opens["data"])
    gc.collect()
    before = sys.getrefcount(LARGE)
    async with aiohttp.ClientSession() as session:
        async with session.get(f"http://127.0.0.1:{served.port}/") as response:
            assert await response.read() == LARGE
        await eventually(lambda: sys.getrefcount(LARGE) <= before)


@pytest.mark.parametrize(
    ("header", "part"),
    [
        ("bytes=0-9", range(10)),
        ("Bytes=0-9", range(10)),
        ("bytes=90-", range(90, 100)),
        ("bytes=-5", range(95, 100)),
        ("bytes=5-999", range(5, 100)),
        ("bytes=0-" + "9" * 4301, range(100)),
        ("bytes=-" + "9" * 4301, range(100)),
        ("bytes=" + "9" * 4301 + "-", range(0)),
        ("bytes=100-", range(0)),
        ("bytes=-0", range(0)),
        ("bytes=00099-", range(99, 100)),
        ("bytes=9-5", None),
        ("bytes=0-1,5-6", None),
        ("bytes=-", None),
        ("bytes=٠-", None),
        ("items=0-1", None),
    ],
)
def test_a_range_of_any_length_is_parsed_as_defined(header: str, part: range | None) -> None:
    found = requested_range(header, 100)
    assert (found is None) == (part is None)
    assert list(found or ()) == list(part or ())


@over_rows(
    ("values", "matches"),
    [
        (['"v1"'], True),
        (['W/"v1"'], True),
        (['"v0", W/"v1","v2"'], True),
        (['"v0"', '"v1"'], True),
        (["*"], True),
        (['"v0", v1, "v1"'], True),
        (['"v10"', '"v0,v1"'], False),
        (["v1"], False),
        ([""], False),
        ([], False),
    ],
)
def test_a_version_is_found_in_each_form_of_the_header(values: list[str], matches: bool) -> None:
    headers = CIMultiDict([("If-None-Match", value) for value in values])
    assert etag_matches(make_mocked_request("GET", "/", headers=headers), '"v1"') is matches
