"""Tests of fetching a provider's image from loopback servers that redirect, send false headers, break and stall."""

from __future__ import annotations

import asyncio
import errno
import gzip
import io
import os
import socket
import struct
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pybase64
import pytest
from aiohttp import web
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.test_utils import TestServer
from PIL import Image
from yarl import URL

from imagegen.byte_budget import ByteBudget
from imagegen.errors import DownloadFailed, ImageRejected, StoreUnavailable
from imagegen.images import fetch
from imagegen.images.fetch import ImageFetcher
from imagegen.images.image_links import Origin
from imagegen.images.sniff import sniff
from imagegen.ssrf import guarded_connector
from imagegen.tasks.image import GivenImage, ImageBase64, ImageBytes, ImageLink
from tests.images.backings import spool_in
from tests.support import over_rows

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def _png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (24, 16), "teal").save(file, "PNG")
    return file.getvalue()


def noise(side: int) -> bytes:
    file = io.BytesIO()
    Image.frombytes("RGB", (side, side), os.urandom(side * side * 3)).save(file, "PNG", compress_level=0)
    return file.getvalue()


PNG = _png()
ENDLESS_START = PNG[:33] + b"\x7f\xff\xff\xfftEXt"
"""Start of a PNG with a chunk of 2 GiB."""


@dataclass
class Upstream:
    """Server with scripted paths, and the requests it received."""

    port: int
    paths: dict[str, Handler]
    requests: list[web.Request] = field(default_factory=list)

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    def link(self, path: str) -> ImageLink:
        return ImageLink(f"http://{self.host}{path}")

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(request)
        return await self.paths[request.path](request)


async def serve() -> AsyncIterator[Upstream]:
    upstream = Upstream(0, {"/ok": answers(body=PNG, content_type="image/jpeg")})
    app = web.Application()
    app.router.add_get("/{path:.*}", upstream.answer)
    async with TestServer(app, host="127.0.0.1") as server:
        upstream.port = server.port or 0
        yield upstream


upstream = pytest.fixture(serve)
stranger = pytest.fixture(serve)


@pytest.fixture(autouse=True)
def _no_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "BACKOFF_S", 0.0)


def make_fetcher(
    session: aiohttp.ClientSession,
    own_hosts: frozenset[str] = frozenset(),
    *,
    timeout_s: float = 5.0,
    folder: Path | None = None,
    memory: ByteBudget | None = None,
    base_url: URL | None = None,
    **options: Any,
) -> ImageFetcher:
    origin = Origin(own_hosts, base_url)
    return ImageFetcher(session, spool_in(folder, memory), origin, timeout_s=timeout_s, **options)


@pytest.fixture
async def fetcher(upstream: Upstream) -> AsyncIterator[ImageFetcher]:
    own = frozenset({upstream.host})
    async with open_session(own) as session:
        yield make_fetcher(session, own, base_url=URL(f"http://{upstream.host}/v1"), max_bytes=1_000_000)


def open_session(own_hosts: frozenset[str], resolver: AbstractResolver | None = None) -> aiohttp.ClientSession:
    connector = guarded_connector(own_hosts, inner=resolver)
    return aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar())


def answers(status: int = 200, **response: object) -> Handler:
    async def answer(_: web.Request) -> web.StreamResponse:
        return web.Response(status=status, **response)  # type: ignore[arg-type]

    return answer


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


def redirects(location: str, status: int = 302) -> Handler:
    return answers(status, headers={"Location": location})


def in_turn(*handlers: Handler) -> Handler:
    left = list(handlers)

    async def answer(request: web.Request) -> web.StreamResponse:
        return await (left.pop(0) if len(left) > 1 else left[0])(request)

    return answer


async def resets(request: web.Request) -> web.StreamResponse:
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


async def breaks_off(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Length": str(len(PNG))})
    await response.prepare(request)
    await response.write(PNG[:20])
    return await resets(request)


async def refusal(fetcher: ImageFetcher, image: GivenImage, age_s: float = 0.0) -> ImageRejected:
    with pytest.raises(ImageRejected) as caught:
        await fetcher.fetch(image, age_s=age_s)
    assert caught.value.code == "upstream_bad_response"
    assert not caught.value.retryable
    assert not caught.value.ambiguous
    return caught.value


async def failure(fetcher: ImageFetcher, link: ImageLink, age_s: float = 0.0) -> DownloadFailed:
    """Return the error of a link that may work later."""
    with pytest.raises(DownloadFailed) as caught:
        await fetcher.fetch(link, age_s=age_s)
    return caught.value


async def test_a_link_becomes_checked_bytes_of_any_declared_type(fetcher: ImageFetcher, upstream: Upstream) -> None:
    image = await fetcher.fetch(upstream.link("/ok"))
    assert (image.data, image.content_type, image.width, image.height) == (PNG, "image/png", 24, 16)


async def test_bytes_are_checked_without_a_request(fetcher: ImageFetcher, upstream: Upstream) -> None:
    assert (await fetcher.fetch(ImageBytes(PNG))).width == 24
    assert upstream.requests == []


async def test_a_large_image_is_checked(fetcher: ImageFetcher) -> None:
    file = io.BytesIO()
    Image.effect_noise((800, 800), 90).save(file, "PNG")
    assert len(file.getvalue()) > 300_000
    assert (await fetcher.fetch(ImageBytes(file.getvalue()))).width == 800


@pytest.mark.parametrize("data", [b"", b"<html>", PNG[:-1], b"GIF89a", bytes(1_000_001)])
async def test_bytes_that_are_not_an_image_are_rejected(fetcher: ImageFetcher, data: bytes) -> None:
    await refusal(fetcher, ImageBytes(data))


async def test_the_request_names_itself_and_carries_no_credentials(fetcher: ImageFetcher, upstream: Upstream) -> None:
    upstream.paths["/a"] = answers(302, headers={"Location": "/ok", "Set-Cookie": "session=1; Path=/"})
    await fetcher.fetch(upstream.link("/a"))
    await fetcher.fetch(upstream.link("/a"))
    assert [request.path for request in upstream.requests] == ["/a", "/ok"] * 2
    for request in upstream.requests:
        assert request.headers["User-Agent"].startswith("imagegen/")
        assert not {"Authorization", "Cookie", "Referer"} & request.headers.keys()


async def test_a_signed_link_is_sent_as_it_was_written(fetcher: ImageFetcher, upstream: Upstream) -> None:
    path = "/ok?X-Amz-Signature=a%2Fb%3D%2b&path=x%2Fy+z&t=~%7E"
    upstream.paths["/go"] = redirects(path)
    await fetcher.fetch(upstream.link(path))
    await fetcher.fetch(upstream.link("/go"))
    assert [request.raw_path for request in upstream.requests] == [path, "/go", path]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_three_redirects_are_followed(fetcher: ImageFetcher, upstream: Upstream, status: int) -> None:
    upstream.paths |= {"/1": redirects("/2", status), "/2": redirects("3", status)}
    upstream.paths["/3"] = redirects(upstream.link("/ok").url, status)
    assert (await fetcher.fetch(upstream.link("/1"))).width == 24


async def test_a_fourth_redirect_or_a_loop_is_rejected(fetcher: ImageFetcher, upstream: Upstream) -> None:
    upstream.paths |= {f"/{n}": redirects(f"/{n + 1}") for n in range(4)} | {"/loop": redirects("/loop")}
    upstream.paths["/4"] = upstream.paths["/ok"]
    for path in ("/0", "/loop"):
        upstream.requests.clear()
        assert "redirects" in (await refusal(fetcher, upstream.link(path))).detail
        assert len(upstream.requests) == 4


@pytest.mark.parametrize(
    "link",
    [
        "/ok?size=1",
        "../ok",
        "http://127.0.0.1:{port}/ok",
        "http://127.1:{port}/ok",
        "http://0.0.0.0:{port}/ok",
        "http://2130706433:{port}/ok",
        "http://localhost/ok",
        "https://localhost:{port}/ok",
        "http://[::1]:{port}/ok",
        "http://[::ffff:127.0.0.1]:{port}/ok",
        "http://comfyui:8188/ok",
        "//127.0.0.1:{port}/ok",
    ],
)
async def test_an_alias_of_the_upstream_is_fetched_from_the_upstream(
    fetcher: ImageFetcher, upstream: Upstream, stranger: Upstream, link: str
) -> None:
    assert (await fetcher.fetch(ImageLink(link.format(port=stranger.port)))).data == PNG
    assert [request.path for request in upstream.requests] == ["/ok"]
    assert stranger.requests == []


async def test_a_redirect_of_another_host_is_not_relative_to_the_upstream(
    upstream: Upstream, stranger: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    stranger.paths["/go"] = redirects(f"http://localhost:{upstream.port}/ok")
    async with open_session(frozenset({upstream.host, stranger.host})) as session:
        fetcher = make_fetcher(session, frozenset({upstream.host}), base_url=URL(f"http://{upstream.host}"))
        monkeypatch.setattr(fetch, "check_host", lambda *_: None)
        await refusal(fetcher, stranger.link("/go"))
    assert upstream.requests == []


@pytest.mark.parametrize(
    "location",
    [
        "http://169.254.169.254/latest/meta-data/",
        "http://10.0.0.1/",
        "http://user:secret@{own}/ok",
        "file:///etc/passwd",
        "javascript:alert(1)",
        "data:image/png;base64,AAAA",
        "ftp://example.org/x",
        "http://[::1",
    ],
)
async def test_a_redirect_or_link_to_a_private_address_is_rejected(
    fetcher: ImageFetcher, upstream: Upstream, stranger: Upstream, location: str
) -> None:
    target = location.format(port=stranger.port, own=upstream.host)
    upstream.paths["/go"] = redirects(target)
    await refusal(fetcher, upstream.link("/go"))
    await refusal(fetcher, ImageLink(target))
    assert [request.path for request in upstream.requests] == ["/go"]
    assert stranger.requests == []


@pytest.mark.parametrize("handler", [redirects(""), answers(302), answers(307, headers={"Location": "  "})])
async def test_a_redirect_to_nowhere_may_pass(fetcher: ImageFetcher, upstream: Upstream, handler: Handler) -> None:
    upstream.paths["/x"] = handler
    await failure(fetcher, upstream.link("/x"))
    await refusal(fetcher, upstream.link("/x"), age_s=120.0)


class Everywhere(AbstractResolver):
    """Resolver with every name on loopback."""

    async def resolve(self, host: str, port: int = 0, family: object = None) -> list[ResolveResult]:
        return [ResolveResult(hostname=host, host="127.0.0.1", port=port, family=socket.AF_INET, proto=0, flags=0)]

    async def close(self) -> None:
        pass


async def test_a_name_with_a_private_address_is_rejected_without_retry(stranger: Upstream) -> None:
    async with open_session(frozenset(), Everywhere()) as session:
        fetcher = make_fetcher(session)
        error = await refusal(fetcher, ImageLink(f"http://pics.example.org:{stranger.port}/ok"))
    assert "not public" in error.detail
    assert stranger.requests == []


async def test_the_providers_own_name_may_be_private(stranger: Upstream) -> None:
    own = frozenset({f"gpu.example.org:{stranger.port}"})
    async with open_session(own, Everywhere()) as session:
        fetcher = make_fetcher(session, own, timeout_s=5)
        image = await fetcher.fetch(ImageLink(f"http://gpu.example.org:{stranger.port}/ok"))
    assert image.width == 24


@pytest.mark.parametrize("status", [404, 408, 429, 500, 502, 503, 504, 529])
async def test_a_failing_link_is_tried_three_times_and_may_work_later(
    fetcher: ImageFetcher, upstream: Upstream, status: int
) -> None:
    upstream.paths["/x"] = answers(status)
    assert str(status) in (await failure(fetcher, upstream.link("/x"))).detail
    assert len(upstream.requests) == 3


async def test_a_retry_after_of_the_host_is_honoured(fetcher: ImageFetcher, upstream: Upstream) -> None:
    upstream.paths["/x"] = answers(503, headers={"Retry-After": "7"})
    assert (await failure(fetcher, upstream.link("/x"))).retry_after_s == 7.0
    assert len(upstream.requests) == 1


async def test_a_link_that_is_not_found_a_minute_later_is_dead(fetcher: ImageFetcher, upstream: Upstream) -> None:
    upstream.paths["/x"] = answers(404)
    with pytest.raises(ImageRejected):
        await fetcher.fetch(upstream.link("/x"), age_s=61.0)


SETTLING = {
    "refused": answers(403),
    "logged out": answers(401),
    "accepted": answers(202),
    "empty": answers(204),
    "part": answers(206, body=PNG[:50]),
    "cut off": answers(body=PNG[:50]),
    "without a byte": answers(body=b""),
    "page": answers(body=b"<!DOCTYPE html><p>wait", content_type="text/html"),
    "message": answers(body=b'{"status":"processing"}', content_type="application/json"),
}


@pytest.mark.parametrize("answer", SETTLING.values(), ids=SETTLING)
async def test_a_new_link_that_fails_may_work_some_seconds_later(
    fetcher: ImageFetcher, upstream: Upstream, answer: Handler
) -> None:
    upstream.paths["/x"] = answer
    await failure(fetcher, upstream.link("/x"))
    with pytest.raises(ImageRejected):
        await fetcher.fetch(upstream.link("/x"), age_s=61.0)


@pytest.mark.parametrize(("status", "age_s"), [(201, 11.0), (204, 11.0), (400, 11.0), (401, 11.0), (410, 0.0)])
async def test_a_dead_link_is_not_retried(fetcher: ImageFetcher, upstream: Upstream, status: int, age_s: float) -> None:
    upstream.paths["/x"] = answers(status)
    assert (await refusal(fetcher, upstream.link("/x"), age_s=age_s)).renewable
    assert len(upstream.requests) == 1


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


@pytest.mark.parametrize("port", ["0", "99999", "x"])
async def test_a_link_with_an_impossible_port_is_rejected(fetcher: ImageFetcher, port: str) -> None:
    assert "not a valid address" in (await refusal(fetcher, ImageLink(f"http://127.0.0.1:{port}/x"))).detail


async def test_gzip_of_too_much_is_rejected(upstream: Upstream) -> None:
    upstream.paths["/x"] = answers(body=gzip.compress(ENDLESS_START + bytes(2_000_000)))
    async with open_session(frozenset({upstream.host})) as session:
        fetcher = make_fetcher(session, frozenset({upstream.host}), max_bytes=1_000_000)
        assert "over" in (await refusal(fetcher, upstream.link("/x"))).detail


@pytest.mark.parametrize("fault", [answers(503), answers(404), resets, breaks_off])
async def test_a_link_that_recovers_is_fetched_from_its_start(
    fetcher: ImageFetcher, upstream: Upstream, fault: Handler
) -> None:
    upstream.paths |= {"/1": redirects("/x"), "/x": in_turn(fault, fault, upstream.paths["/ok"])}
    assert (await fetcher.fetch(upstream.link("/1"))).data == PNG
    paths = [request.path for request in upstream.requests]
    assert (paths[0], paths.count("/x")) == ("/1", 3)


@pytest.mark.parametrize("fault", [resets, breaks_off])
async def test_a_link_that_always_breaks_off_may_work_later(
    fetcher: ImageFetcher, upstream: Upstream, fault: Handler
) -> None:
    upstream.paths["/x"] = fault
    assert "broke off" in (await failure(fetcher, upstream.link("/x"))).detail


async def test_no_connection_may_be_one_later(upstream: Upstream) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{closed.getsockname()[1]}"
        async with open_session(frozenset({host})) as session:
            fetcher = make_fetcher(session, frozenset({host}), timeout_s=5)
            assert "no connection" in (await failure(fetcher, ImageLink(f"http://{host}/ok"))).detail


@pytest.mark.parametrize(
    ("body", "tries", "lasting"),
    [
        (b"<svg/>", 1, True),
        (b"GIF89a123", 1, True),
        (b"<!DOCTYPE html><p>no", 3, True),
        (PNG[: len(PNG) // 2], 3, False),
        (b"", 3, False),
        (PNG[:33] + (b"\0\0\0\0tEXt" + struct.pack(">I", zlib.crc32(b"tEXt"))) * 70_000 + PNG[33:], 1, True),
    ],
)
async def test_only_damage_and_pages_are_retried_not_a_wrong_kind(
    fetcher: ImageFetcher, upstream: Upstream, body: bytes, tries: int, lasting: bool
) -> None:
    upstream.paths["/x"] = answers(body=body, content_type="image/png")
    error = await refusal(fetcher, upstream.link("/x"), age_s=0.0 if tries == 1 else 11.0)
    assert "can't be used" in error.detail
    assert error.lasting is lasting
    assert len(upstream.requests) == tries


async def test_a_declared_length_over_the_cap_is_rejected_unread(fetcher: ImageFetcher, upstream: Upstream) -> None:
    async def huge(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": str(10**12)})
        await response.prepare(request)
        await response.write(PNG)
        return response

    upstream.paths["/x"] = huge
    assert "over 1000000 bytes" in (await refusal(fetcher, upstream.link("/x"))).detail


@pytest.mark.parametrize("squeezed", [False, True])
async def test_an_endless_or_compressed_body_is_read_only_to_the_cap(
    fetcher: ImageFetcher, upstream: Upstream, squeezed: bool
) -> None:
    written = 0

    async def endless(request: web.Request) -> web.StreamResponse:
        nonlocal written
        response = web.StreamResponse()
        if squeezed:
            response.enable_compression(web.ContentCoding.gzip)
        await response.prepare(request)
        await response.write(ENDLESS_START)
        while written < 300_000_000:
            await response.write(bytes(100_000))
            written += 100_000
        return response

    upstream.paths["/x"] = endless
    assert "over 1000000 bytes" in (await refusal(fetcher, upstream.link("/x"))).detail
    assert written < 300_000_000


@pytest.mark.parametrize("trickle", [False, True])
async def test_a_stalled_or_trickling_link_ends_at_the_deadline(upstream: Upstream, trickle: bool) -> None:
    released = asyncio.Event()

    async def slow(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for byte in PNG * 100 if trickle else b"":
            await response.write(bytes([byte]))
            with suppress(TimeoutError):
                await asyncio.wait_for(released.wait(), 0.02)
        await released.wait()
        return response

    upstream.paths["/x"] = slow
    own = frozenset({upstream.host})
    async with open_session(own) as session:
        fetcher = make_fetcher(session, own, timeout_s=0.3)
        started = asyncio.get_running_loop().time()
        error = await failure(fetcher, upstream.link("/x"))
        assert asyncio.get_running_loop().time() - started < 10
        assert "0.3 s" in error.detail or "no answer in time" in error.detail
    released.set()


async def test_a_stalled_try_leaves_time_for_the_next(upstream: Upstream) -> None:
    released = asyncio.Event()

    async def stalls(_: web.Request) -> web.StreamResponse:
        await released.wait()
        return web.Response()

    upstream.paths["/x"] = in_turn(stalls, upstream.paths["/ok"])
    own = frozenset({upstream.host})
    async with open_session(own) as session:
        fetcher = make_fetcher(session, own, timeout_s=0.9)
        assert (await fetcher.fetch(upstream.link("/x"))).width == 24
    released.set()


async def test_a_cancelled_fetch_stays_cancelled(fetcher: ImageFetcher, upstream: Upstream) -> None:
    arrived, released = asyncio.Event(), asyncio.Event()

    async def stalls(_: web.Request) -> web.StreamResponse:
        arrived.set()
        await released.wait()
        return web.Response()

    upstream.paths["/x"] = stalls
    running = asyncio.create_task(fetcher.fetch(upstream.link("/x")))
    await arrived.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    released.set()


async def test_no_text_shows_the_links_path_or_query(fetcher: ImageFetcher, upstream: Upstream) -> None:
    upstream.paths |= {"/s3cret-path": answers(403), "/s3cret-503": answers(503), "/s3cret-html": answers(text="<p>")}
    upstream.paths["/s3cret-go"] = redirects("http://10.0.0.1/s3cret?s3cret")
    links = [upstream.link(f"{path}?sig=s3cret").url for path in upstream.paths if path != "/ok"]
    for link in [
        *links,
        "http://\x00s3cret/",
        "http:///s3cret",
        "http://a b/s3cret",
        "s3cret",
        "ftp://s3cret.example/?s3cret",
    ]:
        with pytest.raises((ImageRejected, DownloadFailed)) as caught:
            await fetcher.fetch(ImageLink(link))
        assert isinstance(caught.value, ImageRejected | DownloadFailed)
        detail = caught.value.detail
        assert "s3cret" not in detail.replace("s3cret.example", "")
        assert detail.isprintable()
        assert len(detail) <= 300


LARGE = noise(700)


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_large_image_is_spooled_and_uses_no_memory(upstream: Upstream, tmp_path: Path, chunked: bool) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={} if chunked else {"Content-Length": str(len(LARGE))})
        await response.prepare(request)
        await response.write(LARGE)
        return response

    upstream.paths["/x"] = answer
    own, memory = frozenset({upstream.host}), ByteBudget()
    async with open_session(own) as session:
        fetcher = make_fetcher(session, own, folder=tmp_path, memory=memory)
        image = await fetcher.fetch(upstream.link("/x"))
    assert image.data is None
    assert image.path is not None
    assert contents(image.path) == LARGE
    assert (image.size_bytes, image.width, memory.held) == (len(LARGE), 700, 0)


@pytest.mark.parametrize("compressed", [False, True])
async def test_an_image_that_is_received_in_several_parts_is_whole(
    upstream: Upstream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compressed: bool
) -> None:
    monkeypatch.setattr(fetch, "_FLUSH_BYTES", 400_000)
    upstream.paths["/x"] = answers(body=gzip.compress(LARGE, 1) if compressed else LARGE)
    own = frozenset({upstream.host})
    async with open_session(own) as session:
        image = await make_fetcher(session, own, folder=tmp_path).fetch(upstream.link("/x"))
    assert contents(image.path) == LARGE


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def contents(path: Path | None) -> bytes:
    assert path is not None
    return path.read_bytes()


def base64_image(data: bytes) -> ImageBase64:
    return ImageBase64(memoryview(pybase64.b64encode(data)))


async def test_base64_is_decoded_to_a_file_with_or_without_padding(tmp_path: Path) -> None:
    async with open_session(frozenset()) as session:
        fetcher = make_fetcher(session, folder=tmp_path)
        for text in (pybase64.b64encode(LARGE), pybase64.b64encode(LARGE).rstrip(b"=")):
            image = await fetcher.fetch(ImageBase64(memoryview(text)))
            assert image.path is not None
            assert contents(image.path) == LARGE
        assert (await fetcher.fetch(base64_image(PNG))).data == PNG
        for text in (b"not base64!!", pybase64.b64encode(LARGE)[:-9] + b"*" * 9):
            assert not (await refusal(fetcher, ImageBase64(memoryview(text)))).lasting
    assert len(names(tmp_path)) == 2


@over_rows(
    "change",
    [
        lambda text: text.translate(bytes.maketrans(b"+/", b"-_")),
        lambda text: b" " + text.rstrip(b"=") + b"===\t",
        lambda text: text.replace(b"+", b"%2B").replace(b"/", b"%2F"),
        lambda text: b"\n".join(text[at : at + 76] for at in range(0, len(text), 76)),
        lambda text: text.replace(b"+", b"\\u002B").replace(b"/", b"\\/"),
    ],
)
async def test_base64_in_other_forms_is_read(change: Callable[[bytes], bytes]) -> None:
    async with open_session(frozenset()) as session:
        fetcher = make_fetcher(session)
        for data in (noise(60), LARGE):
            text = change(pybase64.b64encode(data))
            assert text != pybase64.b64encode(data)
            assert (await fetcher.fetch(ImageBase64(memoryview(text)))).size_bytes == len(data)


@pytest.mark.parametrize("given", [ImageBytes(LARGE), base64_image(LARGE), None])
@pytest.mark.parametrize("after_bytes", [0, 600_000])
async def test_an_image_that_a_full_disk_can_not_take_stays_in_memory(
    upstream: Upstream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: GivenImage | None, after_bytes: int
) -> None:
    free_bytes = after_bytes

    def write(file: int, data: memoryview) -> int:
        nonlocal free_bytes
        if not free_bytes:
            raise OSError(errno.ENOSPC, "No space left on device")
        done = real(file, data[:free_bytes])
        free_bytes -= done
        return done

    def write_pieces(file: int, pieces: Sequence[bytes]) -> int:
        return write(file, memoryview(b"".join(pieces)))

    real = os.write
    monkeypatch.setattr(os, "write", write)
    monkeypatch.setattr(os, "writev", write_pieces, raising=False)
    upstream.paths["/x"] = answers(body=LARGE)
    own, memory = frozenset({upstream.host}), ByteBudget()
    async with open_session(own) as session:
        fetcher = make_fetcher(session, own, folder=tmp_path, memory=memory)
        image = await fetcher.fetch(given or upstream.link("/x"))
    assert image.data == LARGE
    assert memory.held == len(LARGE)
    assert names(tmp_path) == []
    fetcher._spool.discard(image)
    assert memory.held == 0


@pytest.mark.skipif(not hasattr(os, "writev"), reason="this system has no writev")
async def test_the_pieces_of_a_large_image_are_written_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, real = [], os.writev

    def write_pieces(file: int, pieces: Sequence[bytes]) -> int:
        calls.append(len(pieces))
        return real(file, pieces)

    monkeypatch.setattr(os, "writev", write_pieces)
    sink = spool_in(tmp_path).sink()
    image = sink.finish([LARGE[at : at + 5_000] for at in range(0, len(LARGE), 5_000)])
    assert image.path is not None
    assert image.path.read_bytes() == LARGE
    assert len(calls) == -(-len(LARGE) // (1024 * 1024))
    assert sum(calls) == -(-len(LARGE) // 5_000)


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.EROFS, errno.EACCES, errno.EDQUOT, errno.EIO])
async def test_an_image_stays_in_memory_if_no_file_can_be_created(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def fail(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "open", fail)
    async with open_session(frozenset()) as session:
        image = await make_fetcher(session, folder=tmp_path).fetch(ImageBytes(LARGE))
    assert image.data == LARGE


async def test_a_shortage_of_descriptors_does_not_condemn_the_link(
    fetcher: ImageFetcher, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> socket.socket:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(socket, "socket", fail)
    assert "no connection" in (await failure(fetcher, upstream.link("/ok"))).detail


async def test_a_link_is_deferred_without_space_on_disk_and_in_memory(upstream: Upstream, tmp_path: Path) -> None:
    upstream.paths["/x"] = answers(body=LARGE)
    (tmp_path / "file").write_bytes(b"")
    own, memory = frozenset({upstream.host}), ByteBudget(1_000_000)
    assert memory.try_take(900_000)
    async with open_session(own) as session:
        fetcher = make_fetcher(session, own, folder=tmp_path / "file", memory=memory)
        with pytest.raises(StoreUnavailable):
            await fetcher.fetch(upstream.link("/x"))
    assert memory.held == 900_000


async def test_a_rejected_large_image_leaves_no_file(upstream: Upstream, tmp_path: Path) -> None:
    upstream.paths["/x"] = answers(body=LARGE[:-20])
    own = frozenset({upstream.host})
    async with open_session(own) as session:
        await refusal(make_fetcher(session, own, folder=tmp_path), upstream.link("/x"), age_s=11.0)
    assert names(tmp_path) == []


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


async def test_a_connection_on_which_a_body_did_not_end_is_not_used_again(tmp_path: Path) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(writer)
        while await reader.read(4_096):
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(LARGE) + 9, LARGE))

    connections: list[asyncio.StreamWriter] = []
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    host = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server, open_session(frozenset({host})) as session:
        fetcher = make_fetcher(session, frozenset({host}), timeout_s=0.9, folder=tmp_path)
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


async def test_a_response_that_is_not_http_is_left_for_later() -> None:
    async def serve_one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(4_096)
        writer.write(b"SSH-2.0-OpenSSH_9.6\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(serve_one, "127.0.0.1", 0)
    host = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server, open_session(frozenset({host})) as session:
        with pytest.raises(DownloadFailed):
            await make_fetcher(session, frozenset({host})).fetch(ImageLink(f"http://{host}/x"))
