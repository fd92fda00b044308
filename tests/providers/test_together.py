"""Tests of calls to Together: requests, responses, and the error for each lost call."""

import asyncio
import base64
import gzip
import json
import socket
from typing import Any

import aiohttp
import aioresponses.core
import pytest
from aiohttp import web
from msgspec.structs import replace
from pytest_aiohttp import AiohttpServer

from imagegen.errors import UpstreamError
from imagegen.providers import response_body, wrong_address
from imagegen.providers.http_client import USER_AGENT
from imagegen.providers.protocol import Call, Provider
from imagegen.providers.together import TogetherProvider
from imagegen.tasks.image import ImageBase64, ImageLink
from tests.emulated_jobs import Recorder
from tests.providers.conftest import MakeCall, RawServer, ReadRequest, ScriptedUpstream
from tests.support import LoopTime

KEY = "tgp_v1_not-a-real-key"
ROOT = "http://api.together.xyz"
GENERATIONS = f"{ROOT}/v1/images/generations"
LINK = "https://api.together.ai/shrt/jfS1HMmumnnmPemB"
ANSWER = {"id": "o", "model": "m", "object": "list", "data": [{"index": 0, "url": LINK}]}
BODY = json.dumps(ANSWER).encode()
DEADLINE_S = 60


@pytest.fixture(autouse=True)
def _short_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a server that speaks nothing known be probed for a moment alone."""
    monkeypatch.setattr(wrong_address, "PROBE_S", 0.2)


def together(session: aiohttp.ClientSession, base_url: str = ROOT, **more: Any) -> TogetherProvider:
    return TogetherProvider(session, api_key=KEY, base_url=base_url, **({"timeout_s": 30.0} | more))


async def lost(provider: Provider, call: Call, watcher: Recorder) -> UpstreamError:
    with pytest.raises(UpstreamError) as caught:
        async with asyncio.timeout(DEADLINE_S):
            await provider.generate(call, watcher)
    assert KEY not in repr(caught.value)
    return caught.value


def answer(body: bytes, *headers: str, length: int | None = None) -> bytes:
    lines = ["HTTP/1.1 200 OK", "Content-Type: application/json", f"Content-Length: {length or len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


async def test_only_what_the_client_gave_is_sent(
    session: aiohttp.ClientSession, upstream: ScriptedUpstream, make_call: MakeCall, watcher: Recorder
) -> None:
    upstream.post(GENERATIONS, payload=ANSWER)
    reply = await together(session).generate(make_call(), watcher)
    assert reply.images == (ImageLink(LINK),)
    assert upstream.request.fields == {
        "model": "m",
        "prompt": "a cat",
        "width": 512,
        "height": 512,
        "response_format": "url",
    }


async def test_everything_that_the_client_gave_is_sent(
    session: aiohttp.ClientSession, upstream: ScriptedUpstream, make_call: MakeCall, watcher: Recorder
) -> None:
    given = {
        "width": 768,
        "height": 1024,
        "steps": 4,
        "negative_prompt": "dogs",
        "guidance_scale": 3.5,
        "output_format": "png",
        "image_url": "https://example.com/a.png",
        "reference_images": ["https://example.com/b.png"],
    }
    upstream.post(GENERATIONS, payload=ANSWER)
    await together(session).generate(make_call(count=3, seed=12, **given), watcher)
    expected = {"model": "m", "prompt": "a cat", "n": 3, "seed": 12, "response_format": "url"} | given
    assert upstream.request.fields == expected


async def test_the_seed_is_of_the_call_and_never_of_the_request(
    session: aiohttp.ClientSession, upstream: ScriptedUpstream, make_call: MakeCall, watcher: Recorder
) -> None:
    upstream.post(GENERATIONS, payload=ANSWER)
    call = make_call(seed=None)
    await together(session).generate(call.__class__(replace(call.request, seed=5), count=1), watcher)
    assert "seed" not in upstream.request.fields


async def test_rejected_parameters_are_dropped_and_a_size_as_a_whole(
    session: aiohttp.ClientSession, upstream: ScriptedUpstream, make_call: MakeCall, watcher: Recorder
) -> None:
    upstream.post(GENERATIONS, payload=ANSWER)
    call = make_call(seed=1, steps=4, without=["steps", "seed", "height", "prompt_upsampling"])
    await together(session).generate(call, watcher)
    assert upstream.request.fields == {"model": "m", "prompt": "a cat", "response_format": "url"}


async def test_the_key_and_a_user_agent_are_sent(
    session: aiohttp.ClientSession, upstream: ScriptedUpstream, make_call: MakeCall, watcher: Recorder
) -> None:
    upstream.post(GENERATIONS, payload=ANSWER)
    await together(session).generate(make_call(), watcher)
    headers = upstream.request.headers
    assert (headers["Authorization"], headers["Content-Type"]) == (f"Bearer {KEY}", "application/json")
    assert headers["User-Agent"] == USER_AGENT
    assert USER_AGENT.startswith("imagegen/")


@pytest.mark.parametrize("base_url", [ROOT, f"{ROOT}/", f"{ROOT}/v1", f"{ROOT}/v1/", "http://u:p@api.together.xyz"])
async def test_the_base_url_may_end_in_v1_or_not(
    session: aiohttp.ClientSession, upstream: ScriptedUpstream, make_call: MakeCall, watcher: Recorder, base_url: str
) -> None:
    upstream.post(GENERATIONS, payload=ANSWER)
    provider = together(session, base_url)
    assert (await provider.generate(make_call(), watcher)).images
    assert provider.own_hosts == {"api.together.xyz"}


async def test_base64_is_requested_if_configured(
    session: aiohttp.ClientSession, upstream: ScriptedUpstream, make_call: MakeCall, watcher: Recorder
) -> None:
    data = b"bytes" * 100_000
    upstream.post(GENERATIONS, payload={"data": [{"b64_json": base64.b64encode(data).decode()}]})
    reply = await together(session, response_format="base64").generate(make_call(), watcher)
    (image,) = reply.images
    assert isinstance(image, ImageBase64)
    assert base64.b64decode(image.text) == data
    assert upstream.request.fields["response_format"] == "base64"


async def test_images_beyond_the_requested_count_are_cut(
    session: aiohttp.ClientSession, upstream: ScriptedUpstream, make_call: MakeCall, watcher: Recorder
) -> None:
    upstream.post(GENERATIONS, payload={"data": [{"url": f"{LINK}{i}"} for i in range(3)]})
    reply = await together(session).generate(make_call(count=2), watcher)
    assert reply.images == (ImageLink(f"{LINK}0"), ImageLink(f"{LINK}1"))


async def test_a_refusal_has_its_code_and_retry_delay(
    session: aiohttp.ClientSession, upstream: ScriptedUpstream, make_call: MakeCall, watcher: Recorder
) -> None:
    headers = {"x-ratelimit-reset": "3"}
    upstream.post(GENERATIONS, status=429, payload={"error": {"message": f"slow down, {KEY}"}}, headers=headers)
    error = await lost(together(session), make_call(), watcher)
    assert (error.code, error.retry_after_s, error.status) == ("upstream_rate_limited", 3, 429)
    assert error.detail == "slow down, [key]"


async def test_the_image_models_are_listed(session: aiohttp.ClientSession, mocked: aioresponses.aioresponses) -> None:
    mocked.get(f"{ROOT}/v1/models", payload=[{"id": "flux", "type": "image"}, {"id": "llama", "type": "chat"}])
    assert await together(session).models() == ({"id": "flux", "type": "image"},)


@pytest.mark.parametrize(
    ("status", "body", "code"), [(401, "{}", "upstream_auth"), (200, "x", "upstream_bad_response")]
)
async def test_a_model_list_that_fails_is_an_upstream_error(
    session: aiohttp.ClientSession, mocked: aioresponses.aioresponses, status: int, body: str, code: str
) -> None:
    mocked.get(f"{ROOT}/v1/models", status=status, body=body)
    with pytest.raises(UpstreamError, match=code):
        await together(session).models()


async def test_together_implements_the_provider_interface(session: aiohttp.ClientSession) -> None:
    own = together(session, "http://127.0.0.1:9001")
    provider: Provider = own
    assert (provider.name, provider.max_images_per_call) == ("together", 4)
    assert (provider.images_inline, together(session, response_format="base64").images_inline) == (False, True)
    assert provider.own_hosts == {"127.0.0.1:9001"}
    await provider.close()
    assert not session.closed
    assert KEY not in repr(own._upstream)


async def test_the_watcher_is_notified_once_when_the_request_is_sent(
    session: aiohttp.ClientSession, aiohttp_server: AiohttpServer, make_call: MakeCall, watcher: Recorder
) -> None:
    counts = []

    async def generate(request: web.Request) -> web.Response:
        await request.read()
        counts.append(watcher.sent_count)
        return web.json_response(ANSWER)

    app = web.Application()
    app.router.add_post("/v1/images/generations", generate)
    server = await aiohttp_server(app)
    assert watcher.sent_count == 0
    await together(session, str(server.make_url("/"))).generate(make_call(negative_prompt="x" * 4000), watcher)
    assert (counts, watcher.sent_count) == ([1], 1)


async def test_a_refused_connection_is_not_ambiguous(
    session: aiohttp.ClientSession, make_call: MakeCall, watcher: Recorder
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        error = await lost(together(session, f"http://127.0.0.1:{port}"), make_call(), watcher)
    assert (error.code, error.retryable, error.ambiguous) == ("upstream_error", True, False)
    assert error.detail == "The provider can't be reached: no connection"
    assert watcher.sent_count == 0


async def test_an_unknown_name_is_not_ambiguous(
    session: aiohttp.ClientSession, make_call: MakeCall, watcher: Recorder
) -> None:
    error = await lost(together(session, "http://upstream.invalid"), make_call(), watcher)
    assert (error.code, error.retryable, error.ambiguous) == ("upstream_error", True, False)
    assert error.detail == "The provider can't be reached: its name was not found"


async def test_a_failed_tls_handshake_is_not_ambiguous(
    session: aiohttp.ClientSession, raw_server: RawServer, make_call: MakeCall, watcher: Recorder
) -> None:
    async def serve_plaintext(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(10)
        writer.write(b"no TLS is spoken here\r\n")

    url = await raw_server(serve_plaintext)
    error = await lost(together(session, url.replace("http:", "https:")), make_call(), watcher)
    assert (error.code, error.retryable, error.ambiguous) == ("upstream_error", True, False)
    assert error.detail == "The provider can't be reached: TLS failed"


async def test_a_handshake_that_hangs_is_not_ambiguous(
    session: aiohttp.ClientSession, raw_server: RawServer, make_call: MakeCall, watcher: Recorder
) -> None:
    async def hang(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        await reader.read()

    url = await raw_server(hang)
    error = await lost(together(session, url.replace("http:", "https:"), timeout_s=0.4), make_call(), watcher)
    assert (error.code, error.ambiguous, watcher.sent_count) == ("upstream_error", False, 0)
    assert error.detail == "The provider can't be reached: no connection in time"


async def test_an_invalid_address_is_not_ambiguous(
    session: aiohttp.ClientSession, make_call: MakeCall, watcher: Recorder
) -> None:
    error = await lost(together(session, "ftp://example.com"), make_call(), watcher)
    assert (error.ambiguous, error.detail) == (False, "The provider can't be reached: its address is not usable")


async def test_an_upstream_that_hangs_ends_at_the_deadline(
    session: aiohttp.ClientSession,
    raw_server: RawServer,
    make_call: MakeCall,
    watcher: Recorder,
    read_request: ReadRequest,
) -> None:
    async def hang(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        await LoopTime().move(30)
        await reader.read()

    error = await lost(together(session, await raw_server(hang)), make_call(), watcher)
    assert (error.code, error.retryable, error.ambiguous) == ("upstream_timeout", True, True)
    assert (error.detail, watcher.sent_count) == ("The provider did not answer within 30 s", 1)


@pytest.mark.parametrize("head", [b"", answer(b"", length=100_000)])
async def test_a_trickle_ends_at_the_total_deadline(
    session: aiohttp.ClientSession,
    raw_server: RawServer,
    make_call: MakeCall,
    watcher: Recorder,
    read_request: ReadRequest,
    head: bytes,
) -> None:
    async def trickle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        time = LoopTime()
        writer.write(head)
        for _ in range(6):
            writer.write(b" " if head else b"\r\n")
            await writer.drain()
            await time.move(5)
        await reader.read()

    error = await lost(together(session, await raw_server(trickle)), make_call(), watcher)
    assert (error.code, error.ambiguous) == ("upstream_timeout", True)


@pytest.mark.parametrize("start", [b"", b"HTTP/1.1 20", answer(BODY[:20], length=len(BODY))])
@pytest.mark.parametrize("reset", [True, False])
async def test_a_cut_after_sending_is_ambiguous(
    session: aiohttp.ClientSession,
    raw_server: RawServer,
    make_call: MakeCall,
    watcher: Recorder,
    read_request: ReadRequest,
    start: bytes,
    reset: bool,
) -> None:
    async def cut(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(start)
        await writer.drain()
        if reset:
            linger = b"\x01\0\0\0\0\0\0\0"
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)

    error = await lost(together(session, await raw_server(cut)), make_call(), watcher)
    assert (error.code, error.retryable, error.ambiguous) == ("upstream_error", True, True)


async def test_a_non_http_answer_is_a_bad_response(
    session: aiohttp.ClientSession,
    raw_server: RawServer,
    make_call: MakeCall,
    watcher: Recorder,
    read_request: ReadRequest,
) -> None:
    async def send_garbage(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b"no HTTP is spoken here\r\n\r\n")

    error = await lost(together(session, await raw_server(send_garbage)), make_call(), watcher)
    assert (error.code, error.retryable) == ("upstream_bad_response", False)


async def test_a_pooled_connection_that_dies_is_not_silently_used_twice(
    session: aiohttp.ClientSession,
    raw_server: RawServer,
    make_call: MakeCall,
    watcher: Recorder,
    read_request: ReadRequest,
) -> None:
    calls = []

    async def answer_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        calls.append(await read_request(reader))
        writer.write(answer(BODY))
        calls.append(await read_request(reader))

    provider = together(session, await raw_server(answer_once))
    assert (await provider.generate(make_call(), watcher)).images
    error = await lost(provider, make_call(), watcher)
    assert (error.code, error.ambiguous, len(calls)) == ("upstream_error", True, 2)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_is_not_followed_and_gets_no_key(
    session: aiohttp.ClientSession, aiohttp_server: AiohttpServer, make_call: MakeCall, watcher: Recorder, status: int
) -> None:
    elsewhere = []

    async def collect(request: web.Request) -> web.Response:
        elsewhere.append(request.headers)
        return web.json_response(ANSWER)

    async def redirect(_request: web.Request) -> web.Response:
        return web.Response(status=status, headers={"Location": str(other.make_url("/"))})

    other_app, app = web.Application(), web.Application()
    other_app.router.add_route("*", "/", collect)
    app.router.add_route("*", "/v1/images/generations", redirect)
    app.router.add_route("*", "/v1/models", redirect)
    other, server = await aiohttp_server(other_app), await aiohttp_server(app)
    provider = together(session, str(server.make_url("/")))
    assert (await lost(provider, make_call(), watcher)).code == "upstream_bad_response"
    with pytest.raises(UpstreamError, match="upstream_bad_response"):
        await provider.models()
    assert elsewhere == []


@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize("zipped", [True, False])
async def test_a_body_over_the_limit_is_not_read(
    session: aiohttp.ClientSession,
    raw_server: RawServer,
    make_call: MakeCall,
    watcher: Recorder,
    read_request: ReadRequest,
    monkeypatch: pytest.MonkeyPatch,
    is_reading: asyncio.Event,
    declared: bool,
    zipped: bool,
) -> None:
    monkeypatch.setattr(response_body, "MAX_BODY_BYTES", 2**20)
    zeros = b" " * 2**24
    body = gzip.compress(zeros) if zipped else zeros
    left = asyncio.Event()

    async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        lines = ["HTTP/1.1 200 OK", "Content-Type: application/json", "Connection: close"]
        lines += [f"Content-Length: {len(body)}"] * declared + ["Content-Encoding: gzip"] * zipped
        writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
        try:
            if zipped and not declared:  # the few bytes that it has are read at its end
                await is_reading.wait()
                await LoopTime().move(30)
            await reader.read()
        finally:
            left.set()

    error = await lost(together(session, await raw_server(flood)), make_call(), watcher)
    assert (error.code, error.detail) == ("upstream_bad_response", "HTTP 200, more than 1 MiB")
    async with asyncio.timeout(DEADLINE_S):
        await left.wait()


async def test_a_cancelled_call_drops_its_connection_at_once(
    session: aiohttp.ClientSession,
    raw_server: RawServer,
    make_call: MakeCall,
    watcher: Recorder,
    read_request: ReadRequest,
) -> None:
    dropped = asyncio.Event()

    async def wait_for_the_end(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        assert await reader.read() == b""
        dropped.set()

    url = await raw_server(wait_for_the_end)
    loop = asyncio.create_task(together(session, url).generate(make_call(), watcher))
    async with asyncio.timeout(DEADLINE_S):
        await watcher.on_wire.wait()
        loop.cancel()
        with pytest.raises(asyncio.CancelledError):
            await loop
        await dropped.wait()
