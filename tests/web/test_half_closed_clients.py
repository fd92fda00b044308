"""Clients that have closed their own side: they are answered, and no probe falls into a response."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing

import pytest
from aiohttp import web

from imagegen.metrics import Meter
from imagegen.web.http import half_closed, middleware
from imagegen.web.http.half_closed import HalfClosedWatch
from imagegen.web.http.server import ImagegenRunner
from tests.support import eventually

LARGE = bytes(8_000_000)


@asynccontextmanager
async def connected(
    handler: Callable[[web.Request], Awaitable[web.StreamResponse]],
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Return the two ends of a connection to a server that answers all requests by a handler."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handler)
    middleware.install_pipeline(app, middleware.RequestPipeline(Meter(), access_log=False))
    runner = ImagegenRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", runner.addresses[0][1])
        with closing(writer):
            yield reader, writer
    finally:
        await runner.cleanup()


async def large(_request: web.Request) -> web.StreamResponse:
    return web.Response(body=LARGE)


async def test_a_slow_client_gets_no_probe_behind_a_response_that_its_handler_has_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks, look = [0], HalfClosedWatch._probe

    def counted(watch: HalfClosedWatch) -> None:
        look(watch)
        looks[0] += 1

    monkeypatch.setattr(half_closed, "PROBES_S", (0.0, 0.01))
    monkeypatch.setattr(HalfClosedWatch, "_probe", counted)
    async with connected(large) as (reader, writer):
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n")
        writer.write_eof()
        await eventually(lambda: looks[0] == 2)
        assert await reader.read() == LARGE


async def path(request: web.Request) -> web.Response:
    await asyncio.sleep(0)
    return web.Response(text=f"{request.method} {request.path} {await request.text()}.")


@pytest.mark.parametrize("count", [2, 3, 200])
@pytest.mark.parametrize("is_sent_at_once", [True, False])
async def test_all_requests_before_the_end_of_a_clients_side_are_answered_in_order(
    monkeypatch: pytest.MonkeyPatch, count: int, is_sent_at_once: bool
) -> None:
    monkeypatch.setattr(half_closed, "PROBES_S", (60.0,))
    async with connected(path) as (reader, writer):
        for number in range(count):
            body = b"x" * (number % 3)
            head = f"POST /{number} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            writer.write(head.encode() + body)
            if not is_sent_at_once:
                await asyncio.sleep(0)
        writer.write_eof()
        answers = await asyncio.wait_for(reader.read(), 20)
    bodies = [part.rpartition(b"\r\n\r\n")[2].decode() for part in answers.split(b".HTTP/1.1 200 OK")]
    assert bodies[-1].endswith(".")
    assert [body.rstrip(".") for body in bodies] == [f"POST /{number} {'x' * (number % 3)}" for number in range(count)]
