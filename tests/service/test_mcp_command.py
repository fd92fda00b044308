"""Tests of the command `imagegen mcp`: each request of its client gets one response, whatever the service answers."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import orjson
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from tests import forked
from tests.mcp_wire import message, modern
from tests.service.running import RUN, environment

WORDS = ("-m", "imagegen", "mcp")
LARGE = "x" * 700_000


async def run(
    lines: Sequence[bytes], *arguments: str, env: dict[str, str] | None = None
) -> tuple[int, list[bytes], str]:
    """Return the exit code of the command after these lines, its messages, and its text on stderr."""
    process = await asyncio.create_subprocess_exec(
        *forked.command(*WORDS, *arguments),
        cwd=RUN.parent,
        env=env,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    output, errors = await asyncio.wait_for(process.communicate(b"".join(line + b"\n" for line in lines)), 60)
    return process.returncode or 0, output.splitlines(), errors.decode()


async def answer(request: web.Request) -> web.StreamResponse:
    """Answer as the method of the message says, never as a service of this kind does."""
    body = await request.json()
    match body["method"]:
        case "html":
            return web.Response(status=502, text="<html>Bad gateway</html>", content_type="text/html")
        case "list":
            return web.json_response([1])
        case "other":
            return web.json_response({"success": False}, status=404)
        case "nothing":
            return web.Response(body=b"null", content_type="application/json")
        case "headers":
            names = ("Authorization", "MCP-Protocol-Version", "Mcp-Method", "Mcp-Name")
            seen = {name: request.headers.get(name) for name in names}
            return web.json_response({"jsonrpc": "2.0", "id": body["id"], "result": seen})
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    await response.write(b'event: message\ndata: {"jsonrpc":"2.0","method":"notifications/progress"}\n\n')
    if body["method"] == "large":
        result = {"jsonrpc": "2.0", "id": body["id"], "result": {"text": LARGE}}
        await response.write(b"data: " + orjson.dumps(result) + b"\n\n")
    elif body["method"] == "lost":
        assert request.transport is not None
        request.transport.abort()
    return response  # a stream that ends without a response


@pytest.fixture
async def foreign() -> AsyncIterator[str]:
    """Serve answers of a server that is not ours, or that dies."""
    app = web.Application()
    app.router.add_post("/mcp", answer)
    server = TestServer(app)
    await server.start_server()
    yield str(server.make_url("")).rstrip("/")
    await server.close()


async def test_each_request_gets_one_response_whatever_the_service_answers(foreign: str) -> None:
    methods = ("html", "list", "other", "nothing", "ended", "lost", "large")
    bodies = {method: message(method) for method in methods}
    code, output, errors = await run([orjson.dumps(body) for body in bodies.values()], "--url", f"{foreign}/mcp/")
    assert (code, errors) == (0, "")
    answers = {found["id"]: found for line in output if "id" in (found := orjson.loads(line))}
    assert len(output) == len(answers) + 3, "and three notifications"
    assert answers.keys() == {body["id"] for body in bodies.values()}
    assert answers[bodies["large"]["id"]]["result"]["text"] == LARGE
    for method in methods[:-1]:
        assert answers[bodies[method]["id"]]["error"]["code"] == -32603, method
    assert "502" in answers[bodies["html"]["id"]]["error"]["message"]
    assert "can be repeated" in answers[bodies["lost"]["id"]]["error"]["message"]


async def test_the_headers_of_a_message_are_those_of_its_version(foreign: str) -> None:
    body = modern("headers")
    _, (line,), _ = await run([orjson.dumps(body)], "--url", foreign, "--key", "a-key")
    assert orjson.loads(line)["result"] == {
        "Authorization": "Bearer a-key",
        "MCP-Protocol-Version": "2026-07-28",
        "Mcp-Method": "headers",
        "Mcp-Name": None,
    }


async def test_a_service_that_is_away_is_an_error_of_each_request() -> None:
    code, (line,), errors = await run([orjson.dumps(message("ping"))], "--url", "http://127.0.0.1:9")
    assert (code, errors) == (0, "")
    assert "can't be reached" in orjson.loads(line)["error"]["message"]


async def test_the_calls_of_a_client_that_reads_no_more_are_made_all_the_same() -> None:
    received: list[str] = []

    async def record(request: web.Request) -> web.StreamResponse:
        received.append((await request.json())["method"])
        return await answer(request)

    app = web.Application()
    app.router.add_post("/mcp", record)
    async with TestServer(app) as server:
        reading, writing = os.pipe()
        process = await asyncio.create_subprocess_exec(
            *forked.command(*WORDS, "--url", str(server.make_url(""))),
            cwd=RUN.parent,
            stdin=asyncio.subprocess.PIPE,
            stdout=writing,
            stderr=asyncio.subprocess.PIPE,
        )
        os.close(writing)
        os.close(reading)
        lines = [b"no JSON", orjson.dumps(message("large")), b"no JSON", orjson.dumps(message("headers"))]
        _, errors = await asyncio.wait_for(process.communicate(b"\n".join(lines) + b"\n"), 60)
    assert (process.returncode, errors, sorted(received)) == (0, b"", ["headers", "large"])


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--url", "nonsense"), "--url: nonsense is no http(s) address"),
        (("--key", "a-key"), "--key is of no use without --url"),
    ],
    ids=("url", "key"),
)
async def test_wrong_options_end_the_command_with_a_text(arguments: tuple[str, ...], text: str) -> None:
    code, output, errors = await run([], *arguments)
    assert (code, output) == (2, [])
    assert text in errors
    assert "Traceback" not in errors


async def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    code, output, errors = await run([], env=environment(tmp_path, {"DATA_DIR": "/proc/nowhere"}))
    assert (code, output) == (2, [])
    assert errors.startswith("DATA_DIR: /proc/nowhere")


async def test_messages_may_come_from_a_file(foreign: str, tmp_path: Path) -> None:
    lines = tmp_path / "messages"
    lines.write_bytes(orjson.dumps(modern("headers")) + b"\n")
    with lines.open("rb") as file:
        process = await asyncio.create_subprocess_exec(
            *forked.command(*WORDS, "--url", foreign), cwd=RUN.parent, stdin=file, stdout=asyncio.subprocess.PIPE
        )
        output, _ = await asyncio.wait_for(process.communicate(), 60)
    assert (process.returncode, len(output.splitlines())) == (0, 1)
