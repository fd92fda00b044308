"""Routes through the code: one submit, and one task from its claim to its end, with the figures of the code's shape."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from types import CodeType, FrameType

from aiohttp import web

import imagegen
from bench.code_figures import show_figures
from bench.http import GENERATE
from bench.imagehost import Host, Serving
from bench.report import Options, Table, command
from bench.servers import RedisServer
from imagegen import log
from imagegen.app import create_app
from imagegen.queue.instance import QueueConfig, open_queue
from imagegen.redis_client.connection import Connection
from imagegen.settings import Settings
from imagegen.tasks.request import GenerationRequest
from imagegen.tasks.submission import Submission
from imagegen.web.handler_services import SERVICES
from imagegen.web.http.server import ImagegenRunner

PACKAGE = Path(imagegen.__file__).parent
IMAGE_BYTES = 92_000
BLOCKERS = 3
"""Tasks that occupy the only slot and both of its loops, so that a submit starts no claim."""

SUBMITS = 15
"""Recorded submits. A background loop that a slow machine runs within three of them is not in all of these."""

GOAL_FILES, GOAL_CHANGES = 24, 45
POLL_S = 0.02


class Recorder:
    """Record of the package's functions in the order of their calls, in all threads that start after `install`."""

    def __init__(self) -> None:
        self._calls: list[CodeType] | None = None
        self._root = str(PACKAGE) + os.sep

    def install(self) -> None:
        threading.setprofile(self._on_event)
        sys.setprofile(self._on_event)

    def remove(self) -> None:
        threading.setprofile(None)
        sys.setprofile(None)

    def start(self) -> None:
        self._calls = []

    def stop(self) -> list[CodeType]:
        """Return each function once, in the order of the first calls."""
        calls, self._calls = self._calls or [], None
        return list(dict.fromkeys(calls))

    def _on_event(self, frame: FrameType, event: str, _argument: object) -> None:
        code = frame.f_code
        if event != "call" or self._calls is None or not code.co_filename.startswith(self._root):
            return
        if code.co_name == "<lambda>" or not code.co_name.startswith("<"):  # a comprehension is part of its function
            self._calls.append(code)


def file_of(code: CodeType) -> str:
    return Path(code.co_filename).relative_to(PACKAGE).as_posix()


def common(runs: Sequence[list[CodeType]]) -> list[CodeType]:
    """Return the functions that every run called, in the order of the last run; a background loop is in some only."""
    shared = set(runs[0]).intersection(*runs[1:])
    return [code for code in runs[-1] if code in shared]


def file_changes(route: Iterable[CodeType]) -> int:
    return sum(before != after for before, after in pairwise(map(file_of, route)))


def show_route(title: str, route: Sequence[CodeType], options: Options) -> None:
    """Print the functions, a line for each stay in a file, and the two counts."""
    table = Table(title, "file", "functions")
    stays: list[tuple[str, list[str]]] = []
    for code in route:
        name = code.co_qualname.replace(".<locals>", "")
        if stays and stays[-1][0] == file_of(code):
            stays[-1][1].append(name)
        else:
            stays.append((file_of(code), [name]))
    for file, names in stays:
        table.add(file, ", ".join(names))
    files = len({file for file, _ in stays})
    table.show(
        command("trace", options),
        f"{len(route)} functions in {files} files with {file_changes(route)} changes of file"
        f" (goal for a submit: at most {GOAL_FILES} files, {GOAL_CHANGES} changes).",
    )


@asynccontextmanager
async def running(settings: dict[str, str]) -> AsyncIterator[tuple[web.Application, int]]:
    """Run the service in this process; yields it and its port."""
    limits = {"RATE_LIMIT_MAX": "0", "IMAGE_RATE_LIMIT_MAX": "0", "LOG_LEVEL": "WARNING", "WORKER_CONCURRENCY": "1"}
    log.configure("WARNING", "text")  # the access log is not part of a route
    app = create_app(Settings.load(limits | settings, None))
    runner = ImagegenRunner(app)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        yield app, runner.addresses[0][1]
    finally:
        await runner.cleanup()


class Client:
    """HTTP client that runs no code of the package."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    async def submit(self, prompt: str) -> None:
        """Submit a task. Raises RuntimeError if it is refused."""
        body = json.dumps({"prompt": prompt})
        head = f"POST {GENERATE} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        self._writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        answer = (await self._reader.readuntil(b"\r\n\r\n")).lower()
        length = answer.partition(b"content-length:")[2].partition(b"\r\n")[0]
        await self._reader.readexactly(int(length))
        if b" 202 " not in answer.partition(b"\r\n")[0]:
            raise RuntimeError(f"the submit was refused: {answer!r}")


async def trace_submits(recorder: Recorder, redis_url: str, folder: str) -> list[list[CodeType]]:
    """Record submits of new tasks while the only slot is occupied."""
    settings = {"REDIS_URL": redis_url, "DATA_DIR": folder, "REDIS_PREFIX": "submits", "SANDBOX_DELAY": "3600"}
    routes = []
    async with running(settings) as (_, port):
        client = Client(*await asyncio.open_connection("127.0.0.1", port))
        for number in range(BLOCKERS + 1):
            await client.submit(f"a lighthouse {number}")
        for number in range(SUBMITS):
            recorder.start()
            await client.submit(f"a fox {number}")
            routes.append(recorder.stop())
    return routes


def enqueue(url: str, submission: Submission) -> None:
    """Submit from another thread, which is not recorded, as another instance does."""

    async def submit() -> None:
        connection = Connection(url, prefix="claims")
        config = QueueConfig("claims", 30.0, 600.0, 600.0, max_queue=100)
        try:
            await open_queue(connection, config, instance="other").client_queue.submit(submission)
        finally:
            await connection.close()

    def run() -> None:
        sys.setprofile(None)
        asyncio.run(submit())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()


async def trace_claims(recorder: Recorder, server: RedisServer, folder: str, runs: int) -> list[list[CodeType]]:
    """Record tasks from the claim to the end: a call of an upstream that answers with a link, and a saved image."""
    host = Host(IMAGE_BYTES, "link", 1)
    upstream = await asyncio.get_running_loop().create_server(lambda: Serving(host), "127.0.0.1", 0)
    host.address = f"http://127.0.0.1:{upstream.sockets[0].getsockname()[1]}"
    settings = {"REDIS_URL": server.url, "DATA_DIR": folder, "REDIS_PREFIX": "claims"}
    settings |= {"TOGETHER_API_KEY": "key", "TOGETHER_API_URL": host.address}
    routes = []
    async with upstream, running(settings) as (app, _):
        for number in range(runs + 1):
            request = GenerationRequest(prompt=f"an owl {number}", model="m", width=512, height=512, n=1)
            submission = app[SERVICES].identity.submission(request, None)
            recorder.start()
            await asyncio.to_thread(enqueue, server.url, submission)
            while server.unfinished("claims"):  # noqa: ASYNC110 - observed in Redis
                await asyncio.sleep(POLL_S)
            await asyncio.sleep(POLL_S)
            routes.append(recorder.stop())
    return routes[1:]


async def trace(options: Options) -> tuple[list[CodeType], list[CodeType]]:
    """Return the routes of a submit and of a claim."""
    recorder = Recorder()
    recorder.install()
    try:
        with RedisServer() as server, tempfile.TemporaryDirectory(prefix="imagegen-bench-") as folder:
            submits = await trace_submits(recorder, server.url, folder)
            claims = await trace_claims(recorder, server, folder, options.runs + 1)
    finally:
        recorder.remove()
    return common(submits), common(claims)


def main(options: Options) -> None:
    submit, claim = asyncio.run(trace(options))
    show_route("Route of one submit", submit, options)
    show_route("Route of one task from its claim to its end, image by link, IMAGE_STORE=disk", claim, options)
    if not options.tiny:
        show_figures(options)
