"""Fixtures of the `/v1` tests: the service in front of the emulated upstream."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from aiohttp import ClientResponse, web
from aiohttp.test_utils import TestClient

from tests.emulator_fixtures import EmulatedUpstream

Client = TestClient[web.Request, web.Application]


class Service:
    """Running service. url: without a trailing slash; app: for tests that inspect the application."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self.url = str(client.make_url("/")).rstrip("/")
        self.app = client.app

    async def generate(
        self, headers: dict[str, str] | None = None, path: str = "/v1/images/generations", **body: object
    ) -> ClientResponse:
        """Return the response to a POST, with its body read."""
        return await self.request("POST", path, json={"prompt": "a cat"} | body, headers=headers)

    async def request(self, method: str, path: str, **options: Any) -> ClientResponse:
        """Return a response, with its body read."""
        response = await self.begin(method, path, **options)
        await response.read()
        return response

    async def begin(self, method: str, path: str, **options: Any) -> ClientResponse:
        """Return a response as soon as its head is there."""
        return await self._client.request(method, path, **options)

    async def close(self) -> None:
        await self._client.close()

    async def fetch_image(self, url: str) -> bytes:
        response = await self.request("GET", url.removeprefix(self.url))
        assert response.status == 200
        return await response.read()


@pytest.fixture
async def emulator() -> AsyncIterator[EmulatedUpstream]:
    """Start an upstream that answers with tiny images."""
    async with EmulatedUpstream(image="tiny") as emulator:
        yield emulator


Serve = Callable[..., Awaitable[Service]]


@pytest.fixture
def serve(start_paid: Callable[..., Awaitable[Client]]) -> Serve:
    """Start services with any settings: `serve(max_attempts=1, …)`."""

    async def start(**overrides: Any) -> Service:
        return Service(await start_paid(**overrides))

    return start


@pytest.fixture
async def service(serve: Serve) -> Service:
    return await serve()


@pytest.fixture
async def editing(serve: Serve, emulator: EmulatedUpstream) -> Service:
    """Start a service in front of an upstream that takes edits as OpenAI does."""
    return await serve(provider="openai", openai_api_url=f"{emulator.url}/v1", openai_api_key="k", max_attempts=1)
