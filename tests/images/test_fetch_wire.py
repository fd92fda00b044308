"""Tests of reading an image from the wire: framing, lengths, and connections that are used again."""

from __future__ import annotations

import asyncio
import gzip
import io
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from aiohttp import web
from PIL import Image

from imagegen.body_receiver import BodyReceiver
from imagegen.images import fetch
from imagegen.images.fetch import ImageFetcher
from imagegen.images.link_client import LinkResponse
from imagegen.images.sniff import sniff
from imagegen.tasks.image import ImageBytes, ImageLink
from tests.images.link_server import (
    LARGE,
    PNG,
    Handler,
    Upstream,
    answers,
    contents,
    make_fetcher,
    noise,
    open_session,
)
from tests.support import LoopTime, eventually

pytestmark = pytest.mark.usefixtures("no_backoff")


def sends(head: bytes, body: bytes) -> Handler:
    """Return a handler that sends raw bytes, possibly invalid HTTP, and closes the connection."""

    async def answer(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.write(b"HTTP/1.1 200 OK\r\n" + head + b"\r\n\r\n" + body)
        request.transport.close()
        return web.Response()

    return answer


def sends_raw(*pieces: bytes) -> Handler:
    """Return a handler that sends raw bytes, and closes the connection."""

    async def answer(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        for piece in pieces:
            request.transport.write(piece)
        request.transport.close()
        return web.Response()

    return answer


def chunk(data: bytes) -> bytes:
    return b"%x\r\n" % len(data) + data + b"\r\n"


@pytest.mark.parametrize("data", [PNG, noise(700)], ids=["small", "large"])
@pytest.mark.parametrize(
    "form",
    [
        lambda data: answers(206, body=data, headers={"Content-Range": f"bytes 0-{len(data) - 1}/{len(data)}"}),
        lambda data: answers(203, body=data),
        lambda data: answers(body=gzip.compress(data)),
        lambda data: answers(body=gzip.compress(data), headers={"Content-Encoding": "gzip"}),
        lambda data: answers(body=zlib.compress(data), headers={"Content-Encoding": "deflate"}),
        lambda data: answers(body=data, headers={"Content-Encoding": "gzip"}),
        lambda data: answers(body=data, headers={"Content-Encoding": "br"}),
        lambda data: answers(body=data, headers={"X-Policy": "a" * 60_000}),
        lambda data: sends(b"Transfer-Encoding: gzip, chunked", chunk(gzip.compress(data)) + b"0\r\n\r\n"),
        lambda data: sends(b"Transfer-Encoding: chunked", chunk(data[:9]) + chunk(data[9:]) + b"0\r\n\r\n"),
        lambda data: sends(b"Transfer-Encoding: chunked", chunk(data)),
        lambda data: sends(b"Transfer-Encoding: chunked", chunk(data) + b"no chunk"),
        lambda data: sends(b"Content-Length: 2000000\r\nTransfer-Encoding: chunked", chunk(data) + b"0\r\n\r\n"),
        lambda data: sends(b"Content-Length: %d" % (len(data) + 9), data),
        lambda data: sends(b"Content-Length: %d\r\nContent-Length: %d" % (len(data), len(data)), data),
        lambda data: sends(b"Content-Length: %d, 7" % len(data), data),
        lambda data: sends(b"Content-Length: -1", data),
        lambda data: sends(b"Content-Length: %d" % len(data), data + b"surplus"),
        lambda data: sends(b"Content-Length: %d\r\nConnection: close" % len(data), data + b"surplus"),
        lambda data: sends(b"B\xc3\xa4d : a\r\nX: a\0b\r\nno colon\r\nContent-Length: %d" % len(data), data),
        lambda data: sends(b"\r\n".join(b"X-%d: x" % n for n in range(1_000)), data),
        lambda data: sends(b"X: %b\r\nContent-Length: %d" % (b"x" * 100_000, len(data)), data),
        lambda data: answers(201, body=data),
        lambda data: answers(202, body=data),
        lambda data: answers(226, body=data),
    ],
    ids=[
        "whole range",
        "transformed",
        "stored as gzip",
        "gzip",
        "deflate",
        "plain as gzip",
        "plain as brotli",
        "large head",
        "transferred as gzip",
        "chunked",
        "chunked without an end",
        "chunked with a broken end",
        "chunked with a length",
        "too long a length",
        "two equal lengths",
        "two lengths",
        "negative length",
        "surplus",
        "surplus before a close",
        "broken headers",
        "many headers",
        "too large a header",
        "created",
        "accepted",
        "delta",
    ],
)
async def test_a_whole_image_is_read_with_any_framing(
    upstream: Upstream, data: bytes, form: Callable[[bytes], Handler]
) -> None:
    upstream.paths["/x"] = form(data)
    async with open_session(frozenset({upstream.host})) as session:
        image = await make_fetcher(session, frozenset({upstream.host})).fetch(upstream.link("/x"))
    assert image.size_bytes == len(data)


async def test_a_small_image_of_many_parts_does_not_block_the_loop(fetcher: ImageFetcher) -> None:
    file = io.BytesIO()
    Image.new("RGB", (24, 16), "teal").save(file, "JPEG")
    jpeg = file.getvalue()
    data = jpeg[:2] + b"\xff\xfe\0\2" * 60_000 + b"\xff" * 10_000 + jpeg[2:]
    began_s = time.thread_time()
    sniff(data)
    alone_s = time.thread_time() - began_s
    began_s = time.thread_time()
    assert (await fetcher.fetch(ImageBytes(data))).size_bytes == len(data)
    assert time.thread_time() - began_s < alone_s / 3


async def test_a_declared_length_that_cuts_an_image_is_not_believed(fetcher: ImageFetcher, upstream: Upstream) -> None:
    upstream.paths["/x"] = sends(b"Content-Length: %d" % (len(PNG) - 9), PNG)
    assert (await fetcher.fetch(upstream.link("/x"))).size_bytes == len(PNG)


async def test_informational_responses_are_passed_over(fetcher: ImageFetcher, upstream: Upstream) -> None:
    early = b"Link: </a>\r\n\r\n" + b"HTTP/1.1 103 Early Hints\r\nLink: </b>\r\n\r\n" * 500
    upstream.paths["/x"] = sends_raw(
        b"HTTP/1.1 103 Early Hints\r\n" + early, b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(PNG), PNG
    )
    assert (await fetcher.fetch(upstream.link("/x"))).size_bytes == len(PNG)


async def test_images_of_one_host_come_over_one_connection(fetcher: ImageFetcher, upstream: Upstream) -> None:
    peers: set[object] = set()

    async def record_peer(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        peers.add(request.transport.get_extra_info("peername"))
        return web.Response(body=PNG)

    upstream.paths |= {"/a": record_peer, "/b": record_peer}
    for path in ("/a", "/b", "/a"):
        await fetcher.fetch(upstream.link(path))
    assert len(upstream.requests) == 3
    assert len(peers) == 1


async def test_a_connection_on_which_a_body_did_not_end_is_not_used_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    receivers, receiver = list[BodyReceiver](), LinkResponse.receiver

    def recorded(response: LinkResponse, length: int) -> BodyReceiver:
        receivers.append(receiver(response, length))
        return receivers[-1]

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(writer)
        while await reader.read(4_096):
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(LARGE) + 9, LARGE))
            await eventually(lambda: len(receivers) == len(connections) and receivers[-1].left == 9)
            await LoopTime().move(10)

    monkeypatch.setattr(LinkResponse, "receiver", recorded)
    connections: list[asyncio.StreamWriter] = []
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    host = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server, open_session(frozenset({host})) as session:
        fetcher = make_fetcher(session, frozenset({host}), timeout_s=30, folder=tmp_path)
        for _ in range(2):
            image = await fetcher.fetch(ImageLink(f"http://{host}/x"))
            assert image.path is not None
            assert contents(image.path) == LARGE
        assert len(connections) == 2
        for writer in connections:
            writer.close()


async def test_a_closed_idle_connection_is_replaced_immediately(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fetch, "MAX_TRIES", 1)
    requests: list[int] = []

    async def serve_one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number = len(requests)
        while head := await reader.read(4_096):
            assert head.endswith(b"\r\n\r\n")
            requests.append(number)
            if requests.count(number) > 1:
                break
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(PNG), PNG))
        writer.close()

    server = await asyncio.start_server(serve_one, "127.0.0.1", 0)
    host = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server, open_session(frozenset({host})) as session:
        fetcher = make_fetcher(session, frozenset({host}))
        for _ in range(2):
            assert (await fetcher.fetch(ImageLink(f"http://{host}/x"))).data == PNG
    assert requests == [0, 0, 2]
