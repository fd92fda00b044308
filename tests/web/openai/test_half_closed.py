"""Clients that close their own side after a request and then read: they get their answer, and no repeat is paid."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient

from tests.emulator_fixtures import EmulatedUpstream

Client = TestClient[web.Request, web.Application]

BODY = {"prompt": "a cat", "size": "64x64"}
HELD = {"fault": "ok", "held": 1}


@asynccontextmanager
async def half_closed(
    service: Client, method: str, path: str, body: object = None
) -> AsyncIterator[asyncio.StreamReader]:
    """Send a request and close the client's side; yield what it reads from."""
    reader, writer = await asyncio.open_connection(service.host, service.port)
    data = b"" if body is None else json.dumps(body).encode()
    lines = [f"{method} {path} HTTP/1.1", "Host: a", "Accept: application/json, text/event-stream"]
    lines += ["Content-Type: application/json", f"Content-Length: {len(data)}", "", ""]
    writer.write("\r\n".join(lines).encode() + data)
    writer.write_eof()
    try:
        yield reader
    finally:
        writer.close()


async def read_to_end(reader: asyncio.StreamReader) -> str:
    return (await asyncio.wait_for(reader.read(), 30)).decode()


CALL = {"name": "generate_image", "arguments": {"prompt": "a cat"}}


@pytest.mark.parametrize(
    ("path", "body", "end"),
    [
        ("/v1/images/generations", BODY, '"object":"list"'),
        ("/v1/images/generations", BODY | {"stream": True}, "image_generation.completed"),
        ("/api/images/generate?wait=30", {"prompt": "a cat"}, '"status":"completed"'),
        ("/mcp", {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": CALL}, '"status":"completed"'),
    ],
)
async def test_a_client_that_has_closed_its_own_side_gets_its_image(
    paid: Client, upstream: EmulatedUpstream, path: str, body: dict[str, Any], end: str
) -> None:
    upstream.script(HELD)
    async with half_closed(paid, "POST", path, body) as reader:
        await upstream.ledger.wait_for(lambda ledger: ledger.total == 1)
        begun = await asyncio.wait_for(reader.readline(), 30)  # so that the wait was long enough for a probe
        upstream.release()
        text = await read_to_end(reader)
    assert begun == b"HTTP/1.1 100 Continue\r\n"
    assert "HTTP/1.1 200 OK" in text
    assert end in text.replace(" ", "")


async def test_a_client_that_has_closed_its_own_side_gets_the_events_to_the_last(
    paid: Client, upstream: EmulatedUpstream
) -> None:
    upstream.script(HELD)
    submitted = await (await paid.post("/api/images/generate", json={"prompt": "a cat"})).json()
    async with half_closed(paid, "GET", f"/api/images/{submitted['taskId']}/events") as reader:
        await asyncio.wait_for(reader.readuntil(b"\r\n:\r\n"), 30)  # a comment line shows that the client is there
        await upstream.ledger.wait_for(lambda ledger: ledger.total == 1)
        upstream.release()
        assert "event: completed" in await read_to_end(reader)


async def test_an_equal_call_while_a_client_may_have_left_joins_it_and_pays_nothing(
    paid: Client, upstream: EmulatedUpstream
) -> None:
    upstream.script(HELD)
    async with half_closed(paid, "POST", "/v1/images/generations", BODY) as reader:
        await asyncio.wait_for(reader.readline(), 30)
        repeat = asyncio.create_task(paid.post("/v1/images/generations", json=BODY))
        await upstream.ledger.wait_for(lambda ledger: ledger.total == 1)
        upstream.release()
        images = [
            json.loads((await read_to_end(reader)).rpartition("\r\n")[2])["id"],
            (await (await repeat).json())["id"],
        ]
    assert images[0] == images[1]
    assert len(upstream.ledger.paid) == 1
