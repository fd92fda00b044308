"""The official client of MCP against the service: both wires, over HTTP and over stdio, with and without a service."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from mcp import Client, StdioServerParameters, stdio_client

from tests import forked
from tests.service.conftest import StartService
from tests.service.running import RUN, Service, environment
from tests.support import eventually

WIRES = [(mode, transport) for mode in ("auto", "legacy") for transport in ("http", "stdio")]
TOOLS = [
    "generate_image",
    "edit_image",
    "get_image_task",
    "cancel_image_task",
    "list_image_models",
    "quote_image",
]

pytestmark = pytest.mark.timeout(120)
each_wire = pytest.mark.parametrize(("mode", "transport"), WIRES, ids=lambda part: part)


@pytest.fixture(scope="module")
def service(start_for_module: StartService) -> Service:
    return start_for_module(SANDBOX_DELAY="0.3")


@pytest.fixture(scope="module")
def slow(start_for_module: StartService, tmp_path_factory: pytest.TempPathFactory) -> Service:
    return start_for_module(home=tmp_path_factory.mktemp("slow"), SANDBOX_DELAY="60")


def command(*arguments: str, env: Mapping[str, str] | None = None, folder: Path = RUN.parent) -> StdioServerParameters:
    program, *words = forked.command("-m", "imagegen", "mcp", *arguments)
    return StdioServerParameters(command=program, args=words, env=dict(env) if env else None, cwd=folder)


def client_of(service: Service, mode: str, transport: str) -> Client:
    server: Any = f"{service.url}/mcp" if transport == "http" else stdio_client(command("--url", service.url))
    return Client(server, mode=mode)


async def use_all_tools(client: Client, prompt: str) -> None:
    """Use the tools as an agent does; each structured result is checked against the schema that the client got."""
    schemas = {tool.name: tool.output_schema for tool in (await client.list_tools()).tools}
    assert list(schemas) == TOOLS
    seen: list[float] = []

    async def record(progress: float, total: float | None, message: str | None) -> None:
        seen.append(progress)

    async def use(name: str, **arguments: Any) -> Any:
        found = await client.call_tool(name, arguments, progress_callback=record)
        jsonschema.validate(found.structured_content, schemas[name])
        return found

    wanted = {"prompt": prompt, "width": 64, "height": 64}
    quoted = await use("quote_image", **wanted)
    assert (quoted.structured_content["cached"], "refusal" in quoted.structured_content) == (False, False)
    made = await use("generate_image", **wanted)
    assert {block.type for block in made.content} == {"text", "resource_link", "image"}
    assert (made.structured_content["status"], made.structured_content["taskId"]) == (
        "completed",
        quoted.structured_content["taskId"],
    )
    assert seen == sorted(set(seen))
    assert seen
    again = await use("get_image_task", taskId=made.structured_content["taskId"], detail="full")
    assert again.content[-1].mime_type == "image/png"
    edited = await use("edit_image", **wanted, imageUrl=made.structured_content["urls"][0])
    assert edited.structured_content["status"] == "completed"
    kept = await use("cancel_image_task", taskId=made.structured_content["taskId"])
    assert kept.structured_content["status"] == "completed"
    assert (await use("list_image_models")).structured_content["models"]
    refused = await use("generate_image", **wanted | {"width": 7})
    assert (refused.is_error, refused.structured_content["status"]) == (True, "refused")


@each_wire
async def test_the_official_client_uses_all_tools(service: Service, mode: str, transport: str) -> None:
    async with client_of(service, mode, transport) as client:
        await use_all_tools(client, f"a fox {mode} {transport}")


@pytest.mark.parametrize(("mode", "transport"), [("auto", "http"), ("legacy", "stdio")])
async def test_the_official_client_cancels_a_task_that_another_call_waits_for(
    slow: Service, mode: str, transport: str
) -> None:
    wanted = {"prompt": f"a hen {mode} {transport}", "width": 64, "height": 64}
    async with client_of(slow, mode, transport) as client:
        waiting = asyncio.create_task(client.call_tool("generate_image", wanted))
        task_id = (await client.call_tool("quote_image", wanted)).structured_content["taskId"]

        async def is_submitted() -> bool:
            return (await client.call_tool("quote_image", wanted)).structured_content["joins"] is True

        await eventually(is_submitted)
        gone = await client.call_tool("cancel_image_task", {"taskId": task_id})
        assert gone.structured_content["status"] == "cancelled"
        assert (await waiting).structured_content["status"] == "cancelled"
        assert (await client.call_tool("get_image_task", {"taskId": task_id})).structured_content[
            "status"
        ] == "cancelled"


@pytest.mark.parametrize("mode", ["auto", "legacy"])
async def test_the_command_needs_no_service(tmp_path: Path, mode: str) -> None:
    env = environment(tmp_path, {"PROVIDER": "sandbox"})
    async with Client(stdio_client(command(env=env)), mode=mode) as client:
        await use_all_tools(client, f"alone {mode}")


COMMAND = "/path/to/.venv/bin/imagegen"
README = {name: (RUN.parent / name).read_text() for name in ("README.md", "README.zh-CN.md")}


def documented(name: str) -> list[dict[str, Any]]:
    """Return the entries of the configurations of clients in a README."""
    lines = re.findall(r'`(\{"(?:mcpServers|servers)".*?\})`', README[name])
    return [next(iter(servers.values())) for line in lines for servers in json.loads(line).values()]


def test_both_readmes_have_the_same_configurations() -> None:
    english, chinese = map(documented, README)
    assert english == chinese
    assert {entry["url"] for entry in english if "url" in entry} == {"http://127.0.0.1:3000/mcp"}
    assert [entry["args"][0] for entry in english if entry.get("command") == COMMAND] == ["mcp", "mcp"]
    assert all(f"claude mcp add imagegen -- {COMMAND} mcp" in text for text in README.values())


async def test_the_commands_of_the_readme_start_as_a_client_starts_them(service: Service, tmp_path: Path) -> None:
    real = {"http://127.0.0.1:3000": service.url, "/path/to/data": str(tmp_path / "data")}
    for entry in documented("README.md"):
        if "command" not in entry:
            continue
        settings = {name: real.get(value, value) for name, value in entry.get("env", {}).items()}
        words = [real.get(word, word) for word in entry["args"][1:]]
        env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)} | settings
        started = command(*words, env=env, folder=tmp_path)
        if "--url" in words:  # one by a new Python, which must find all that it imports
            started.command, started.args = sys.executable, ["-m", "imagegen", "mcp", *words]
        async with Client(stdio_client(started)) as client:
            found = await client.call_tool("generate_image", {"prompt": "as documented", "width": 64, "height": 64})
            assert found.structured_content["status"] == "completed"


def test_the_command_ends_with_its_client_and_writes_messages_only(tmp_path: Path) -> None:
    env = environment(tmp_path, {"PROVIDER": "sandbox"})
    lines = b'{"jsonrpc":"2.0","id":1,"method":"ping"}\n\nno message\n{"jsonrpc":"2.0","method":"notifications/x"}\n'
    words = forked.command("-m", "imagegen", "mcp")
    ended = subprocess.run(words, input=lines, capture_output=True, env=env, cwd=RUN.parent, timeout=60, check=False)
    assert (ended.returncode, ended.stderr) == (0, b"")
    pong, invalid = sorted(ended.stdout.splitlines(), key=lambda line: b"error" in line)
    assert pong == b'{"jsonrpc":"2.0","id":1,"result":{}}'
    assert b'"code":-32700' in invalid
