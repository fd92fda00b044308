"""Owns what the provider tests share: a session like the app's, a mocked and a real upstream, a listening watcher."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from unittest.mock import Mock

import aiohttp
import aioresponses
import aioresponses.core
import pytest
from aiohttp.client_proto import ResponseHandler

from imagegen.providers.client import sent_trace
from imagegen.providers.protocol import Call
from imagegen.tasks.request import GenerationRequest

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class _Response(aiohttp.ClientResponse):
    """aioresponses 0.7.9 lacks `stream_writer`, which aiohttp has required since 3.14."""

    def __init__(self, *args, **kwargs):
        kwargs.setdefault("stream_writer", Mock(output_size=0))
        super().__init__(*args, **kwargs)


def _reader(loop=None):
    """The default limit of aioresponses' reader fails on bodies over 128 KiB."""
    loop = loop or asyncio.get_running_loop()
    return aiohttp.StreamReader(ResponseHandler(loop=loop), limit=2**26, loop=loop)


@dataclass
class Listener:
    """A watcher that remembers what it was told."""

    sent_count: int = 0
    fractions: list[float] = field(default_factory=list)
    on_wire: asyncio.Event = field(default_factory=asyncio.Event)

    def sent(self) -> None:
        self.sent_count += 1
        self.on_wire.set()

    def progress(self, fraction: float) -> None:
        self.fractions.append(fraction)


@pytest.fixture
def mocked(monkeypatch) -> Iterator[aioresponses.aioresponses]:
    monkeypatch.setattr(aioresponses.core, "ClientResponse", _Response)
    monkeypatch.setattr(aioresponses.core, "stream_reader_factory", _reader)
    with aioresponses.aioresponses() as mock:
        yield mock


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(
        trace_configs=[sent_trace()],
        cookie_jar=aiohttp.DummyCookieJar(),
        connector=aiohttp.TCPConnector(keepalive_timeout=15),
    ) as session:
        yield session


@pytest.fixture
def watcher() -> Listener:
    return Listener()


@pytest.fixture
def make_call() -> Callable[..., Call]:
    def make(*, count=1, seed=None, without=(), **fields) -> Call:
        request = GenerationRequest.model_validate({"prompt": "a cat", "model": "m"} | fields)
        return Call(request, count=count, seed=seed, without=frozenset(without))

    return make


@pytest.fixture
async def raw_server() -> AsyncIterator[Callable[[Handler], Awaitable[str]]]:
    """Starts a server of bare bytes on a loopback port and gives its address; each handler reads for itself."""
    servers, writers = [], []

    async def start(handler: Handler) -> str:
        async def serve(reader, writer):
            writers.append(writer)
            try:
                await handler(reader, writer)
            except (ConnectionError, asyncio.IncompleteReadError):
                pass
            finally:
                writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        servers.append(server)
        return f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"

    yield start
    for writer in writers:
        writer.close()
    for server in servers:
        server.close()
        await server.wait_closed()


async def read_request(reader: asyncio.StreamReader) -> bytes:
    """One whole request: its head and its body."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(
        (int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), 0
    )
    return head + await reader.readexactly(length)


@pytest.fixture(name="read_request")
def _read_request() -> Callable[[asyncio.StreamReader], Awaitable[bytes]]:
    return read_request
