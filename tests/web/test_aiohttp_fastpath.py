"""Tests of the aiohttp fast path: it sends the same bytes as aiohttp and runs the same handler."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import ServerDisconnectedError, web
from aiohttp.test_utils import TestClient
from aiohttp.typedefs import Handler

from imagegen.web.http import middleware, server
from imagegen.web.http.middleware import RouteCache
from imagegen.web.http.responses import json_bytes, json_response
from imagegen.web.http.server import ImagegenRunner
from tests.edge_server import edge_server
from tests.support import over_rows

Client = TestClient[web.Request, web.Application]

BODY = b'{"a":"\xe4\xb8\x80"}'
JSON = {"Content-Type": "application/json; charset=utf-8"}
HEADERS = {
    "nothing": {},
    "caching": {"Cache-Control": "no-cache", "ETag": '"1"'},
    "a policy of its own": {"Content-Security-Policy": "default-src 'self'", "X-Cache": "HIT"},
    "its own date": {"Date": "Thu, 01 Jan 1970 00:00:00 GMT"},
    "its own server and id, which are not kept": {"Server": "x", "X-Request-Id": "y"},
    "no ASCII": {"X-Text": "é一"},
    "a close": {"Connection": "close"},
    "a length": {"Content-Length": "14"},
}


async def limited(_request: web.Request, response: web.StreamResponse) -> None:
    response.headers["RateLimit"] = "r"


def app_of(headers: dict[str, str], *, more: bool = False, status: int = 200) -> web.Application:
    async def quick(_: web.Request) -> web.StreamResponse:
        return json_bytes(BODY, status=status, headers=headers)

    async def long(_: web.Request) -> web.Response:
        return web.Response(body=BODY, status=status, headers=JSON | headers)

    app = web.Application()
    app.router.add_get("/quick", quick)
    app.router.add_get("/long", long)
    if more:
        app.on_response_prepare.append(limited)
    return app


async def fetch_raw(port: int, request: str) -> tuple[str, list[str], bytes]:
    """Return start line, sorted headers and body, without the time of day."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request.encode())
    head = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 20)).decode()
    body = b"" if request.startswith("HEAD") or " 204 " in head else await reader.readexactly(len(BODY))
    writer.close()
    start, *lines = re.sub(r"(Date: \w+, )(?!01 Jan 1970)[^\r]*", r"\1", head).split("\r\n")
    return start, sorted(lines), body


async def compare(app: web.Application, request: str = "GET {} HTTP/1.1\r\nHost: x\r\nX-Request-Id: r\r\n\r\n") -> str:
    async with edge_server(app) as server:
        assert server.port is not None
        quick, long = [await fetch_raw(server.port, request.format(path)) for path in ("/quick", "/long")]
    assert quick == long
    return "\r\n".join(quick[1])


@pytest.mark.parametrize("headers", HEADERS.values(), ids=HEADERS.keys())
async def test_a_fast_response_equals_the_response_of_aiohttp(headers: dict[str, str]) -> None:
    await compare(app_of(headers))


@over_rows(
    "request_text",
    [
        "HEAD {} HTTP/1.1\r\nHost: x\r\nX-Request-Id: r\r\n\r\n",
        "GET {} HTTP/1.0\r\nHost: x\r\nX-Request-Id: r\r\n\r\n",
        "GET {} HTTP/1.0\r\nConnection: keep-alive\r\nX-Request-Id: r\r\n\r\n",
        "GET {} HTTP/1.1\r\nHost: x\r\nX-Request-Id: r\r\nConnection: close\r\n\r\n",
        "GET {}?a=b HTTP/1.1\r\nHost: x\r\nX-Request-Id: r\r\n\r\n",
        "GET {} HTTP/1.1\r\nHost: x\r\nX-Request-Id: r\r\nAccept-Encoding: gzip\r\n\r\n",
    ],
)
async def test_a_fast_response_equals_aiohttp_for_every_request(request_text: str) -> None:
    await compare(app_of({"ETag": '"1"'}), request_text)


@over_rows("status", [202, 204, 404, 503])
async def test_a_fast_response_equals_aiohttp_for_every_status(status: int) -> None:
    await compare(app_of({}, status=status))


async def test_a_fast_response_has_the_rate_limit_headers() -> None:
    assert "RateLimit: r" in await compare(app_of({}, more=True))


@over_rows("value", ["a\r\nSet-Cookie: b", "a\rb", "a\nb", "a\0b", "a\x01b", "a\x7fb"])
async def test_a_value_that_would_inject_a_header_is_not_sent(value: str) -> None:
    async with TestClient(edge_server(app_of({"X-Text": value}))) as client:
        with pytest.raises(ServerDisconnectedError):
            await client.get("/quick")


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    async def name(request: web.Request) -> web.StreamResponse:
        return json_response({"name": request.match_info["name"], "query": request.query_string})

    app = web.Application()
    app.router.add_get("/of/{name}", name)
    app.router.add_post("/of/{name}", name)
    async with TestClient(edge_server(app)) as client:
        yield client


async def test_a_cached_path_runs_its_own_handler(client: Client) -> None:
    for path, name, query in (("a", "a", ""), ("a", "a", ""), ("b", "b", ""), ("a?c=d", "a", "c=d"), ("%61", "a", "")):
        for _ in range(2):
            found = await (await client.get(f"/of/{path}")).json()
            assert (found["name"], found["query"]) == (name, query)
    assert (await client.head("/of/a")).status == 200


async def test_a_wrong_method_or_path_is_rejected_every_time(client: Client) -> None:
    await client.get("/of/a")
    for _ in range(3):
        assert (await client.delete("/of/a")).status == 405
        assert (await client.get("/off/a")).status == 404


async def test_an_expect_header_is_honoured_on_a_cached_path(client: Client) -> None:
    for _ in range(2):
        assert (await client.post("/of/a", data=b"x", expect100=True)).status == 200
        assert (await client.post("/of/a", data=b"x", headers={"Expect": "more"})).status == 417


async def test_cached_paths_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "MAX_PATHS", 2)
    app = app_of({})
    routers: list[RouteCache] = []

    class KeptCache(RouteCache):
        def __init__(self, *parts: Any) -> None:
            super().__init__(*parts)
            routers.append(self)

    monkeypatch.setattr(server, "RouteCache", KeptCache)
    app.router.add_get("/{any}/x", hello)
    async with TestClient(edge_server(app)) as client:
        for name in ("a", "b", "c", "d" * 300):
            assert (await client.get(f"/{name}/x")).status == 200
    assert [path for _, path in routers[0]._routes] == ["/b/x", "/c/x"]


async def hello(_: web.Request) -> web.StreamResponse:
    return json_response({})


async def test_middlewares_of_an_application_run_each_time() -> None:
    ran = []

    @web.middleware
    async def count(request: web.Request, handler: Handler) -> web.StreamResponse:
        ran.append(request.path)
        return await handler(request)

    app = web.Application(middlewares=[count])
    app.router.add_get("/a", hello)
    async with TestClient(edge_server(app)) as client:
        for _ in range(2):
            await client.get("/a")
    assert ran == ["/a", "/a"]


async def test_a_stop_waits_for_the_request_that_runs() -> None:
    entered, stopping = asyncio.Event(), asyncio.Event()

    async def slow(_: web.Request) -> web.StreamResponse:
        entered.set()
        await stopping.wait()
        return json_response({})

    async def set_stopping(_: web.Application) -> None:
        stopping.set()

    app = app_of({})
    app.router.add_get("/slow", slow)
    app.on_shutdown.append(set_stopping)
    server = edge_server(app)
    async with TestClient(server) as client:
        answer = asyncio.create_task(client.get("/slow"))
        await entered.wait()
        assert isinstance(server.runner, ImagegenRunner)
        await server.runner.cleanup()
        assert (await answer).status == 200
