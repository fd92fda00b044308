"""Fixtures of the emulator tests: one running emulator and a plain client."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import aiohttp
import pytest

from tests.emulator_fixtures import EmulatedUpstream

MODEL = "black-forest-labs/FLUX.1-schnell"
Ask = Callable[..., Awaitable[aiohttp.ClientResponse]]


@pytest.fixture
async def upstream() -> AsyncIterator[EmulatedUpstream]:
    async with EmulatedUpstream(seed=1) as running:
        yield running


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=20)) as client:
        yield client


@pytest.fixture
def ask(upstream: EmulatedUpstream, session: aiohttp.ClientSession) -> Ask:
    """Post a generation and read the response's body."""

    async def send(prompt: str = "a cat", **fields: Any) -> aiohttp.ClientResponse:
        path = fields.pop("path", "/v1/images/generations")
        headers = fields.pop("headers", {"Authorization": "Bearer any"})
        body = {"model": MODEL, "prompt": prompt, "width": 64, "height": 64, **fields}
        async with session.post(upstream.url + path, json=body, headers=headers) as response:
            await response.read()
            return response

    return send


@pytest.fixture
def link(ask: Ask) -> Callable[[str], Awaitable[str]]:
    """Request one image and return its link."""

    async def get(prompt: str = "a cat", **fields: Any) -> str:
        return str((await (await ask(prompt, **fields)).json())["data"][0]["url"])

    return get
