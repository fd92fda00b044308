"""Tests of one paid POST on the wire, and of the undocumented aiohttp behaviour that it uses."""

import asyncio
import gzip
import time
import zlib
from collections.abc import Awaitable
from typing import Any

import aiohttp
import pytest
from aiohttp.client_exceptions import ClientPayloadError, ServerDisconnectedError
from aiohttp.connector import Connection
from aiohttp.http import HttpProcessingError
from yarl import URL

from imagegen.byte_budget import ByteBudget
from imagegen.errors import UpstreamError
from imagegen.providers import response_body
from imagegen.providers.http_client import ProviderClient
from imagegen.providers.input_bodies import StreamedBody
from imagegen.providers.post import NotSent, PaidPost, RawResponse, UpstreamConnector
from imagegen.proxies import Proxies, ProxyConnector
from tests.emulated_jobs import Recorder
from tests.providers.conftest import Names, RawServer, ReadRequest
from tests.support import eventually

ZIPPED = gzip.compress(b"pictur")
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX-Seen: yes\r\n\r\nok"


def post(session: aiohttp.ClientSession, url: str, timeout_s: float = 5.0, **headers: Any) -> PaidPost:
    return PaidPost(session, URL(f"{url}/paid?a=%20b#c"), {"User-Agent": "me"} | headers, timeout_s)


async def send(
    session: aiohttp.ClientSession, url: str, watcher: Recorder, body: bytes | StreamedBody = b"{}", **more: Any
) -> RawResponse:
    return await post(session, url, **more).send(body, watcher.sent)


def connections(raw_server: RawServer, read_request: ReadRequest, *answers: bytes) -> tuple[Awaitable[str], list[int]]:
    """Start a server that sends the responses in order; return its address and the request count per connection."""
    counts: list[int] = []
    left = iter(answers)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        counts.append(0)
        mine = len(counts) - 1
        while True:
            await read_request(reader)
            counts[mine] += 1
            writer.write(next(left))

    return raw_server(serve), counts


async def test_the_request_is_valid_http(
    session: aiohttp.ClientSession, raw_server: RawServer, read_request: ReadRequest, watcher: Recorder
) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await read_request(reader))
        writer.write(OK)

    seen: list[bytes] = []
    url = await raw_server(serve)
    answer = await send(session, url, watcher, b'{"n":1}', Accept="application/json")
    assert (answer.status, answer.headers["x-seen"], answer.body) == (200, "yes", b"ok")
    head, body = seen[0].split(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = dict(line.split(": ") for line in lines)
    assert first == "POST /paid?a=%20b HTTP/1.1"
    assert headers.pop("Accept-Encoding").startswith("gzip, deflate")
    host = url.removeprefix("http://")
    assert headers == {"Host": host, "Accept": "application/json", "User-Agent": "me", "Content-Length": "7"}
    assert body == b'{"n":1}'


async def test_a_poll_keeps_its_connection_for_longer_than_a_paid_call(
    names: Names, raw_server: RawServer, read_request: ReadRequest, watcher: Recorder
) -> None:
    serving, counts = connections(raw_server, read_request, *[OK] * 6)
    url = await serving
    async with (
        ProxyConnector(Proxies(), keepalive_timeout=0, resolver=names) as paid,
        aiohttp.ClientSession(
            connector=UpstreamConnector(paid, Proxies(), keepalive_timeout=60, resolver=names)
        ) as session,
    ):
        client, calls = ProviderClient(session, URL(url), "paid", 5), post(session, url)
        for _ in range(2):
            await calls.send(b"{}", watcher.sent)
            for _ in range(2):
                await client.request("GET", URL(f"{url}/job"), 5)
    assert counts == [1, 4, 1]


async def test_a_poll_on_a_connection_that_the_provider_has_closed_is_repeated(
    names: Names, raw_server: RawServer, read_request: ReadRequest
) -> None:
    """The provider closes each connection when it is used for the second time."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        opened.append(1)
        await read_request(reader)
        writer.write(OK)
        await read_request(reader)
        writer.close()

    opened: list[int] = []
    url = await raw_server(serve)
    async with (
        ProxyConnector(Proxies(), resolver=names) as paid,
        aiohttp.ClientSession(connector=UpstreamConnector(paid, Proxies(), resolver=names)) as session,
    ):
        client = ProviderClient(session, URL(url), "paid", 5)
        assert [(await client.request("GET", URL(f"{url}/job"), 5)).status for _ in range(3)] == [200] * 3
    assert len(opened) == 3


async def test_a_connection_is_reused_after_a_whole_response(
    session: aiohttp.ClientSession, raw_server: RawServer, read_request: ReadRequest, watcher: Recorder
) -> None:
    serving, counts = connections(raw_server, read_request, OK, b"HTTP/1.1 204 No Content\r\n\r\n", OK)
    one = post(session, await serving)
    for _ in range(3):
        await one.send(b"{}", watcher.sent)
    assert (counts, watcher.sent_count) == ([3], 3)


@pytest.mark.parametrize(
    "last",
    [
        OK.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"),
        OK + OK.replace(b"ok", b"no"),
    ],
)
async def test_a_connection_that_must_not_be_reused_is_closed(
    session: aiohttp.ClientSession, raw_server: RawServer, read_request: ReadRequest, watcher: Recorder, last: bytes
) -> None:
    serving, counts = connections(raw_server, read_request, last, OK)
    one = post(session, await serving)
    assert (await one.send(b"{}", watcher.sent)).body == b"ok"
    assert (await one.send(b"{}", watcher.sent)).body == b"ok"
    assert counts == [1, 1]


@pytest.mark.parametrize(
    "before", [b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" * 2]
)
async def test_bytes_before_the_request_are_not_a_response(
    session: aiohttp.ClientSession, raw_server: RawServer, read_request: ReadRequest, watcher: Recorder, before: bytes
) -> None:
    serving, counts = connections(raw_server, read_request, before + OK, OK)
    one = post(session, await serving)
    assert [(await one.send(b"{}", watcher.sent)).body for _ in range(2)] == [b"ok", b"ok"]
    assert counts == [2]


@pytest.mark.parametrize(
    ("head", "parts"),
    [
        (b"Content-Length: 6", [b"pi", b"ct", b"ur"]),
        (b"Transfer-Encoding: chunked", [b"2\r\npi\r\n", b"4\r\nctur\r\n", b"0\r\n\r\n"]),
        (b"Connection: close", [b"pict", b"ur"]),
        (b"Connection: close", [ZIPPED]),
        (b"Content-Length: %d" % len(ZIPPED), [ZIPPED[:5], ZIPPED[5:]]),
        (b"Content-Length: 6\r\nX-Policy: " + b"a" * 60_000, [b"pictur"]),
        (b"Transfer-Encoding: gzip, chunked", [b"%x\r\n" % len(ZIPPED), ZIPPED, b"\r\n0\r\n\r\n"]),
    ],
)
async def test_a_body_in_parts_is_read_to_its_end(
    session: aiohttp.ClientSession,
    raw_server: RawServer,
    read_request: ReadRequest,
    watcher: Recorder,
    head: bytes,
    parts: list[bytes],
) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\n" + head + b"\r\n\r\n")
        for part in parts:
            await asyncio.sleep(0.01)
            writer.write(part)

    assert (await send(session, await raw_server(serve), watcher)).body == b"pictur"


async def test_a_large_request_arrives_whole(
    session: aiohttp.ClientSession, raw_server: RawServer, read_request: ReadRequest, watcher: Recorder
) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        sizes.append(len(await read_request(reader)))
        writer.write(OK)

    sizes: list[int] = []
    await send(session, await raw_server(serve), watcher, b"x" * 2**23)
    assert sizes[0] > 2**23


async def test_an_early_response_closes_the_connection(
    session: aiohttp.ClientSession, raw_server: RawServer, watcher: Recorder
) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        served.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(OK)
        await done.wait()

    served: list[bytes] = []
    done = asyncio.Event()
    one = post(session, await raw_server(serve))
    assert (await one.send(b"x" * 2**25, watcher.sent)).body == b"ok"
    assert (await one.send(b"{}", watcher.sent)).body == b"ok"
    done.set()
    assert len(served) == 2


async def test_an_unsent_request_is_distinguished(session: aiohttp.ClientSession, watcher: Recorder) -> None:
    for url in ("http://nowhere.invalid", "ftp://example.com", "http://127.0.0.1:1"):
        with pytest.raises(NotSent):
            await send(session, url, watcher)
    await session.close()
    with pytest.raises(NotSent):
        await send(session, "http://127.0.0.1:1", watcher)
    assert watcher.sent_count == 0


async def test_a_connection_closed_before_the_write_is_not_sent(
    session: aiohttp.ClientSession, raw_server: RawServer, watcher: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def closing(*args: Any) -> Connection:
        connection = await connect(*args)
        assert connection.transport is not None
        connection.transport.close()
        return connection

    async def serve(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        got.append(await reader.read())

    got: list[bytes] = []
    assert session.connector is not None
    connect = session.connector.connect
    monkeypatch.setattr(session.connector, "connect", closing)
    with pytest.raises(NotSent):
        await send(session, await raw_server(serve), watcher)
    await session.close()
    await eventually(lambda: got)
    assert (watcher.sent_count, got) == (0, [b""])


async def test_a_header_can_not_inject_another(
    session: aiohttp.ClientSession, raw_server: RawServer, read_request: ReadRequest, watcher: Recorder
) -> None:
    serving, counts = connections(raw_server, read_request, OK)
    with pytest.raises(ValueError, match="control characters"):
        await send(session, await serving, watcher, Authorization="Bearer k\r\nX: y")
    await session.close()
    await eventually(lambda: counts)
    assert (watcher.sent_count, counts) == (0, [0])


@pytest.mark.parametrize(
    ("start", "error"),
    [
        (b"", aiohttp.ServerDisconnectedError),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf", aiohttp.ClientPayloadError),
        (b"SSH-2.0-OpenSSH_9.6\r\n\r\n", HttpProcessingError),
    ],
)
async def test_a_broken_response_has_its_cause(
    session: aiohttp.ClientSession,
    raw_server: RawServer,
    read_request: ReadRequest,
    watcher: Recorder,
    start: bytes,
    error: type[ServerDisconnectedError] | type[ClientPayloadError] | type[HttpProcessingError],
) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(start)

    with pytest.raises(error):
        await send(session, await raw_server(serve), watcher)
    assert watcher.sent_count == 1


@pytest.mark.parametrize("start", [b"SSH-2.0-OpenSSH_9.6\r\n", b"\r\n\r\n{", b"HTTPS"])
async def test_a_response_that_is_not_http_is_not_waited_for(
    session: aiohttp.ClientSession, raw_server: RawServer, read_request: ReadRequest, watcher: Recorder, start: bytes
) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(start)
        await reader.read()

    with pytest.raises(HttpProcessingError):
        await send(session, await raw_server(serve), watcher, timeout_s=20.0)


async def test_a_connection_of_a_timed_out_call_is_dropped(
    session: aiohttp.ClientSession, raw_server: RawServer, read_request: ReadRequest, watcher: Recorder
) -> None:
    async def serve(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        got.append(await reader.read())
        left.set()

    got: list[bytes] = []
    left = asyncio.Event()
    with pytest.raises(TimeoutError):
        await send(session, await raw_server(serve), watcher, timeout_s=0.1)
    async with asyncio.timeout(20):
        await left.wait()
    assert got == [b""]


@pytest.mark.parametrize("head", [b"Content-Length: 40000000", b"Transfer-Encoding: chunked"])
async def test_a_large_body_that_breaks_off_takes_no_memory(
    session: aiohttp.ClientSession,
    raw_server: RawServer,
    read_request: ReadRequest,
    watcher: Recorder,
    monkeypatch: pytest.MonkeyPatch,
    head: bytes,
) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\n" + head + b"\r\n\r\n100000\r\n" + bytes(2**20) + b"\r\n")
        await writer.drain()
        writer.close()

    budget = ByteBudget()
    monkeypatch.setattr(response_body, "_bodies", budget)
    with pytest.raises(aiohttp.ClientPayloadError) as caught:
        async with asyncio.timeout(9):  # it does not wait for the memory that it holds itself
            await send(session, await raw_server(serve), watcher)
    assert budget.held == 0, caught


@pytest.mark.parametrize("head", [b"Content-Length: 99999999", b"Connection: close"])
async def test_a_body_over_the_limit_is_an_upstream_error(
    session: aiohttp.ClientSession,
    raw_server: RawServer,
    read_request: ReadRequest,
    watcher: Recorder,
    monkeypatch: pytest.MonkeyPatch,
    head: bytes,
) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\n" + head + b"\r\n\r\n")
        for _ in range(49):
            writer.write(bytes(2**20))
        await reader.read()

    budget = ByteBudget()
    monkeypatch.setattr(response_body, "_bodies", budget)
    with pytest.raises(UpstreamError, match="more than 48 MiB") as caught:
        await send(session, await raw_server(serve), watcher)
    assert budget.held == 0, caught


@pytest.mark.parametrize(
    "body",
    [b'{"data":[' + b"{}," * 140_000 + b"{}]}", b"data: [" + b"1," * 140_000 + b"1]\n\n", b'["' + b"," * 400_000],
)
async def test_a_response_of_very_many_values_is_a_lasting_failure(
    session: aiohttp.ClientSession, raw_server: RawServer, read_request: ReadRequest, watcher: Recorder, body: bytes
) -> None:
    response = b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
    serving, _ = connections(
        raw_server, read_request, b"HTTP/1.1 200 OK\r\n" + response, b"HTTP/1.1 429 Wait\r\n" + response
    )
    url = await serving
    with pytest.raises(UpstreamError, match="more than 131072 values") as caught:
        await send(session, url, watcher)
    assert caught.value.lasting
    refusal = await send(session, url, watcher)
    assert (refusal.status, refusal.body) == (429, b"")


ANSWER = b'{"data":[{"url":"https://h/1.png"}]}'
BR = bytes.fromhex("0b1180")


@pytest.mark.parametrize("status", [b"200 OK", b"429 Too Many Requests"])
@pytest.mark.parametrize(
    ("head", "framed"),
    [
        (b"Content-Length: 900", ANSWER),
        (b"Content-Length: 900000", ANSWER),
        (b"Transfer-Encoding: chunked", b"%x\r\n%b\r\n" % (len(ANSWER), ANSWER)),
        (b"Transfer-Encoding: chunked", b"%x\r\n%b" % (len(ANSWER) + 9, ANSWER)),
        (b"Transfer-Encoding: chunked", b"%x\r\n%bno chunk" % (len(ANSWER), ANSWER)),
        (b"Content-Encoding: gzip\r\nContent-Length: 900", gzip.compress(ANSWER)),
    ],
)
@pytest.mark.parametrize("request_body", [b"{}", StreamedBody([b"{", b"}"])], ids=["at once", "in pieces"])
@pytest.mark.parametrize("stays_open", [False, True])
async def test_a_response_without_its_end_is_used_if_its_content_is_whole(
    session: aiohttp.ClientSession,
    raw_server: RawServer,
    read_request: ReadRequest,
    watcher: Recorder,
    status: bytes,
    head: bytes,
    framed: bytes,
    request_body: bytes | StreamedBody,
    stays_open: bool,
) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.1 %b\r\n%b\r\n\r\n%b" % (status, head, framed))
        if stays_open:
            await reader.read()

    url = await raw_server(serve)
    answer = await send(session, url, watcher, request_body, timeout_s=0.3 if stays_open else 5.0)
    assert (answer.status, answer.body) == (int(status[:3]), ANSWER)


@pytest.mark.parametrize("request_body", [b"{}", StreamedBody([b"{", b"}"])], ids=["at once", "in pieces"])
@pytest.mark.parametrize("length", [len(ANSWER), len(ANSWER) - 1], ids=["whole", "cut"])
async def test_a_broken_chunk_is_the_end_of_a_body(
    session: aiohttp.ClientSession,
    raw_server: RawServer,
    read_request: ReadRequest,
    watcher: Recorder,
    length: int,
    request_body: bytes | StreamedBody,
) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        writer.write(head + b"%x\r\n%bno chunk" % (length, ANSWER[:length]))

    url = await raw_server(serve)
    async with asyncio.timeout(10):
        if length == len(ANSWER):
            assert (await send(session, url, watcher, request_body, timeout_s=20.0)).body == ANSWER
        else:
            with pytest.raises(aiohttp.ClientPayloadError):
                await send(session, url, watcher, request_body, timeout_s=20.0)


@pytest.mark.parametrize("coding", ["gzip", "x-gzip", "deflate", "br", "zstd", "identity", "aws-chunked"])
async def test_a_wrong_content_coding_costs_no_response(
    session: aiohttp.ClientSession, raw_server: RawServer, read_request: ReadRequest, watcher: Recorder, coding: str
) -> None:
    response = b"HTTP/1.1 200 OK\r\nContent-Encoding: %b\r\nContent-Length: %d\r\n\r\n%b"
    serving, _ = connections(raw_server, read_request, response % (coding.encode(), len(ANSWER), ANSWER))
    assert (await send(session, await serving, watcher)).body == ANSWER


@pytest.mark.parametrize(
    ("coding", "body"),
    [
        ("gzip", gzip.compress(ANSWER)),
        ("GZIP", gzip.compress(ANSWER)),
        ("gzip", gzip.compress(ANSWER[:9]) + gzip.compress(ANSWER[9:])),
        ("gzip", gzip.compress(ANSWER) + b"surplus"),
        ("gzip, gzip", gzip.compress(gzip.compress(ANSWER))),
        ("identity", gzip.compress(ANSWER)),
        ("deflate", zlib.compress(ANSWER)),
        ("deflate", zlib.compress(ANSWER, wbits=-15)),
    ],
)
async def test_a_compressed_response_is_read(
    session: aiohttp.ClientSession,
    raw_server: RawServer,
    read_request: ReadRequest,
    watcher: Recorder,
    coding: str,
    body: bytes,
) -> None:
    response = b"HTTP/1.1 200 OK\r\nContent-Encoding: %b\r\nContent-Length: %d\r\n\r\n%b"
    serving, _ = connections(raw_server, read_request, response % (coding.encode(), len(body), body))
    assert (await send(session, await serving, watcher)).body == ANSWER


@pytest.mark.parametrize(
    "body", [ZIPPED + b"surplus " * 2**20, gzip.compress(b"") * 100_000, gzip.compress(b"surplus") * 100_000]
)
async def test_bytes_and_empty_members_behind_a_compressed_response_cost_no_time(
    session: aiohttp.ClientSession, raw_server: RawServer, read_request: ReadRequest, watcher: Recorder, body: bytes
) -> None:
    response = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    serving, _ = connections(raw_server, read_request, response)
    began_s = time.process_time()
    await send(session, await serving, watcher, timeout_s=60.0)
    assert time.process_time() - began_s < 3


@pytest.mark.parametrize("coding", ["br", "zstd", "gzip, br"])
async def test_a_response_in_a_coding_that_was_not_accepted_is_a_lasting_failure(
    session: aiohttp.ClientSession, raw_server: RawServer, read_request: ReadRequest, watcher: Recorder, coding: str
) -> None:
    response = b"HTTP/1.1 200 OK\r\nContent-Encoding: %b\r\nContent-Length: 3\r\n\r\n%b"
    serving, _ = connections(raw_server, read_request, response % (coding.encode(), BR))
    with pytest.raises(UpstreamError, match=f"compressed by {coding[-4:].strip(' ,')}") as caught:
        await send(session, await serving, watcher)
    assert caught.value.lasting


PLAIN = b"HTTP/1.1 200 OK\r\n"
LENGTH = b"Content-Length: %d\r\n" % len(ANSWER)
CHUNKED = b"Transfer-Encoding: chunked\r\n"
CHUNKS = b"%x\r\n%b\r\n0\r\nX-Trailer: x\r\n\r\n" % (len(ANSWER), ANSWER)


@pytest.mark.parametrize(
    "response",
    [
        PLAIN + LENGTH + LENGTH + b"\r\n" + ANSWER,
        PLAIN + LENGTH + b"Content-Length: 7\r\n\r\n" + ANSWER,
        PLAIN + b"Content-Length: 7\r\n" + CHUNKED + b"\r\n" + CHUNKS,
        PLAIN + CHUNKED + b"\r\n" + CHUNKS + b"surplus",
        PLAIN + b"Content-Length: -7\r\n\r\n" + ANSWER,
        PLAIN + b"Content-Length: +%d\r\n\r\n" % len(ANSWER) + ANSWER,
        PLAIN + b"Content-Length: many\r\n\r\n" + ANSWER,
        PLAIN + b"Content-Length: %d\r\n\r\n" % (len(ANSWER) - 5) + ANSWER,
        PLAIN + LENGTH + b"\r\n" + ANSWER + b"  \r\n",
        PLAIN + LENGTH + b"Connection: close\r\n\r\n" + ANSWER + b"surplus",
        PLAIN + b"X : x\r\nX\xc3\xa9: y\r\nX: a\0b\r\nno colon\r\n: none\r\n" + LENGTH + b"\r\n" + ANSWER,
        PLAIN + b"X: a\r\n  folded\r\n" + LENGTH + b"\r\n" + ANSWER,
        PLAIN + b"".join(b"X-%d: x\r\n" % n for n in range(1_000)) + LENGTH + b"\r\n" + ANSWER,
        PLAIN + b"X: " + b"x" * 100_000 + b"\r\n" + LENGTH + b"\r\n" + ANSWER,
        b"HTTP/1.1 200 \xe5\xa5\xbd\r\n" + LENGTH + b"\r\n" + ANSWER,
        b"HTTP/1.1  200\r\n" + LENGTH + b"\r\n" + ANSWER,
        b"HTTP/2 200 OK\r\n" + LENGTH + b"\r\n" + ANSWER,
        b"HTTP/1.0 200 OK\n\n" + ANSWER,
        b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" * 500 + PLAIN + LENGTH + b"\r\n" + ANSWER,
    ],
)
async def test_a_response_with_an_odd_head_is_read(
    session: aiohttp.ClientSession, raw_server: RawServer, read_request: ReadRequest, watcher: Recorder, response: bytes
) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        for at in range(0, len(response), 30_000):
            writer.write(response[at : at + 30_000])
            await writer.drain()

    answer = await send(session, await raw_server(serve), watcher)
    assert (answer.status, answer.body.strip()[: len(ANSWER)]) == (200, ANSWER)


@pytest.mark.parametrize("end", [b"\r\n", b"\n"])
async def test_a_head_that_comes_byte_by_byte_is_read(
    session: aiohttp.ClientSession, raw_server: RawServer, read_request: ReadRequest, watcher: Recorder, end: bytes
) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        for byte in end.join([b"HTTP/1.1 103 Early Hints", b"", b"HTTP/1.1 200 OK", b"Content-Length: 2", b"", b"ok"]):
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(0)

    assert (await send(session, await raw_server(serve), watcher)).body == b"ok"


async def test_informational_responses_that_come_one_by_one_are_passed_over(
    session: aiohttp.ClientSession, raw_server: RawServer, read_request: ReadRequest, watcher: Recorder
) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        for _ in range(3):
            writer.write(b"HTTP/1.1 102 Processing\r\n\r\n")
            await writer.drain()
            passed.append(await waits.get())
        writer.write(OK)

    waits: asyncio.Queue[int] = asyncio.Queue()
    passed: list[int] = []
    for number in range(3):
        waits.put_nowait(number)
    assert (await send(session, await raw_server(serve), watcher)).body == b"ok"
