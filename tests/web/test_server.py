"""Tests over a raw socket: errors of both aiohttp parsers, framing, slow heads, keep-alive."""

from __future__ import annotations

import asyncio
import json
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pytest
from aiohttp import http_parser, web, web_protocol

from imagegen.metrics import Meter
from imagegen.web.http import half_closed, middleware
from imagegen.web.http import server as http_server
from imagegen.web.http.body import parse_object, read_body
from imagegen.web.http.responses import json_response
from imagegen.web.http.server import ImagegenRunner
from tests.support import LoopTime, eventually, logged, over_rows

CANARY = b"hunter2"
MakeServer = Callable[..., Awaitable["Server"]]


@dataclass(frozen=True)
class Answer:
    start: str
    headers: dict[str, str]
    body: bytes

    @property
    def status(self) -> int:
        return int(self.start.split()[1])

    @property
    def code(self) -> str:
        return str(json.loads(self.body)["code"])


@dataclass(frozen=True)
class Server:
    port: int
    runner: ImagegenRunner

    @property
    def connections(self) -> list[Any]:
        """Return the connections that have sent a byte."""
        assert self.runner.server is not None
        return self.runner.server.connections

    async def send(self, *pieces: bytes, within_s: float = 20.0, half_closes: bool = False) -> list[Answer]:
        """Return every response until the server closes; the client does not close, or only its own side."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
            if half_closes:
                writer.write_eof()
            return parse(await asyncio.wait_for(reader.read(), within_s))
        finally:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()


def parse(raw: bytes) -> list[Answer]:
    answers = []
    while raw:
        head, _, raw = raw.partition(b"\r\n\r\n")
        start, *lines = head.decode().split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines)
        length = int(headers.get("Content-Length", 0))
        answers.append(Answer(start, headers, raw[:length]))
        raw = raw[length:]
    return answers


async def echo(request: web.Request) -> web.StreamResponse:
    return json_response({"body": parse_object(await read_body(request, max_bytes=1000))})


async def impatient(request: web.Request) -> web.StreamResponse:
    return json_response({"bytes": len(await read_body(request, timeout_s=0.2))})


async def size(request: web.Request) -> web.StreamResponse:
    return json_response({"bytes": len(await read_body(request))})


async def hello(request: web.Request) -> web.StreamResponse:
    return json_response({"path": request.path})


async def slow(request: web.Request) -> web.StreamResponse:
    """Answer some turns of the event loop after the client has closed its side."""
    for _ in range(100):
        await asyncio.sleep(0)
    return json_response({"path": request.path})


async def never(_request: web.Request) -> web.StreamResponse:
    await asyncio.get_running_loop().create_future()
    return web.Response()


@pytest.fixture(params=["HttpRequestParserC", "HttpRequestParserPy"])
def parser(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(http_parser, request.param):
        pytest.skip("aiohttp was built without its C parser")
    monkeypatch.setattr(web_protocol, "HttpRequestParser", getattr(http_parser, request.param))


@pytest.fixture
def lines() -> Iterator[list[str]]:
    with logged() as lines:
        yield lines


@pytest.fixture
async def make_server(parser: None) -> AsyncIterator[MakeServer]:
    runners: list[ImagegenRunner] = []

    async def make(**options: Any) -> Server:
        app = web.Application()
        app.router.add_post("/echo", echo)
        app.router.add_post("/impatient", impatient)
        app.router.add_get("/hello", hello)
        app.router.add_get("/slow", slow)
        app.router.add_post("/v1/slow", slow)
        app.router.add_get("/never", never)
        app.router.add_post("/api/x", hello)
        app.router.add_post("/size", size)
        middleware.install_pipeline(app, middleware.RequestPipeline(Meter(), access_log=False))
        runner = ImagegenRunner(app, **{"lingering_time": 0.1, **options})
        runners.append(runner)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return Server(runner.addresses[0][1], runner)

    yield make
    for runner in runners:
        await runner.cleanup()


@pytest.fixture
async def server(make_server: MakeServer) -> Server:
    return await make_server()


def post(body: bytes, *headers: bytes, length: int | None = None, path: bytes = b"/echo") -> bytes:
    every = [b"POST %s HTTP/1.1" % path, b"Host: x", b"Content-Type: application/json", *headers]
    every += [b"Content-Length: %d" % (len(body) if length is None else length)] if length != -1 else []
    return b"\r\n".join(every) + b"\r\n\r\n" + body


REFUSED = {
    "a bad method": b"G@T /%s HTTP/1.1\r\nHost: x\r\n\r\n" % CANARY,
    "a bad version": b"GET /hello HTTP/9x\r\nHost: x\r\n\r\n",
    "no HTTP at all": b"%s\r\n\r\n" % CANARY,
    "TLS on a plain port": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 200 + b"\r\n\r\n",
    "no Host": b"GET /hello HTTP/1.1\r\n\r\n",
    "two Hosts": b"GET /hello HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n",
    "a Host that is none": b"GET /hello HTTP/1.1\r\nHost: %s@x y\r\n\r\n" % CANARY,
    "an empty Host": b"GET /hello HTTP/1.1\r\nHost:\r\n\r\n",
    "a header without a colon": b"GET /hello HTTP/1.1\r\nHost: x\r\n%s\r\n\r\n" % CANARY,
    "a space before the colon": b"GET /hello HTTP/1.1\r\nHost: x\r\nAuthorization : %s\r\n\r\n" % CANARY,
    "a control character": b"GET /hello HTTP/1.1\r\nHost: x\r\nA: %s\x00\r\n\r\n" % CANARY,
    "a folded header": b"GET /hello HTTP/1.1\r\nHost: x\r\nA: b\r\n %s\r\n\r\n" % CANARY,
    "length and chunks": post(b"{}", b"Transfer-Encoding: chunked"),
    "two lengths": post(b"{}", b"Content-Length: 3"),
    "a signed length": post(b"{}", b"Content-Length: +2", length=-1),
    "a bad chunk size": post(CANARY + b"\r\n{}\r\n0\r\n\r\n", b"Transfer-Encoding: chunked", length=-1),
    "an unknown transfer coding": post(b"", b"Transfer-Encoding: %s" % CANARY, length=-1),
}


@pytest.mark.parametrize("half_closes", [False, True])
@pytest.mark.parametrize("request_bytes", REFUSED.values(), ids=REFUSED.keys())
async def test_invalid_http_is_400_in_json_and_closes_the_connection(
    server: Server, lines: list[str], request_bytes: bytes, half_closes: bool
) -> None:
    (answer,) = await server.send(request_bytes, half_closes=half_closes)
    check_refusal(answer, 400, "bad_request")
    assert not any("hunter2" in line or "Traceback" in line for line in lines)


TOO_LARGE = {
    "a long path": b"GET /%s HTTP/1.1\r\nHost: x\r\n\r\n" % (CANARY * 2000),
    "a long header": b"GET /hello HTTP/1.1\r\nHost: x\r\nAuthorization: %s\r\n\r\n" % (CANARY * 2000),
    "a long header name": b"GET /hello HTTP/1.1\r\nHost: x\r\n%s: x\r\n\r\n" % (CANARY * 2000),
    "many headers": b"GET /hello HTTP/1.1\r\nHost: x\r\n" + b"A: %s\r\n" % CANARY * 200 + b"\r\n",
    "many large headers": b"GET /hello HTTP/1.1\r\nHost: x\r\n" + b"A: %s\r\n" % (CANARY * 1000) * 10 + b"\r\n",
    "a head without an end": b"GET /hello HTTP/1.1\r\nHost: x\r\n" + b"A: %s\r\n" % (CANARY * 1000) * 30,
}


@pytest.mark.parametrize("request_bytes", TOO_LARGE.values(), ids=TOO_LARGE.keys())
async def test_a_head_that_is_too_large_is_431_in_json_and_closed(
    server: Server, lines: list[str], request_bytes: bytes
) -> None:
    (answer,) = await server.send(request_bytes)
    check_refusal(answer, 431, "headers_too_large")
    assert ["hunter2" in line for line in lines] == [False]


async def test_a_head_just_under_64_kib_is_accepted_also_when_pipelined(server: Server) -> None:
    fill = b"A: %s\r\n" % (b"x" * 7000) * 9
    head = b"GET /hello HTTP/1.1\r\nHost: x\r\n" + fill
    answers = await server.send(head + b"\r\n" + head, b"Connection: close\r\n\r\n")
    assert [answer.status for answer in answers] == [200, 200]


async def test_a_long_body_does_not_count_as_head(server: Server) -> None:
    body = b"x" * 300_000
    head = b"POST /size HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    request = head + b"Content-Length: %d\r\n" % len(body)
    answers = await server.send(request + b"\r\n" + body, request + b"Connection: close\r\n\r\n", body)
    assert [answer.body for answer in answers] == [b'{"bytes":300000}'] * 2


async def test_unfinished_and_refused_heads_hold_no_more_than_their_limit(server: Server) -> None:
    flood = b"GET /hello HTTP/1.1\r\nHost: x\r\n" + b"A: %s\r\n" % (b"x" * 8000) * 100
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        writers = [(await asyncio.open_connection("127.0.0.1", server.port))[1] for _ in range(20)]
        for writer in writers:
            writer.write(flood[:60_000])
            await writer.drain()
        answers = await asyncio.gather(*(server.send(flood) for _ in range(20)))
        held = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert [[answer.status for answer in got] for got in answers] == [[431]] * 20
    assert held < 40 * 150_000
    for writer in writers:
        writer.close()


@over_rows("path", [b"/hello", b"/nowhere"])
async def test_another_expectation_than_100_continue_is_417(server: Server, path: bytes) -> None:
    (answer,) = await server.send(b"GET %s HTTP/1.1\r\nHost: x\r\nExpect: %s\r\n\r\n" % (path, CANARY))
    check_refusal(answer, 417, "expectation_failed")


def check_refusal(answer: Answer, status: int, code: str) -> None:
    body = json.loads(answer.body)
    assert answer.start.startswith("HTTP/1.1 ")
    assert (answer.status, body["statusCode"], body["code"], body["success"]) == (status, status, code, False)
    assert answer.headers["Connection"] == "close"
    assert answer.headers["Content-Type"] == "application/json; charset=utf-8"
    assert answer.headers["X-Request-Id"] == body["requestId"]
    assert "Server" not in answer.headers
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert CANARY not in answer.body + repr(answer.headers).encode()


async def test_a_rejection_is_one_log_line_with_its_request_id(server: Server, lines: list[str]) -> None:
    (answer,) = await server.send(REFUSED["a bad method"])
    (line,) = lines
    assert line.startswith("INFO")
    assert answer.headers["X-Request-Id"] in line


async def test_100_continue_is_sent_before_the_body(server: Server) -> None:
    head, body = post(b"", b"Expect: 100-continue", b"Connection: close", length=2), b"{}"
    first, last = await server.send(head, body)
    assert (first.status, last.status) == (100, 200)


async def test_pipelined_requests_are_answered_in_order(server: Server) -> None:
    last = post(b'{"a":3}', b"Connection: close")
    answers = await server.send(post(b'{"a":1}') + post(b'{"a":2}') + last)
    assert [json.loads(answer.body)["body"] for answer in answers] == [{"a": 1}, {"a": 2}, {"a": 3}]


async def test_a_chunked_body_is_read(server: Server) -> None:
    chunks = b'4\r\n{"a"\r\n3\r\n:1}\r\n0\r\n\r\n'
    (answer,) = await server.send(post(chunks, b"Transfer-Encoding: chunked", b"Connection: close", length=-1))
    assert json.loads(answer.body) == {"body": {"a": 1}}


async def test_a_body_over_the_read_buffer_and_the_next_request_are_whole(server: Server) -> None:
    count = 1_000_000
    head = b"POST /size HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % count
    last = post(b'{"a":1}', b"Connection: close")
    answers = await server.send((head + b"x" * count) * 3 + last)
    assert [json.loads(answer.body) for answer in answers] == [{"bytes": count}] * 3 + [{"body": {"a": 1}}]


async def test_pipelined_requests_over_the_queue_are_answered_in_order(server: Server) -> None:
    count = 200
    sent = b"".join(post(b'{"a":%d}' % number) for number in range(count)) + post(b"{}", b"Connection: close")
    answers = await server.send(sent)
    assert [json.loads(answer.body)["body"] for answer in answers] == [*({"a": n} for n in range(count)), {}]


async def test_a_body_over_its_declared_limit_is_413_before_it_is_sent(server: Server) -> None:
    (answer,) = await server.send(post(b"", length=10**9))
    check_refusal(answer, 413, "body_too_large")


async def test_chunks_over_the_limit_are_413(server: Server) -> None:
    chunk = b"c8\r\n" + b"x" * 200 + b"\r\n"
    (answer,) = await server.send(post(chunk * 6, b"Transfer-Encoding: chunked", length=-1))
    check_refusal(answer, 413, "body_too_large")


async def test_a_stalled_body_is_408_and_closed(server: Server) -> None:
    (answer,) = await server.send(post(b'{"a"', length=10, path=b"/impatient"))
    check_refusal(answer, 408, "body_timeout")


async def test_a_compressed_body_is_rejected_without_inflating(server: Server) -> None:
    (answer,) = await server.send(post(b"\x1f\x8b" + b"x" * 50, b"Content-Encoding: gzip", b"Connection: close"))
    assert (answer.status, answer.code) == (415, "unsupported_media_type")


async def test_a_half_sent_head_is_cut_off(make_server: MakeServer, lines: list[str]) -> None:
    server = await make_server(head_timeout_s=0.1)
    assert await server.send(b"GET /hello HTTP/1.1\r\nHos") == []
    assert lines == ["INFO A request head took too long: connection closed\n"]


async def test_a_trickled_head_is_cut_off_after_the_same_time(make_server: MakeServer) -> None:
    server = await make_server(head_timeout_s=0.2)
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    gone = asyncio.ensure_future(reader.read())
    for byte in b"GET /hello HTTP/1.1\r\nHost: x\r\nA: " + b"b" * 1000:
        if gone.done():
            break
        writer.write(bytes([byte]))
        await asyncio.sleep(0.01)
    assert gone.done(), "each byte put off the end"
    with suppress(ConnectionResetError):  # caused by a byte in flight
        assert await gone == b""
    writer.close()


async def test_a_head_in_two_pieces_is_answered(
    make_server: MakeServer,
) -> None:
    server, time = await make_server(head_timeout_s=60.0), LoopTime()
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(b"GET /hello HTTP/1.1\r\nHo")
    await eventually(lambda: server.connections and server.connections[0].head_begun)
    writer.write(b"st: x\r\n\r\n\r\n")
    assert (await asyncio.wait_for(reader.readuntil(b"}"), 20)).startswith(b"HTTP/1.1 200")
    await time.move(61.0)
    writer.write(b"GET /hello HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert (await asyncio.wait_for(reader.read(), 20)).startswith(b"HTTP/1.1 200")
    writer.close()


@over_rows("target", [b"CONNECT x:443", b"OPTIONS *", b"TRACE /hello", b"PRI *", b"GET http://x/hello"])
async def test_unusual_legal_requests_are_answered(server: Server, target: bytes) -> None:
    (answer,) = await server.send(target + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert answer.status in {200, 400, 404, 405}
    assert json.loads(answer.body)


async def test_an_unsupported_upgrade_is_an_ordinary_request(server: Server) -> None:
    head = b"GET /hello HTTP/1.1\r\nHost: x\r\nConnection: upgrade, close\r\nUpgrade: websocket\r\n\r\n"
    (answer,) = await server.send(head)
    assert answer.status == 200


async def test_http_1_0_without_a_host_is_served(server: Server) -> None:
    (answer,) = await server.send(b"GET /hello HTTP/1.0\r\n\r\n")
    assert answer.status == 200


async def test_a_client_that_leaves_mid_body_is_not_an_error(server: Server, lines: list[str]) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(post(b'{"a"', length=10))
    await writer.drain()
    writer.transport.abort()
    (answer,) = await server.send(post(b"{}", b"Connection: close"))
    assert answer.status == 200
    assert lines == []


async def test_idle_connections_outlive_a_proxys_two_minutes(server: Server) -> None:
    app = web.Application()
    middleware.install_pipeline(app, middleware.RequestPipeline(Meter(), access_log=False))
    runner = ImagegenRunner(app)
    await runner.setup()
    assert runner.server is not None
    assert runner.server().keepalive_timeout >= 120
    await runner.cleanup()


@over_rows(
    "request_",
    [
        b"GET /hello HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /slow HTTP/1.1\r\nHost: a\r\n\r\n",
        b"POST /api/x HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n{}",
        b"POST /v1/slow HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n{}",
        b"POST /v1/slow HTTP/1.0\r\nContent-Length: 2\r\n\r\n{}",
    ],
)
async def test_a_client_that_closes_its_own_side_after_its_request_gets_the_response(
    make_server: MakeServer, monkeypatch: pytest.MonkeyPatch, request_: bytes
) -> None:
    monkeypatch.setattr(http_server, "HALF_CLOSED_S", 60.0)
    answers = await (await make_server()).send(request_, half_closes=True)
    assert [answer.status for answer in answers if answer.status != 100] == [200]  # 100: a slow machine's probe


CUT_BODY = b"POST /size HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 5\r\n\r\n{}"


@over_rows("request_", [b"GET /hell", CUT_BODY, b""])
async def test_a_client_that_closes_its_own_side_within_its_request_is_left_at_once(
    make_server: MakeServer, request_: bytes
) -> None:
    assert await (await make_server()).send(request_, half_closes=True) == []


async def test_a_response_to_a_closed_side_of_http_1_0_is_not_waited_for_long(
    make_server: MakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_server, "HALF_CLOSED_S", 0.01)
    assert await (await make_server()).send(b"GET /never HTTP/1.0\r\n\r\n", half_closes=True) == []


async def test_a_client_that_left_is_noticed_though_it_may_have_closed_its_own_side_only(server: Server) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(b"GET /never HTTP/1.1\r\nHost: a\r\n\r\n")
    await eventually(lambda: server.connections)
    writer.close()
    await eventually(lambda: server.connections[0].transport is None)


async def test_a_client_with_a_closed_side_gets_informational_responses_while_it_waits(
    make_server: MakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(half_closed, "PROBES_S", (0.0, 0.01))
    server = await make_server()
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(b"GET /never HTTP/1.1\r\nHost: a\r\n\r\n")
    writer.write_eof()
    assert await asyncio.wait_for(reader.readexactly(2 * len(half_closed.PROBE)), 20) == 2 * half_closed.PROBE
    assert not writer.is_closing()
    writer.close()
