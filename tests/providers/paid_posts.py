"""Paid POSTs to servers on loopback with scripted responses."""

import asyncio
from collections.abc import Awaitable
from typing import Any

import aiohttp
from yarl import URL

from imagegen.providers.input_bodies import StreamedBody
from imagegen.providers.post import PaidPost, RawResponse
from tests.emulated_jobs import Recorder
from tests.providers.conftest import RawServer, ReadRequest

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX-Seen: yes\r\n\r\nok"


def post(session: aiohttp.ClientSession, url: str, timeout_s: float = 30.0, **headers: Any) -> PaidPost:
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


ANSWER = b'{"data":[{"url":"https://h/1.png"}]}'
