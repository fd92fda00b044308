"""Tests of the head of a response to a paid POST: odd and slow ones, informational ones, and what is not HTTP."""

import asyncio

import aiohttp
import pytest
from aiohttp.http import HttpProcessingError

from tests.emulated_jobs import Recorder
from tests.providers.conftest import RawServer, ReadRequest
from tests.providers.paid_posts import ANSWER, OK, send


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
