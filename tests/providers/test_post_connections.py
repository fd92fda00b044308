"""Tests of the connections of paid POSTs and polls: which are kept, and which are closed."""

import asyncio
import socket
import time

import aiohttp
import pytest
from yarl import URL

from imagegen.providers.http_client import ProviderClient
from imagegen.providers.post import UpstreamConnector
from imagegen.proxies import Proxies, ProxyConnector
from tests.emulated_jobs import Recorder
from tests.providers.conftest import Names, RawServer, ReadRequest
from tests.providers.paid_posts import OK, connections, post, send
from tests.support import LoopTime


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
        client, calls = ProviderClient(session, URL(url), "paid", 30), post(session, url)
        for _ in range(2):
            await calls.send(b"{}", watcher.sent)
            for _ in range(2):
                await client.request("GET", URL(f"{url}/job"), 30)
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
        client = ProviderClient(session, URL(url), "paid", 30)
        assert [(await client.request("GET", URL(f"{url}/job"), 30)).status for _ in range(3)] == [200] * 3
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


async def test_a_connection_of_a_timed_out_call_is_dropped(
    session: aiohttp.ClientSession, raw_server: RawServer, read_request: ReadRequest, watcher: Recorder
) -> None:
    async def serve(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        await LoopTime().move(30)
        got.append(await reader.read())
        left.set()

    got: list[bytes] = []
    left = asyncio.Event()
    with pytest.raises(TimeoutError):
        await send(session, await raw_server(serve), watcher)
    async with asyncio.timeout(20):
        await left.wait()
    assert got == [b""]


@pytest.mark.parametrize("end", ["closed", "unasked", "read"])
async def test_a_kept_connection_that_the_provider_ends_at_this_moment_is_not_used(
    session: aiohttp.ClientSession, raw_server: RawServer, read_request: ReadRequest, watcher: Recorder, end: str
) -> None:
    """The provider closes it, or sends a 408 for a request that there is not, before the event loop sees that."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            requests.append(writer)
            await read_request(reader)
            writer.write(OK)

    requests: list[asyncio.StreamWriter] = []
    one = post(session, await raw_server(serve))
    await one.send(b"{}", watcher.sent)
    first = requests[0]
    if end == "closed":
        first.get_extra_info("socket").shutdown(socket.SHUT_WR)
    else:
        first.write(b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\n\r\n")
    if end == "read":
        await asyncio.get_running_loop().run_in_executor(None, time.sleep, 0.05)
    assert [(await one.send(b"{}", watcher.sent)).status for _ in range(2)] == [200, 200]
    assert len({id(writer) for writer in requests}) == 2
