"""Tests that each fault behaves on the wire as its name describes."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gzip
import json
from collections.abc import AsyncIterator
from time import monotonic

import aiohttp
import pytest

from tests.emulator.conftest import MODEL, Ask
from tests.emulator_fixtures import EmulatedUpstream

MIB = 1024 * 1024


class Wire:
    """Raw connection that sent one request."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def rest(self) -> bytes:
        """Return all bytes to the end; raises ConnectionResetError on RST."""
        async with asyncio.timeout(30):
            return await self.reader.read()

    async def headers(self) -> bytes:
        async with asyncio.timeout(30):
            return await self.reader.readuntil(b"\r\n\r\n")


class Dialler:
    """Raw client that sends each generation over a separate connection."""

    def __init__(self, upstream: EmulatedUpstream) -> None:
        self._host, self._port = upstream.host.split(":")
        self.writers: list[asyncio.StreamWriter] = []

    async def __call__(self, prompt: str = "a cat", *, withheld: int = 0) -> Wire:
        """Send all but the last `withheld` bytes of the body."""
        body = json.dumps({"model": MODEL, "prompt": prompt, "width": 64, "height": 64}).encode()
        head = f"POST /v1/images/generations HTTP/1.1\r\nHost: {self._host}\r\nAuthorization: Bearer k\r\n"
        return await self.send(
            f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body[: len(body) - withheld]
        )

    async def send(self, data: bytes) -> Wire:
        reader, writer = await asyncio.open_connection(self._host, int(self._port))
        self.writers.append(writer)
        writer.write(data)
        await writer.drain()
        return Wire(reader, writer)


@pytest.fixture
async def dial(upstream: EmulatedUpstream) -> AsyncIterator[Dialler]:
    dialler = Dialler(upstream)
    yield dialler
    for writer in dialler.writers:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def test_a_hang_answers_nothing_and_is_paid(dial: Dialler, upstream: EmulatedUpstream) -> None:
    wire = await dial("{{fault:hang}}")
    await upstream.ledger.wait_for(lambda ledger: ledger.total == 1)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await wire.reader.read(1)
    call = upstream.ledger.calls[0]
    assert (call.outcome, call.paid, call.client_there, upstream.ledger.in_flight) == ("hang", True, None, 1)
    wire.writer.close()
    await upstream.ledger.wait_for(lambda ledger: ledger.in_flight == 0)
    assert call.client_there is False


async def test_stopping_does_not_wait_for_a_hang_and_frees_the_port(dial: Dialler, upstream: EmulatedUpstream) -> None:
    url = upstream.url
    wire = await dial("{{fault:hang}}")
    await upstream.ledger.wait_for(lambda ledger: ledger.total == 1)
    await asyncio.wait_for(upstream.stop(), 20)
    assert await wire.rest() == b""
    with pytest.raises(ConnectionRefusedError):
        await dial()
    await upstream.start()
    assert (await (await dial()).headers()).startswith(b"HTTP/1.1 200")
    assert (upstream.url, upstream.ledger.total) == (url, 2)


async def test_a_reset_before_the_body_is_not_paid(dial: Dialler, upstream: EmulatedUpstream) -> None:
    upstream.script("reset_before_read")
    with pytest.raises(ConnectionResetError):
        await (await dial(withheld=5)).rest()
    assert [(call.outcome, call.paid) for call in upstream.ledger.calls] == [("reset_before_read", False)]


@pytest.mark.parametrize(("fault", "paid"), [("reset", 1), ("reset_before_read", 0)])
async def test_a_reset_is_a_rst_without_an_answer(
    dial: Dialler, upstream: EmulatedUpstream, fault: str, paid: int
) -> None:
    with pytest.raises(ConnectionResetError):
        await (await dial(f"{{{{fault:{fault}}}}}")).rest()
    assert (upstream.ledger.calls[0].outcome, upstream.ledger.paid_total) == (fault, paid)


async def test_a_reset_in_the_middle_follows_half_the_body(dial: Dialler, upstream: EmulatedUpstream) -> None:
    wire = await dial("{{fault:reset_mid_answer}}")
    assert b"200 OK" in await wire.headers()
    with pytest.raises(ConnectionResetError):
        await wire.rest()
    assert upstream.ledger.paid_total == 1


async def test_a_close_is_an_orderly_end_without_an_answer(dial: Dialler) -> None:
    assert await (await dial("{{fault:close}}")).rest() == b""


async def test_a_truncated_body_is_shorter_than_its_content_length(dial: Dialler) -> None:
    wire = await dial("{{fault:truncated}}")
    head = await wire.headers()
    declared = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    assert len(await wire.rest()) == declared // 2


async def test_a_trickle_is_a_whole_response_byte_by_byte(dial: Dialler, upstream: EmulatedUpstream) -> None:
    slow = await dial("{{fault:trickle interval_s=60}}")
    await slow.headers()
    assert len(await slow.reader.read(100)) == 1
    slow.writer.close()
    await upstream.ledger.wait_for(lambda ledger: ledger.total == 1 and ledger.in_flight == 0)
    upstream.clear()
    wire = await dial("{{fault:trickle interval_s=0.0}}")
    await wire.headers()
    assert (await wire.rest()).endswith(b"\n}")
    await upstream.ledger.wait_for(lambda ledger: ledger.in_flight == 0)
    assert upstream.ledger.calls[0].client_there is True


async def test_a_client_that_leaves_a_trickle_is_noticed(dial: Dialler, upstream: EmulatedUpstream) -> None:
    wire = await dial("{{fault:trickle interval_s=0.05}}")
    await wire.headers()
    wire.writer.close()
    await upstream.ledger.wait_for(lambda ledger: ledger.calls[0].client_there is False)


async def test_a_delayed_response_is_sent_later(ask: Ask, upstream: EmulatedUpstream) -> None:
    started_at = monotonic()
    assert (await ask("{{fault:ok delay_s=0.2}}")).status == 200
    assert monotonic() - started_at >= 0.2
    call = upstream.ledger.calls[0]
    assert call.answered_at is not None
    assert call.answered_at - call.received_at >= 0.19


async def test_a_client_that_leaves_before_a_delayed_answer_has_paid(dial: Dialler, upstream: EmulatedUpstream) -> None:
    wire = await dial("{{fault:ok delay_s=30}}")
    await upstream.ledger.wait_for(lambda ledger: ledger.total == 1)
    wire.writer.close()
    await upstream.ledger.wait_for(lambda ledger: ledger.in_flight == 0)
    call = upstream.ledger.calls[0]
    assert (call.outcome, call.paid, call.client_there) == (200, True, False)


async def test_an_incomplete_request_is_not_in_the_ledger(dial: Dialler, upstream: EmulatedUpstream, ask: Ask) -> None:
    wire = await dial(withheld=3)
    wire.writer.close()
    await wire.writer.wait_closed()
    await ask()
    assert upstream.ledger.total == 1


@pytest.mark.parametrize(
    ("fault", "content_type", "text"),
    [
        ("empty", "application/json", ""),
        ("not_json", "text/html", "<html><body>Just a moment...</body></html>"),
        ("status status=418 body=teapot", "text/plain", "teapot"),
        ("503 delay_s=0", "application/json", None),
        ("599", "application/json", None),
    ],
)
async def test_a_malformed_body_matches_its_name(ask: Ask, fault: str, content_type: str, text: str | None) -> None:
    response = await ask(f"{{{{fault:{fault}}}}}")
    assert response.content_type == content_type
    assert text is None or await response.text() == text


async def test_a_queued_status_takes_any_json_and_headers(ask: Ask, upstream: EmulatedUpstream) -> None:
    upstream.script({"fault": "status", "status": 425, "body": {"detail": ["early"]}, "headers": {"X-Odd": "1"}})
    response = await ask()
    assert (response.status, await response.json(), response.headers["X-Odd"]) == (425, {"detail": ["early"]}, "1")


@pytest.mark.parametrize(
    ("fault", "change"),
    [
        ("no_images", lambda data: data == []),
        ("fewer_images", lambda data: len(data) == 2),
        ("fewer_images images=1", lambda data: len(data) == 1),
        ("null_url", lambda data: [entry["url"] for entry in data] == [None] * 3),
        ("null_url index=1", lambda data: [entry["url"] is None for entry in data] == [False, True, False]),
        ("javascript_url", lambda data: data[0]["url"].startswith("javascript:")),
        ("file_url", lambda data: data[0]["url"].startswith("file:///")),
        ("private_url", lambda data: data[0]["url"].startswith("http://10.")),
        ("url url=http://[::1]/x", lambda data: data[2]["url"] == "http://[::1]/x"),
        ("garbage_base64", lambda data: data[0]["b64_json"].startswith("%%%")),
        ("wrong_shape", lambda data: isinstance(data, dict)),
    ],
)
async def test_a_200_may_have_a_bad_body(ask: Ask, fault: str, change: object) -> None:
    response = await ask(f"{{{{fault:{fault}}}}}", n=3)
    assert response.status == 200
    assert change((await response.json())["data"])  # type: ignore[operator]


async def test_a_200_may_hold_an_error_or_a_root_other_than_an_object(ask: Ask) -> None:
    response = await ask("{{fault:error_in_200}}")
    assert (response.status, (await response.json())["error"]["type"]) == (200, "server_error")
    assert isinstance(await (await ask("{{fault:wrong_root}}")).json(), list)


async def test_broken_json_is_cut_at_its_end(ask: Ask) -> None:
    with pytest.raises(json.JSONDecodeError):
        await (await ask("{{fault:broken_json}}")).json()


async def test_a_duplicate_is_the_same_image_under_two_indexes(ask: Ask) -> None:
    body = await (await ask("{{fault:duplicate}}", n=2, response_format="base64")).json()
    good = await (await ask(n=2, response_format="base64")).json()
    assert body["data"][0]["b64_json"] == body["data"][1]["b64_json"]
    assert good["data"][0]["b64_json"] != good["data"][1]["b64_json"]


async def test_a_redirect_answers_302(session: aiohttp.ClientSession, upstream: EmulatedUpstream) -> None:
    upstream.script("redirect target=http://127.0.0.1:1/")
    url, headers = upstream.url + "/images/generations", {"Authorization": "Bearer k"}
    request = {"model": "m", "prompt": "x"}
    async with session.post(url, json=request, headers=headers, allow_redirects=False) as response:
        assert (response.status, response.headers["Location"]) == (302, "http://127.0.0.1:1/")


async def test_a_huge_body_is_over_32_mib_of_well_formed_json(ask: Ask) -> None:
    text = await (await ask("{{fault:huge_body}}")).text()
    assert len(text) > 32 * MIB
    assert text.endswith('AAA"}]}')


async def test_a_long_error_is_ten_million_characters(ask: Ask, upstream: EmulatedUpstream) -> None:
    response = await ask("{{fault:long_error}}")
    assert response.status == 400
    assert len((await response.json())["error"]["message"]) > 10_000_000
    assert upstream.ledger.paid == []


async def test_a_gzip_bomb_is_small_on_the_wire_and_big_in_memory(upstream: EmulatedUpstream) -> None:
    async with aiohttp.ClientSession(auto_decompress=False) as session:
        request = {"model": "m", "prompt": f"{{{{fault:gzip_bomb bytes={64 * MIB}}}}}"}
        headers = {"Authorization": "Bearer k"}
        async with session.post(upstream.url + "/images/generations", json=request, headers=headers) as response:
            packed = await response.read()
    assert response.headers["Content-Encoding"] == "gzip"
    assert len(packed) < MIB
    unpacked = gzip.decompress(packed)
    assert len(unpacked) > 64 * MIB
    assert json.loads(unpacked[-2000:])["object"] == "list"


async def test_a_body_over_20_mib_is_rejected_unread(dial: Dialler) -> None:
    head = b"POST /images/generations HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer k\r\n"
    wire = await dial.send(head + b"Content-Length: 30000000\r\n\r\n")
    assert (await wire.headers()).startswith(b"HTTP/1.1 413 ")


async def test_each_kind_of_429_has_its_own_retry_header(ask: Ask) -> None:
    headers_by_fault = {}
    for fault in ("429 reset=7", "429_retry_after retry_after=3", "429_reset", "429_text", "429 retry_after=2"):
        headers = (await ask(f"{{{{fault:{fault}}}}}")).headers
        headers_by_fault[fault] = (headers.get("Retry-After"), headers.get("x-ratelimit-reset"))
    assert list(headers_by_fault.values()) == [(None, "7"), ("3", None), (None, "1"), (None, None), ("2", "1")]


async def test_a_base64_answer_may_be_garbage_too(ask: Ask) -> None:
    body = await (await ask("{{fault:garbage_base64}}", response_format="base64")).json()
    with pytest.raises(ValueError, match="Only base64"):
        base64.b64decode(body["data"][0]["b64_json"], validate=True)
