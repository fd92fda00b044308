"""The official client of MCP against the service: both wires, over HTTP and over stdio."""

from __future__ import annotations

import sys

import pytest
from mcp import Client, StdioServerParameters, stdio_client
from service.running import RUN

ROOT = RUN.parent


@pytest.fixture(scope="module")
def service(start_for_module):
    return start_for_module(SANDBOX_DELAY="0.3")


@pytest.mark.parametrize("mode", ["auto", "legacy"])
@pytest.mark.parametrize("transport", ["http", "stdio"])
async def test_the_official_client_makes_images(service, mode: str, transport: str) -> None:
    seen: list[float] = []

    async def progress(value: float, total: float | None, text: str | None) -> None:
        seen.append(value)

    arguments = ["-m", "imagegen", "mcp", "--url", service.url]
    command = StdioServerParameters(command=sys.executable, args=arguments, cwd=ROOT)
    async with Client(f"{service.url}/mcp" if transport == "http" else stdio_client(command), mode=mode) as client:
        names = [tool.name for tool in (await client.list_tools()).tools]
        assert names[0] == "generate_image"
        wanted = {"prompt": f"a fox {mode} {transport}", "width": 64, "height": 64}
        found = await client.call_tool("generate_image", wanted, progress_callback=progress)
        assert found.structured_content["status"] == "completed"
        assert {block.type for block in found.content} == {"text", "resource_link", "image"}
        refused = await client.call_tool("generate_image", wanted | {"width": 7})
        assert refused.is_error
    assert seen == sorted(set(seen))
    assert seen
