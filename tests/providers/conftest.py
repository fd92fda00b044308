"""Fixtures of the provider tests: a session like the app's, upstreams on loopback, a mock of the session's lookups, a
recording watcher."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest.mock import Mock

import aiohttp
import aioresponses
import aioresponses.core
import pytest
from aiohttp import web
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.client_proto import ResponseHandler
from pytest_aiohttp import AiohttpServer

from imagegen.providers.protocol import Call, Edits, Provider, Reply
from imagegen.providers.response_body import ResponseBody
from imagegen.tasks.image import GivenImage, ImageBytes
from imagegen.tasks.reply_details import ReplyDetails
from imagegen.tasks.validation import parse
from tests.emulated_jobs import Recorder

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
RawServer = Callable[[Handler], Awaitable[str]]
ReadRequest = Callable[[asyncio.StreamReader], Awaitable[bytes]]
MakeCall = Callable[..., Call]
"""`make_call(count=2, seed=7, without=["steps"], width=768)`: a call, with the fields of its request."""


class _Response(aiohttp.ClientResponse):
    """Response of aioresponses 0.7.9 with `stream_writer`, which aiohttp has required since 3.14."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("stream_writer", Mock(output_size=0))
        super().__init__(*args, **kwargs)


def _reader(loop: asyncio.AbstractEventLoop | None = None) -> aiohttp.StreamReader:
    """Return a reader with a higher limit; aioresponses' default fails on bodies over 128 KiB."""
    loop = loop or asyncio.get_running_loop()
    return aiohttp.StreamReader(ResponseHandler(loop=loop), limit=2**26, loop=loop)


class Names(AbstractResolver):
    """Resolver of every host name to a port of this machine, or to nothing."""

    def __init__(self) -> None:
        self.port: int | None = None

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        if self.port is None:
            raise OSError(f"no such host {host}")
        return [ResolveResult(hostname=host, host="127.0.0.1", port=self.port, family=family, proto=0, flags=0)]

    async def close(self) -> None:
        """Do nothing."""


@dataclass
class Request:
    """Request received by an upstream."""

    headers: dict[str, str]
    body: bytes

    @property
    def fields(self) -> dict[str, Any]:
        return dict(json.loads(self.body))


class ScriptedUpstream:
    """Server for every host; sends the scripted response of an address, 404 for all others."""

    def __init__(self) -> None:
        self._answers: dict[str, dict[str, Any]] = {}
        self.requests: list[Request] = []

    def post(self, url: str, **answer: Any) -> None:
        """Add a response. payload: JSON; or body; and status, headers."""
        self._answers[url] = answer

    async def answer(self, request: web.Request) -> web.Response:
        self.requests.append(Request(dict(request.headers), await request.read()))
        answer = dict(self._answers.get(f"http://{request.host}{request.path}", {"status": 404}))
        body = json.dumps(answer.pop("payload")) if "payload" in answer else answer.pop("body", "")
        return web.Response(text=body, content_type="application/json", **answer)

    @property
    def request(self) -> Request:
        """Return the only received request."""
        (request,) = self.requests
        return request


@pytest.fixture
def mocked(monkeypatch: pytest.MonkeyPatch) -> Iterator[aioresponses.aioresponses]:
    """Mock the lookups through `ClientSession`. A paid POST bypasses it and reaches an `upstream`."""
    monkeypatch.setattr(aioresponses.core, "ClientResponse", _Response)
    monkeypatch.setattr(aioresponses.core, "stream_reader_factory", _reader)
    with aioresponses.aioresponses() as mock:
        yield mock


@pytest.fixture
def names() -> Names:
    return Names()


@pytest.fixture
async def upstream(aiohttp_server: AiohttpServer, names: Names) -> ScriptedUpstream:
    upstream, app = ScriptedUpstream(), web.Application(client_max_size=2**24)
    app.router.add_post("/{path:.*}", upstream.answer)
    names.port = (await aiohttp_server(app)).port
    return upstream


@pytest.fixture
async def session(names: Names) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(
        cookie_jar=aiohttp.DummyCookieJar(),
        connector=aiohttp.TCPConnector(resolver=names, keepalive_timeout=15),
    ) as session:
        yield session


@pytest.fixture
def watcher() -> Recorder:
    return Recorder()


@pytest.fixture
def make_call() -> MakeCall:
    def make(*, count: int = 1, seed: int | None = None, without: Iterable[str] = (), **fields: Any) -> Call:
        request = parse({"prompt": "a cat"} | fields, default_model="m", aliases={})
        return Call(request, count=count, seed=seed, without=frozenset(without))

    return make


@pytest.fixture
async def raw_server() -> AsyncIterator[RawServer]:
    """Start a raw TCP server on a loopback port and return its address; each handler reads its request."""
    servers: list[asyncio.Server] = []
    writers: list[asyncio.StreamWriter] = []

    async def start(handler: Handler) -> str:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
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


def data_of(image: GivenImage) -> bytes:
    """Return the bytes of an image that an answer holds, decoded."""
    assert isinstance(image, ImageBytes), image
    return image.data


def details_of(reply: Reply) -> ReplyDetails:
    assert reply.details is not None
    return reply.details


def edits_taken(provider: Provider, model: str) -> Edits:
    """Return the input images that a provider takes for a model, which takes some."""
    edits = provider.edits(model)
    assert edits is not None
    return edits


async def read_request(reader: asyncio.StreamReader) -> bytes:
    """Read one whole request: its head and its body."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(
        (int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), 0
    )
    return head + await reader.readexactly(length)


@pytest.fixture
def is_reading(monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """Return an event that is set when a provider has the head of a response, and reads its body."""
    begun, read = asyncio.Event(), ResponseBody.read

    async def recorded(body: ResponseBody) -> bytes | bytearray:
        begun.set()
        return await read(body)

    monkeypatch.setattr(ResponseBody, "read", recorded)
    return begun


@pytest.fixture(name="read_request")
def _read_request() -> ReadRequest:
    return read_request
