"""Tests of links that fail: what is tried again, what may work later, what is dead, and the deadline."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import socket
import struct
import zlib
from contextlib import suppress

import pytest
from aiohttp import web

from imagegen.errors import DownloadFailed, ImageRejected
from imagegen.images.fetch import MAX_TRIES, ImageFetcher
from imagegen.tasks.image import ImageLink
from tests.images.link_server import (
    LARGE,
    PNG,
    Handler,
    Upstream,
    answers,
    failure,
    make_fetcher,
    open_session,
    redirects,
    refusal,
)
from tests.support import LoopTime, eventually

pytestmark = pytest.mark.usefixtures("no_backoff")


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


async def test_an_image_that_is_broken_off_again_and_again_leaves_no_bytes_behind(
    fetcher: ImageFetcher, upstream: Upstream
) -> None:
    length = 900_000

    async def breaks_off_late(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": str(length)})
        await response.prepare(request)
        await response.write(LARGE[: length - 1000])
        return await resets(request)

    async def fail() -> None:
        with suppress(DownloadFailed):
            await fetcher.fetch(upstream.link("/x"))
            pytest.fail("it was broken off")

    def kept_bytes() -> int:
        return sum(kept.nbytes for kept in gc.get_objects() if isinstance(kept, memoryview))

    upstream.paths["/x"] = breaks_off_late
    gc.collect()
    before = kept_bytes()
    gc.disable()
    try:
        for _ in range(3):
            await fail()
        assert len(upstream.requests) == 3 * MAX_TRIES
        await eventually(lambda: kept_bytes() < before + length)
    finally:
        gc.enable()


async def test_no_connection_may_be_one_later(upstream: Upstream) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{closed.getsockname()[1]}"
        async with open_session(frozenset({host})) as session:
            fetcher = make_fetcher(session, frozenset({host}), timeout_s=30)
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


@pytest.mark.parametrize("trickle", [False, True])
async def test_a_stalled_or_trickling_link_ends_at_the_deadline(upstream: Upstream, trickle: bool) -> None:
    released = asyncio.Event()

    async def slow(request: web.Request) -> web.StreamResponse:
        response, time = web.StreamResponse(), LoopTime()
        await response.prepare(request)
        for byte in PNG[:6] if trickle else b"":
            await response.write(bytes([byte]))
            await time.move(5)
        await time.move(30)
        await released.wait()
        return response

    upstream.paths["/x"] = slow
    own = frozenset({upstream.host})
    async with open_session(own) as session:
        fetcher = make_fetcher(session, own, timeout_s=30)
        error = await failure(fetcher, upstream.link("/x"))
        assert "30 s" in error.detail or "no answer in time" in error.detail
    assert len(upstream.requests) == 1
    released.set()


async def test_a_stalled_try_leaves_time_for_the_next(upstream: Upstream) -> None:
    released = asyncio.Event()

    async def stalls(_: web.Request) -> web.StreamResponse:
        await LoopTime().move(30 / MAX_TRIES)
        await released.wait()
        return web.Response()

    upstream.paths["/x"] = in_turn(stalls, upstream.paths["/ok"])
    own = frozenset({upstream.host})
    async with open_session(own) as session:
        fetcher = make_fetcher(session, own, timeout_s=30)
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


async def test_a_shortage_of_descriptors_does_not_condemn_the_link(
    fetcher: ImageFetcher, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> socket.socket:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(socket, "socket", fail)
    assert "no connection" in (await failure(fetcher, upstream.link("/ok"))).detail


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
