"""Fixtures of the web tests: whole services in this process, on one Redis, over real connections."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from imagegen.app import QUEUE, create_app
from imagegen.settings import Settings
from tests.edge_server import EdgeServer
from tests.emulator_fixtures import EmulatedUpstream
from tests.quick_drawing import draw_quickly
from tests.support import ADMIN_TOKEN, Clock, eventually
from tests.web.api_keys import KEYS

Client = TestClient[web.Request, web.Application]
StartService = Callable[..., Awaitable[Client]]
StartTwo = Callable[..., Awaitable[tuple[Client, Client]]]
WaitForDiscovery = Callable[..., Awaitable[None]]


@pytest.fixture(scope="module", autouse=True)
def _quick_drawings() -> Iterator[None]:
    with draw_quickly():
        yield


@pytest.fixture
def clock() -> Clock:
    return Clock()


@asynccontextmanager
async def open_services(redis_url: str, prefix: str, folder: Path) -> AsyncIterator[StartService]:
    """Yield the function of the fixture `start_service`; end its services at the exit."""
    defaults: dict[str, Any] = {
        "redis_url": redis_url,
        "redis_prefix": prefix,
        "data_dir": folder,
        "admin_token": ADMIN_TOKEN,
        "provider": "sandbox",
        "sandbox_delay_s": 0.02,
        "retry_base_s": 0.05,
        "rate_limit_max": 0,
        "image_rate_limit_max": 0,
        "log_level": "WARNING",
    }
    async with AsyncExitStack() as stack:

        async def start(*, port: int | None = None, **overrides: Any) -> Client:
            client = TestClient(EdgeServer(create_app(Settings(**defaults | overrides)), port=port))
            await client.start_server()
            stack.push_async_callback(client.close)
            return client

        yield start


@pytest.fixture
async def start_service(redis_url: str, prefix: str, tmp_path: Path) -> AsyncIterator[StartService]:
    """Start services that share one queue and one folder: `await start_service(sandbox_delay_s=1.0)`.

    Overrides are fields of Settings. The sandbox draws, nothing is limited, and `client.app` is the application.
    `await client.close()` ends one before the test does; another with its `port` takes its place.
    """
    async with open_services(redis_url, prefix, tmp_path) as start:
        yield start


@pytest.fixture
async def service(start_service: StartService) -> Client:
    """Start one service with the defaults of `start_service`."""
    return await start_service()


@pytest.fixture
async def upstream() -> AsyncIterator[EmulatedUpstream]:
    """Start the emulator of Together; its ledger records paid calls."""
    async with EmulatedUpstream() as upstream:
        yield upstream


@pytest.fixture
def start_paid(start_service: StartService, upstream: EmulatedUpstream) -> StartService:
    """Start services as `start_service` does, with `upstream` instead of the sandbox."""
    return partial(
        start_service, provider="together", together_api_key="any", together_api_url=upstream.url, max_attempts=2
    )


@pytest.fixture
async def paid(start_paid: StartService) -> Client:
    """Start one service with the defaults of `start_paid`."""
    return await start_paid()


@pytest.fixture
def start_two(start_service: StartService) -> StartTwo:
    """Start two services that have discovered each other."""

    async def start(**overrides: Any) -> tuple[Client, Client]:
        client_a, client_b = await start_service(**overrides), await start_service(**overrides)
        await wait_until_discovered(client_a, client_b)
        return client_a, client_b

    return start


async def wait_until_discovered(*clients: Client) -> None:
    for client in clients:
        await eventually(partial(_has_peers, client))


def _has_peers(client: Client) -> bool:
    return bool(client.app[QUEUE].notifier.peers)


@pytest.fixture
def wait_for_discovery() -> WaitForDiscovery:
    """Wait until each of these services has discovered another."""
    return wait_until_discovered


@dataclass
class Receiver:
    """A receiver of webhooks, with what it received."""

    url: str = ""
    received: list[tuple[dict[str, str], bytes]] = field(default_factory=list)

    async def take(self, request: web.Request) -> web.Response:
        self.received.append((dict(request.headers), await request.read()))
        return web.Response()

    async def wait_for(self, count: int) -> None:
        """Wait until there are so many webhooks; fail if there are more."""
        await eventually(lambda: len(self.received) >= count)
        assert len(self.received) == count


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    receiver = Receiver()
    app = web.Application()
    app.router.add_post("/hook", receiver.take)
    async with TestServer(app) as server:
        receiver.url = str(server.make_url("/hook"))
        yield receiver


@pytest.fixture
async def keyed(start_service: StartService) -> Client:
    """Start a service with two keys of the settings."""
    return await start_service(api_keys=KEYS)
