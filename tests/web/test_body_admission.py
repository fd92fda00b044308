"""Tests of many large bodies at the same time: their memory is bounded, and none of them delays other clients."""

from __future__ import annotations

import asyncio
import importlib
import json
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import pytest

from imagegen.errors import TooManyConnections
from imagegen.web.http import body_admission
from imagegen.web.http.body_admission import BodyAdmission
from tests.support import ADMIN_TOKEN, Turns, eventually
from tests.web.conftest import Client, StartService


async def test_bodies_wait_for_memory_in_the_order_in_which_they_come() -> None:
    admission = BodyAdmission(100, wait_s=60)
    await admission.reserve(80)
    waiting = [asyncio.create_task(admission.reserve(size)) for size in (90, 20)]
    await asyncio.sleep(0)
    admission.give(80)
    await waiting[0]
    assert not waiting[1].done()
    admission.give(90)
    await waiting[1]


async def test_a_body_is_refused_after_a_long_wait_and_at_once_if_many_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    admission = BodyAdmission(100, wait_s=0.01)
    await admission.reserve(80)
    with pytest.raises(TooManyConnections):
        await admission.reserve(80)
    with pytest.raises(TooManyConnections):
        admission.reserve_more(80)
    monkeypatch.setattr(body_admission, "MAX_WAITING", 0)
    with pytest.raises(TooManyConnections) as refused:
        await admission.reserve(10)
    assert refused.value.headers == {"Retry-After": "5"}


@pytest.fixture
async def small(start_service: StartService, monkeypatch: pytest.MonkeyPatch) -> Client:
    """Start a service with memory for large bodies of 150,000 bytes."""
    monkeypatch.setattr("imagegen.web.routes.BodyAdmission", partial(BodyAdmission, 150_000, wait_s=1.0))
    return await start_service()


@contextmanager
def connections(service: Client, count: int) -> Iterator[list[socket.socket]]:
    with ExitStack() as stack:
        yield [stack.enter_context(socket.create_connection((service.host, service.port))) for _ in range(count)]


def request(path: str, body: bytes, *framing: str, kind: str = "application/json") -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: a", f"Content-Type: {kind}", *framing, "", ""]
    return "\r\n".join(lines).encode() + body


FORM = b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n'


@pytest.mark.parametrize(
    ("path", "framing", "start"),
    [
        ("/api/images/generate", "Content-Length: 599000", b'{"prompt":"'),
        ("/api/images/generate", "Transfer-Encoding: chunked", b"80000\r\n" + b" " * 1_000),
        ("/mcp", "Content-Length: 599000", b'{"prompt":"'),
        ("/api/admin/keys", "Content-Length: 599000", b'{"name":"'),
        ("/api/admin/keys", "Transfer-Encoding: chunked", b"80000\r\n" + b" " * 1_000),
        ("/v1/images/edits", "Content-Length: 599000", FORM),
        ("/v1/images/edits", "Transfer-Encoding: chunked", b"80000\r\n" + FORM),
    ],
)
async def test_stalled_bodies_take_no_more_than_the_memory_for_all(
    small: Client, path: str, framing: str, start: bytes
) -> None:
    large = {"prompt": "p" * 32_000, "negativePrompt": "n" * 32_000}

    async def status(body: dict[str, Any]) -> int:
        async with small.post("/api/images/generate", json=body) as response:
            if response.status == 503:
                assert (await response.json())["code"] == "too_many_connections"
                assert response.headers["Retry-After"] == "5"
            return response.status

    with connections(small, 1) as (stalled,):
        stalled.setblocking(False)
        kind = "multipart/form-data; boundary=b" if FORM in start else "application/json"
        head = request(path, start, framing, f"Authorization: Bearer {ADMIN_TOKEN}", kind=kind)
        await asyncio.get_running_loop().sock_sendall(stalled, head)

        async def is_refused() -> bool:
            return await status(large) == 503

        await eventually(is_refused)
        assert await status({"prompt": "a small one"}) == 202

    async def is_accepted() -> bool:
        return await status(large) in (200, 202)

    await eventually(is_accepted)


@pytest.mark.parametrize(
    ("path", "body", "parser", "per_turn"),
    [
        ("/api/images/generate", {"prompt": "p", "negativePrompt": "n" * 30_000}, "submitter.parse_object", 32),
        ("/api/images/generate", {f"f{number}": 1 for number in range(3_000)}, "submitter.parse_object", 2),
        ("/api/admin/keys", {f"f{number}": 1 for number in range(3_000)}, "ops.key_routes.parse_object", 2),
        ("/v1/images/generations/async", {"prompt": "p" * 30_000}, "openai.generations.parse_object", 32),
        ("/api/images/batch", {"requests": [{"prompt": "p"}] * 20}, "api.batch.submit_parsed", 40),
    ],
)
async def test_few_of_many_bodies_that_are_complete_at_once_are_handled_in_one_turn(
    service: Client, monkeypatch: pytest.MonkeyPatch, path: str, body: object, parser: str, per_turn: int
) -> None:
    calls: list[object] = []
    module, _, name = f"imagegen.web.{parser}".rpartition(".")
    parse = getattr(importlib.import_module(module), name)

    def count_and_parse(*args: Any) -> Any:
        calls.append(args)
        return parse(*args)

    monkeypatch.setattr(f"{module}.{name}", count_and_parse)
    data = json.dumps(body).encode()
    with connections(service, 80) as clients:
        turns = Turns(lambda: len(calls))
        for client in clients:
            client.sendall(request(path, data, f"Content-Length: {len(data)}", f"Authorization: Bearer {ADMIN_TOKEN}"))
        await eventually(lambda: len(calls) >= 80)
        assert turns.most() <= per_turn
