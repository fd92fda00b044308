"""The command `imagegen mcp`: the tools of agents on stdin and stdout, by a running service or by one in this process.

Each line is a message. It is sent to POST /mcp of the service, and what comes back is written as lines.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import orjson

from imagegen import log
from imagegen.errors import SettingsError
from imagegen.resolver import EventLoop
from imagegen.settings import Settings
from imagegen.standard_streams import open_null
from imagegen.web.mcp.error_responses import PATH
from imagegen.web.mcp.messages import INTERNAL_ERROR, PARSE_ERROR, RpcError, error_body
from imagegen.web.mcp.versions import METHOD_HEADER, NAME_HEADER, NAMED_PARAMS, VERSION_HEADER, VERSION_KEY, encode_name

USAGE = 2
MAX_LINE_BYTES = 64 * 1024 * 1024
TIMEOUT_S = 90.0


def run(chosen: argparse.Namespace) -> int:
    """Run the command until the client closes stdin; return its exit code."""
    log.configure("ERROR", "text")
    try:
        if chosen.key and not chosen.url:
            raise ValueError("--key is of no use without --url: the service in this process takes no key")
        address = None if chosen.url is None else _base_of(chosen.url)
        with asyncio.Runner(loop_factory=EventLoop) as runner:
            return runner.run(_serve(address, chosen.key))
    except (SettingsError, ValueError) as error:
        print(error, file=sys.stderr)  # noqa: T201 - stdout is for messages
        return USAGE


def _base_of(url: str) -> str:
    """Return the address of a service, also if its route of agents is named. Raises ValueError."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"--url: {url} is no http(s) address, such as http://127.0.0.1:3000")
    return url.rstrip("/").removesuffix(PATH).rstrip("/")


async def _serve(url: str | None, key: str | None) -> int:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with _service(url, key, stop) as (address, secret), _session() as session:
        bridge = Bridge(session, f"{address}{PATH}", secret)
        reading, stopping = asyncio.create_task(bridge.run()), asyncio.create_task(stop.wait())
        await asyncio.wait((reading, stopping), return_when=asyncio.FIRST_COMPLETED)
        for task in (reading, stopping):
            task.cancel()
        await asyncio.gather(reading, stopping, return_exceptions=True)
    return 0


def _session() -> aiohttp.ClientSession:
    """Return a session that takes a whole result as one line of an event stream."""
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    return aiohttp.ClientSession(timeout=timeout, read_bufsize=MAX_LINE_BYTES)


@asynccontextmanager
async def _service(url: str | None, key: str | None, stop: asyncio.Event) -> AsyncIterator[tuple[str, str | None]]:
    """Yield address and secret of the service at `url`, or of one in this process. Raises SettingsError."""
    if url is not None:
        yield url, key
        return
    from imagegen.local_service import run_local_service  # noqa: PLC0415 - a running service needs none of it

    async with run_local_service(Settings.load(), stop) as local:
        yield local.url, local.secret


@dataclass(slots=True)
class Bridge:
    """Sender of the lines of stdin to a service. version: that `initialize` agreed on, None before or without it."""

    session: aiohttp.ClientSession
    url: str
    key: str | None = field(repr=False)
    version: str | None = None
    running: dict[Any, asyncio.Task[None]] = field(default_factory=dict)

    async def run(self) -> None:
        """Read lines until the end of stdin, and finish the calls."""
        read_line = await _open_stdin()
        while line := await read_line():
            if line.strip():
                self._take(line)
        await asyncio.gather(*self.running.values(), return_exceptions=True)

    def _take(self, line: bytes) -> None:
        try:
            message = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            _write(error_body(RpcError(PARSE_ERROR, str(error))))
            return
        params = message.get("params") if isinstance(message, dict) else None
        params = params if isinstance(params, dict) else {}
        if isinstance(message, dict) and message.get("method") == "notifications/cancelled":
            waiting = self.running.get(str(params.get("requestId")))
            if waiting is not None:
                waiting.cancel()  # the wait ends, and the task goes on
        elif not isinstance(message, dict) or "id" in message:
            request_id = message.get("id") if isinstance(message, dict) else None
            task = asyncio.create_task(self._send(line, message if isinstance(message, dict) else {}, params))
            self.running[str(request_id)] = task
            task.add_done_callback(lambda _done: self.running.pop(str(request_id), None))

    def _headers(self, message: dict[str, Any], params: dict[str, Any]) -> dict[str, str]:
        headers = {"Content-Type": "application/json", "Accept": "application/json, text/event-stream"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        meta, method = params.get("_meta"), message.get("method")
        version = meta.get(VERSION_KEY) if isinstance(meta, dict) else None
        if isinstance(version, str) and isinstance(method, str):
            headers |= {VERSION_HEADER: version, METHOD_HEADER: encode_name(method)}
            name = params.get(NAMED_PARAMS.get(method, ""))
            if isinstance(name, str):
                headers[NAME_HEADER] = encode_name(name)
        elif self.version and method != "initialize":
            headers[VERSION_HEADER] = self.version
        return headers

    async def _send(self, line: bytes, message: dict[str, Any], params: dict[str, Any]) -> None:
        try:
            headers = self._headers(message, params)
            async with self.session.post(self.url, data=line.strip(), headers=headers) as response:
                if response.content_type == "text/event-stream":
                    await self._pass_events(response)
                elif body := await response.read():
                    _write(self._answer(response.status, body, message))
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            text = f"imagegen at {self.url} can't be reached ({type(error).__name__}): the same call can be repeated"
            _write(error_body(RpcError(INTERNAL_ERROR, text, request_id=message.get("id"))))

    async def _pass_events(self, response: aiohttp.ClientResponse) -> None:
        """Write the messages of a stream. Raises ClientPayloadError if it ends without the response."""
        last = b""
        async for event in response.content:
            if event.startswith(b"data: "):
                last = event.removeprefix(b"data: ").strip()
                _write(last)
        if "id" not in orjson.loads(last or b"{}"):
            raise aiohttp.ClientPayloadError("the stream ended without a response")

    def _answer(self, status: int, body: bytes, message: dict[str, Any]) -> bytes:
        """Return the line for a response to a message."""
        try:
            answer = orjson.loads(body)
        except orjson.JSONDecodeError:
            answer = None
        if not isinstance(answer, dict) or "jsonrpc" not in answer:
            text = f"{self.url} has answered with status {status} and no message: is it the address of imagegen?"
            return error_body(RpcError(INTERNAL_ERROR, text, request_id=message.get("id")))
        if answer.get("id") is None:
            answer["id"] = message.get("id")
        if message.get("method") == "initialize" and isinstance(answer.get("result"), dict):
            self.version = answer["result"].get("protocolVersion")
        return orjson.dumps(answer)


async def _open_stdin() -> Callable[[], Awaitable[bytes]]:
    """Return the function that reads the next line, empty at the end."""
    reader = asyncio.StreamReader(limit=MAX_LINE_BYTES)
    try:
        protocol = asyncio.StreamReaderProtocol(reader)
        await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, sys.stdin)
    except ValueError:  # a file, which is never waited for
        return partial(asyncio.to_thread, sys.stdin.buffer.readline)
    return reader.readline


def _write(line: bytes) -> None:
    """Write a message. If the client is gone, running calls still finish: a repeat finds their tasks."""
    try:
        sys.stdout.buffer.write(line + b"\n")
        sys.stdout.buffer.flush()
    except OSError:
        sys.stdout = open_null()
