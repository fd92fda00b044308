"""Tests of one paid POST: what is sent, and what is known of a call that was not sent or not answered."""

import asyncio
from typing import Any

import aiohttp
import pytest
from aiohttp.client_exceptions import ClientPayloadError, ServerDisconnectedError
from aiohttp.connector import Connection
from aiohttp.http import HttpProcessingError

from imagegen.providers.post import NotSent
from tests.emulated_jobs import Recorder
from tests.providers.conftest import RawServer, ReadRequest
from tests.providers.paid_posts import OK, connections, post, send
from tests.support import eventually


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


async def test_a_large_request_arrives_whole(
    session: aiohttp.ClientSession, raw_server: RawServer, read_request: ReadRequest, watcher: Recorder
) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        sizes.append(len(await read_request(reader)))
        writer.write(OK)

    sizes: list[int] = []
    await send(session, await raw_server(serve), watcher, b"x" * 2**23)
    assert sizes[0] > 2**23


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


async def test_a_request_whose_time_ends_before_its_first_byte_is_not_sent(
    session: aiohttp.ClientSession, raw_server: RawServer, watcher: Recorder
) -> None:
    async def serve(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        received.append(await reader.read())

    async def wait() -> None:
        await asyncio.Event().wait()

    received: list[bytes] = []
    url = await raw_server(serve)
    with pytest.raises(NotSent):
        await post(session, url, 0.05).send(b"{}", watcher.sent, wait)
    await eventually(lambda: received == [b""])
    assert not watcher.sent_count


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
