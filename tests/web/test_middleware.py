"""Tests of the middleware: request id, error responses, common headers, access log."""

from __future__ import annotations

import io
import re
from collections.abc import AsyncIterator, Iterator

import pytest
from aiohttp import ClientSession, web
from aiohttp.test_utils import TestClient

from imagegen import log
from imagegen.errors import Draining, FieldError, InvalidRequest, QueueUnavailable, Unauthorized
from imagegen.web.http.responses import json_response, language, preferred_language, request_id_of
from tests.edge_server import edge_server
from tests.support import logged, over_rows

Client = TestClient[web.Request, web.Application]


async def hello(request: web.Request) -> web.StreamResponse:
    return json_response({"id": request_id_of(request), "language": language(request)})


async def invalid(request: web.Request) -> web.Response:
    raise InvalidRequest(details=[FieldError("width", "is over 2048")])


async def unavailable(request: web.Request) -> web.Response:
    raise QueueUnavailable


async def draining(request: web.Request) -> web.Response:
    raise Draining(headers={"Retry-After": "9"})


async def unauthorized(request: web.Request) -> web.Response:
    raise Unauthorized


async def broken(request: web.Request) -> web.Response:
    raise ValueError("hunter2")


async def moved(request: web.Request) -> web.Response:
    raise web.HTTPFound("/hello")


async def conflict(request: web.Request) -> web.Response:
    raise web.HTTPConflict(text=f"quoted: {request.query_string}")


async def own_headers(request: web.Request) -> web.Response:
    return web.Response(headers={"Cache-Control": "max-age=60", "Content-Security-Policy": "default-src 'self'"})


async def stream(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    await response.write(b"first")
    if "break" in request.query:
        raise ValueError("in the middle")
    return response


@pytest.fixture
def lines() -> Iterator[list[str]]:
    with logged("INFO", "{level} {message} {extra}") as lines:
        yield lines


@pytest.fixture
def access_log() -> Iterator[io.StringIO]:
    stream = io.StringIO()
    log.configure("INFO", "text", sink=stream)
    yield stream
    log.configure("INFO", "text")


@pytest.fixture
async def client(lines: list[str]) -> AsyncIterator[Client]:
    app = web.Application()
    for handler in (hello, invalid, unavailable, draining, unauthorized, broken, moved, conflict, own_headers, stream):
        app.router.add_get(f"/{handler.__name__}", handler)
    async with TestClient(edge_server(app, access_log=True)) as client:
        yield client


@over_rows("given", ["a", "A-b_c.9", "x" * 64])
async def test_a_harmless_request_id_is_on_every_response(client: Client, given: str) -> None:
    for path in ("/hello", "/invalid", "/broken", "/nowhere", "/moved", "/stream"):
        answer = await client.get(path, headers={"X-Request-Id": given}, allow_redirects=False)
        assert answer.headers["X-Request-Id"] == given


@over_rows("given", ["", "x" * 65, "a b", "<script>", "a/b", "é"])
async def test_another_request_id_is_replaced_by_a_fresh_one(client: Client, given: str) -> None:
    first, second = [await client.get("/hello", headers={"X-Request-Id": given}) for _ in range(2)]
    assert re.fullmatch("[0-9a-f]{16}", first.headers["X-Request-Id"])
    assert first.headers["X-Request-Id"] != second.headers["X-Request-Id"]
    assert (await first.json())["id"] == first.headers["X-Request-Id"]


async def test_every_answer_has_the_security_headers_and_names_no_server(client: Client) -> None:
    for path in ("/hello", "/invalid", "/broken", "/nowhere", "/stream"):
        headers = (await client.get(path)).headers
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Cache-Control"] == "no-store"
        assert headers["Content-Security-Policy"] == "default-src 'none'; frame-ancestors 'none'"
        assert headers["Referrer-Policy"] == "no-referrer"
        assert "Server" not in headers


async def test_headers_set_by_a_handler_are_not_replaced(client: Client) -> None:
    headers = (await client.get("/own_headers")).headers
    assert headers["Cache-Control"] == "max-age=60"
    assert headers["Content-Security-Policy"] == "default-src 'self'"


async def test_an_error_of_ours_is_the_body_of_the_contract(client: Client) -> None:
    answer = await client.get("/invalid")
    assert answer.status == 400
    assert answer.headers["Content-Type"] == "application/json; charset=utf-8"
    assert await answer.json() == {
        "success": False,
        "statusCode": 400,
        "code": "invalid_request",
        "message": "请求参数无效",
        "retryable": False,
        "requestId": answer.headers["X-Request-Id"],
        "details": [{"field": "width", "message": "is over 2048"}],
    }


async def test_an_unknown_route_is_404_in_json(client: Client) -> None:
    answer = await client.get("/nowhere")
    assert (answer.status, (await answer.json())["code"]) == (404, "route_not_found")


async def test_a_wrong_method_is_405_with_those_allowed(client: Client) -> None:
    answer = await client.delete("/hello")
    assert (answer.status, (await answer.json())["code"]) == (405, "method_not_allowed")
    assert answer.headers["Allow"] == "GET, HEAD"
    assert (await answer.json())["message"].endswith("GET, HEAD")


async def test_503_and_401_carry_what_a_client_needs(client: Client) -> None:
    assert (await client.get("/unavailable")).headers["Retry-After"] == "5"
    assert (await client.get("/draining")).headers["Retry-After"] == "9"
    assert (await client.get("/unauthorized")).headers["WWW-Authenticate"] == "Bearer"


async def test_an_error_that_closes_ends_the_connection_and_others_do_not(client: Client) -> None:
    assert (await client.get("/draining")).headers["Connection"] == "close"
    assert "Connection" not in (await client.get("/unavailable")).headers


async def test_a_redirect_stays_a_redirect(client: Client) -> None:
    answer = await client.get("/moved", allow_redirects=False)
    assert (answer.status, answer.headers["Location"]) == (302, "/hello")


async def test_aiohttps_own_texts_are_not_passed_on(client: Client) -> None:
    answer = await client.get("/conflict?hunter2")
    assert (await answer.json())["code"] == "bad_request"
    assert "hunter2" not in await answer.text()


async def test_an_unforeseen_error_is_500_logged_once_with_its_request_id(client: Client, lines: list[str]) -> None:
    answer = await client.get("/broken", headers={"X-Request-Id": "find-me"})
    assert (answer.status, (await answer.json())["code"]) == (500, "internal_error")
    assert "hunter2" not in await answer.text()
    errors = [line for line in lines if line.startswith("ERROR")]
    assert len(errors) == 1
    assert "find-me" in errors[0]
    assert "ValueError: hunter2" in errors[0]


async def test_an_error_in_a_stream_cuts_it_without_a_second_head(client: Client) -> None:
    answer = await client.get("/stream?break=1")
    assert answer.status == 200
    assert b"HTTP/1.1" not in await answer.content.readany()


@over_rows("host", ["a b", "a/b", "x" * 300, "a@b", "[::1"])
async def test_a_bad_host_is_a_bad_request_and_closed(client: Client, host: str) -> None:
    answer = await client.get("/hello", headers={"Host": host})
    assert (answer.status, (await answer.json())["code"]) == (400, "bad_request")
    assert answer.headers["Connection"] == "close"


async def test_the_access_line_has_path_status_and_id_and_no_query(access_log: io.StringIO, client: Client) -> None:
    await client.get("/hello?prompt=secret", headers={"X-Request-Id": "one-line"})
    (line,) = [line for line in access_log.getvalue().splitlines() if "one-line" in line]
    assert re.search(r"INFO +GET /hello 200 \d+\.\d ms", line)
    assert "secret" not in line


async def test_a_path_with_odd_bytes_cannot_break_the_line(access_log: io.StringIO, client: Client) -> None:
    await client.get("/" + "%0a%1b[31m" + "x" * 500)
    line = access_log.getvalue()
    assert len(line) < 600
    assert line.count("\n") == 1
    assert "\x1b" not in line


async def test_without_access_log_nothing_is_logged(access_log: io.StringIO) -> None:
    app = web.Application()
    app.router.add_get("/hello", hello)
    async with edge_server(app) as server, ClientSession() as session, session.get(server.make_url("/hello")) as answer:
        assert answer.status == 200
    assert access_log.getvalue() == ""


@over_rows(
    ("header", "language"),
    [
        (None, "zh"),
        ("", "zh"),
        ("*", "zh"),
        ("en", "en"),
        ("EN-us", "en"),
        ("en-US,en;q=0.9", "en"),
        ("zh-CN,zh;q=0.9,en;q=0.8", "zh"),
        ("en;q=0.8, zh;q=0.9", "zh"),
        ("en;q=0.9, zh;q=0.8", "en"),
        ("zh;q=0,en;q=0.1", "en"),
        ("fr", "zh"),
        ("fr, en;q=0.5", "en"),
        ("en;q=0", "zh"),
        ("en;q=x", "zh"),
        ("en;q=2", "zh"),
        ("en;q=nan", "zh"),
        ("*, en;q=0.5", "zh"),
        ("english", "zh"),
        ("," * 5000 + "en", "zh"),
    ],
)
def test_english_is_used_only_if_preferred(header: str | None, language: str) -> None:
    assert preferred_language(header) == language


async def test_the_message_follows_the_language_and_the_code_does_not(client: Client) -> None:
    answer = await (await client.get("/invalid", headers={"Accept-Language": "en-GB,en;q=0.8"})).json()
    assert (answer["message"], answer["code"]) == ("The request is not valid", "invalid_request")
