"""Tests of JSON with images in it: the bytes that a client receives, and what a client costs that stops reading."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import ClassVar

import pytest
from aiohttp import ClientSession, web
from aiohttp.test_utils import TestServer

from imagegen.errors import StoreUnavailable
from imagegen.images.disk import DiskStore
from imagegen.images.store import OpenedImage
from imagegen.tasks.image import StoredImage
from imagegen.turn_queue import PER_TURN, TurnQueue
from imagegen.web.http.event_stream import EventStream
from imagegen.web.http.image_sending import ImageSender
from imagegen.web.http.json_with_images import (
    IN_MEMORY_BYTES,
    STEP_COST,
    ImageText,
    image_text,
    json_with_images,
    parts_of,
    pieces_of,
)
from imagegen.web.http.unread import UnreadResponses
from tests.edge_server import edge_server
from tests.support import Turns

TASK = "0" * 32


class Files(DiskStore):
    """Store of one image in a file, without a cache."""

    def __init__(self, path: Path) -> None:
        super().__init__(path.parent, max_bytes=0)
        self.path = path

    async def open(self, _task_id: str, image: StoredImage) -> OpenedImage | None:
        if not self.path.exists():
            return None
        return OpenedImage(image.size_bytes, file=self.path.open("rb", buffering=0))


@pytest.fixture
def store(tmp_path: Path) -> Files:
    return Files(tmp_path / "image")


async def stored(store: Files, data: bytes) -> StoredImage:
    store.path.write_bytes(data)
    return StoredImage(0, "image/png", len(data), 8, 8, "a" * 64)


async def received(stream: AsyncGenerator[bytes, None]) -> bytes:
    return b"".join([piece async for piece in stream])


SIZES = [0, 1, 2, 3, IN_MEMORY_BYTES, IN_MEMORY_BYTES + 1, 262_143, 262_144, 262_145, 262_146, 800_001, 800_002]


@pytest.mark.parametrize("size", SIZES)
async def test_an_image_of_any_size_is_the_base64_of_its_bytes(store: Files, size: int) -> None:
    data = bytes(number * 7 % 251 for number in range(size))
    image = await stored(store, data)
    text = await image_text(store, TASK, image)
    assert isinstance(text, ImageText) is (size > IN_MEMORY_BYTES)
    value = {"a": [{"data": text, "other": 'é"'}], "again": text}
    body = await received(pieces_of(parts_of(json.dumps(value).encode(), value), store, TurnQueue()))
    expected = base64.b64encode(data).decode()
    assert json.loads(body) == {"a": [{"data": expected, "other": 'é"'}], "again": expected}


class CountedImage(OpenedImage):
    """Image that is read from memory, so that no read waits. reads: of all such images."""

    reads: ClassVar[list[int]] = []

    def read(self, start: int = 0, length: int | None = None) -> AsyncGenerator[bytes, None]:
        self.reads.append(start)
        return super().read(start, length)


class InMemory(Files):
    """Store of one image in memory."""

    async def open(self, _task_id: str, image: StoredImage) -> OpenedImage | None:
        return CountedImage(image.size_bytes, self.path.read_bytes())


async def test_images_of_many_responses_are_encoded_a_few_steps_in_a_turn(tmp_path: Path) -> None:
    store, turns = InMemory(tmp_path / "image"), TurnQueue()
    image = await stored(store, bytes(1_000_000))
    text = await image_text(store, TASK, image)
    CountedImage.reads.clear()
    seen = Turns(lambda: len(CountedImage.reads))
    bodies = [received(pieces_of(parts_of(json.dumps(text).encode(), text), store, turns)) for _ in range(20)]
    await asyncio.gather(*bodies)
    assert len(CountedImage.reads) == 20 * 7
    assert seen.most() <= PER_TURN // STEP_COST


async def test_a_client_that_stops_reading_costs_little_memory_and_is_cut(store: Files) -> None:
    image = await stored(store, bytes(12_000_000))
    sender = ImageSender()
    buffered, ended = list[int](), asyncio.Event()

    async def handle(request: web.Request) -> web.StreamResponse:
        value = {"data": await image_text(store, TASK, image)}
        response = json_with_images(json.dumps(value).encode(), value, store, sender)
        assert response is not None
        watch = asyncio.create_task(watch_buffer(request))
        try:
            await response.prepare(request)
            await response.write_eof()
        finally:  # it is cut, or cancelled by the test server since it was cut
            watch.cancel()
            ended.set()
        return response

    async def watch_buffer(request: web.Request) -> None:
        while request.transport is not None:
            buffered.append(request.transport.get_write_buffer_size())
            await asyncio.sleep(0.01)

    app = web.Application()
    app.router.add_get("/", handle)
    async with edge_server(app, unread=UnreadResponses(stall_s=0.5)) as server, ClientSession() as session:
        async with session.get(server.make_url("/")) as whole:
            assert json.loads(await whole.read()) == {"data": base64.b64encode(bytes(12_000_000)).decode()}
        ended.clear()
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
            client.connect((server.host, server.port))
            client.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            await asyncio.wait_for(ended.wait(), 20)
        assert max(buffered) < 1_000_000


async def test_an_image_that_is_gone_meanwhile_cuts_the_connection(store: Files) -> None:
    image = await stored(store, bytes(100_000))
    value = {"data": await image_text(store, TASK, image)}
    store.path.unlink()
    with pytest.raises(StoreUnavailable):
        await received(pieces_of(parts_of(json.dumps(value).encode(), value), store, TurnQueue()))
    with pytest.raises(StoreUnavailable):
        await image_text(store, TASK, image)


async def test_no_comment_line_comes_within_an_event_that_is_sent_in_pieces() -> None:
    async def pieces() -> AsyncGenerator[bytes, None]:
        for number in range(5):
            yield b"%d" % number
            await asyncio.sleep(0)  # the comment may come in this turn

    async def handle(request: web.Request) -> web.StreamResponse:
        stream = EventStream()
        await stream.prepare(request)
        await asyncio.gather(stream.send_pieces("message", pieces()), stream.write(b": a comment\r\n\r\n"))
        return stream

    app = web.Application()
    app.router.add_get("/", handle)
    async with TestServer(app) as server, ClientSession() as session, session.get(server.make_url("/")) as response:
        assert await response.text() == "event: message\r\ndata: 01234\r\n\r\n: a comment\r\n\r\n"
