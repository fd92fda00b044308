"""Tests of client packages for Node: `openai`, and Vercel's AI SDK with its OpenAI and Together providers."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import image_bytes
from tests.emulator_fixtures import EmulatedUpstream
from tests.npm_packages import ROOT, installed_packages
from tests.web.openai.conftest import Serve, Service

FOLDER = ROOT / "tests" / "npm"

_RUN_S = 180.0
_END_S = 10.0

pytestmark = pytest.mark.timeout(400)  # the first run has to install the packages


class Node:
    """Process with the packages."""

    def __init__(self, place: Path) -> None:
        self._process = subprocess.Popen(
            ["node", "clients.mjs"], cwd=place, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    async def run(self, *calls: dict[str, Any], at_once: bool = False) -> list[dict[str, Any]]:
        """Return the result of each call."""
        async with asyncio.timeout(_RUN_S):
            return await asyncio.to_thread(self._exchange, json.dumps({"calls": calls, "atOnce": at_once}))

    def close(self) -> None:
        self._process.communicate(timeout=_END_S)

    def _exchange(self, line: str) -> list[dict[str, Any]]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return list(json.loads(self._process.stdout.readline()))


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    node = Node(installed_packages(FOLDER))
    yield node
    node.close()


@pytest.fixture
async def editing(serve: Serve, emulator: EmulatedUpstream) -> Service:
    """Start a service in front of an upstream that takes edits as OpenAI does."""
    service: Service = await serve(provider="openai", openai_api_url=f"{emulator.url}/v1", openai_api_key="k")
    return service


def call(service: Service, client: str = "openai", **more: Any) -> dict[str, Any]:
    fields = {"model": "some-model", "prompt": "a cat", "size": "512x256"} | more.pop("fields", {})
    return {"client": client, "base": f"{service.url}/v1", "options": {}, "fields": fields} | more


def image_file(colour: Any) -> str:
    return base64.b64encode(image_bytes.image_file(colour, mode="RGBA")).decode()


def sha256(file: str) -> str:
    return hashlib.sha256(base64.b64decode(file)).hexdigest()


RED, GREEN, BLUE, MASK = [image_file(colour) for colour in ("red", "green", "blue", (0, 0, 0, 0))]
VERCEL = ("vercel", "togetherai")


async def test_openai_generates_links_and_bytes(node: Node, service: Service, upstream: EmulatedUpstream) -> None:
    bodies: tuple[dict[str, Any], ...] = ({}, {"response_format": "b64_json"})
    linked, encoded = await node.run(*(call(service, fields={"n": 2, "seed": 1} | body) for body in bodies))
    digests = [hashlib.sha256(await service.fetch_image(link)).hexdigest() for link in linked["images"]]
    assert (linked["ids"], digests) == (encoded["ids"], encoded["images"])
    assert upstream.ledger.total == 1


async def test_four_equal_calls_of_openai_are_four_images(
    node: Node, service: Service, upstream: EmulatedUpstream
) -> None:
    results = await node.run(*[call(service)] * 4, at_once=True)
    assert len({id_ for result in results for id_ in result["ids"]}) == 4
    assert upstream.ledger.paid_total == 4


async def test_openai_with_a_short_timeout_pays_once(node: Node, service: Service, upstream: EmulatedUpstream) -> None:
    upstream.script({"fault": "ok", "delay_s": 1.5})
    (result,) = await node.run(call(service, options={"timeout": 800, "maxRetries": 20}))
    assert (len(result["images"]), upstream.ledger.total) == (1, 1)


async def test_openai_streams(node: Node, service: Service, upstream: EmulatedUpstream) -> None:
    (result,) = await node.run(call(service, fields={"stream": True, "partial_images": 1}))
    (event,) = result["events"]
    assert (event["type"], len(event["image"])) == ("image_generation.completed", 64)


async def test_openai_polls_an_asynchronous_task(node: Node, service: Service, upstream: EmulatedUpstream) -> None:
    upstream.script({"fault": "ok", "delay_s": 0.3})
    (result,) = await node.run(call(service, path="/images/generations/async"))
    assert (result["task"]["status"], result["task"]["http_status"]) == ("completed", 200)
    assert await service.fetch_image(result["task"]["image_url"])


async def test_openai_edits_one_image_and_three_with_a_mask(
    node: Node, editing: Service, emulator: EmulatedUpstream
) -> None:
    fields = {"size": "64x64"}
    one, three = await node.run(
        call(editing, fields=fields, images=[RED]), call(editing, fields=fields, images=[RED, GREEN, BLUE], mask=MASK)
    )
    assert (len(one["images"]), len(three["images"])) == (1, 1)
    inputs = [[file.sha256 for file in paid.inputs] for paid in emulator.ledger.paid]
    assert inputs == [[sha256(RED)], [sha256(file) for file in (RED, GREEN, BLUE, MASK)]]


@pytest.mark.parametrize("client", VERCEL)
async def test_vercel_makes_four_images_by_four_calls(
    node: Node, service: Service, upstream: EmulatedUpstream, client: str
) -> None:
    (result,) = await node.run(call(service, client, fields={"n": 4}))
    assert len(result["images"]) == 4
    assert upstream.ledger.paid_total == 4


async def test_vercel_gets_the_bytes_of_gpt_image_models(node: Node, editing: Service) -> None:
    """Its provider sends no `response_format` with these models, and reads nothing but `b64_json`."""
    (result,) = await node.run(call(editing, "vercel", fields={"model": "gpt-image-2", "size": "1024x1024"}))
    assert len(result.get("images", [])) == 1, result


@pytest.mark.parametrize("client", VERCEL)
async def test_the_retries_of_vercel_start_no_attempts(
    node: Node, service: Service, upstream: EmulatedUpstream, client: str
) -> None:
    upstream.script({"fault": "500", "times": 20})
    (result,) = await node.run(call(service, client, options={"maxRetries": 1}))
    assert (result["error"], result["status"]) == ("AI_APICallError", 502)
    assert upstream.ledger.total == 2


async def test_vercel_edits_images_with_a_mask(node: Node, editing: Service, emulator: EmulatedUpstream) -> None:
    edit = call(editing, "vercel", fields={"model": "gpt-image-2", "size": "1024x1024"}, images=[RED, GREEN], mask=MASK)
    (result,) = await node.run(edit)
    assert len(result["images"]) == 1
    (paid,) = emulator.ledger.paid
    assert [file.sha256 for file in paid.inputs] == [sha256(file) for file in (RED, GREEN, MASK)]


async def test_vercel_edits_an_image_at_together(node: Node, service: Service, upstream: EmulatedUpstream) -> None:
    """Its provider takes one image and no mask."""
    fields = {"model": "black-forest-labs/FLUX.1-kontext-pro"}
    (result,) = await node.run(call(service, "togetherai", fields=fields, images=[RED]))
    assert len(result.get("images", [])) == 1, result
    (paid,) = upstream.ledger.paid
    assert [file.sha256 for file in paid.inputs] == [sha256(RED)]
