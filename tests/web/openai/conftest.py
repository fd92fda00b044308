"""Owns the fixtures of the tests of `/v1`: the service in front of the emulated upstream, asked as its clients do."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiohttp import ClientResponse, web
from aiohttp.test_utils import TestClient

Client = TestClient[web.Request, web.Application]


class Service:
    """url: without a slash at the end; app: for what a test has to look at from inside."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self.url = str(client.make_url("/")).rstrip("/")
        self.app = client.app

    async def generate(
        self, headers: dict[str, str] | None = None, path: str = "/v1/images/generations", **body: object
    ) -> ClientResponse:
        """The answer to a POST, its body read."""
        return await self.ask("POST", path, json={"prompt": "a cat"} | body, headers=headers)

    async def ask(self, method: str, path: str, **options: Any) -> ClientResponse:
        response = await self._client.request(method, path, **options)
        await response.read()
        return response

    async def picture(self, url: str) -> bytes:
        response = await self.ask("GET", url.removeprefix(self.url))
        assert response.status == 200
        return await response.read()


Serve = Callable[..., Awaitable[Service]]


@pytest.fixture
def serve(start_paid: Callable[..., Awaitable[Client]]) -> Serve:
    """Starts services with any settings: `serve(max_attempts=1, …)`."""

    async def start(**overrides: Any) -> Service:
        return Service(await start_paid(**overrides))

    return start


@pytest.fixture
async def service(serve: Serve) -> Service:
    return await serve()
