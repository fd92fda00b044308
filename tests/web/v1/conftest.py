"""An upstream, and the whole service in front of it on a loopback port."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from aiohttp import ClientResponse, ClientSession, web
from emulated import EmulatedUpstream
from support import eventually

from imagegen.app import CONNECTION, create_app
from imagegen.settings import Settings
from imagegen.web.server import ImagegenRunner


class Service:
    """url: without a slash at the end; app: for what a test has to look at from inside."""

    def __init__(self, url: str, app: web.Application, session: ClientSession) -> None:
        self.url, self.app, self._session = url, app, session

    async def generate(
        self, headers: dict[str, str] | None = None, path: str = "/v1/images/generations", **body: object
    ) -> ClientResponse:
        """The answer to a POST, its body read."""
        return await self.ask("POST", path, json={"prompt": "a cat"} | body, headers=headers)

    async def ask(self, method: str, path: str, **options: object) -> ClientResponse:
        url = path if "://" in path else self.url + path
        async with self._session.request(method, url, **options) as response:  # type: ignore[arg-type]
            await response.read()
        return response

    async def picture(self, url: str) -> bytes:
        async with self._session.get(url) as response:
            return await response.read()


StartService = Callable[..., Awaitable[Service]]


@pytest.fixture
async def upstream() -> AsyncIterator[EmulatedUpstream]:
    async with EmulatedUpstream() as upstream:
        yield upstream


@pytest.fixture
async def start_service(
    redis_url: str, prefix: str, upstream: EmulatedUpstream, tmp_path: Path
) -> AsyncIterator[StartService]:
    """Starts services on one queue and one folder: `start_service(max_attempts=1, …)` with any settings."""
    async with AsyncExitStack() as stack:
        session = await stack.enter_async_context(ClientSession())

        async def start(**changed: object) -> Service:
            usual: dict[str, object] = {
                "provider": "together",
                "together_api_key": "any",
                "together_api_url": upstream.url,
                "redis_url": redis_url,
                "redis_prefix": prefix,
                "data_dir": tmp_path,
                "rate_limit_max": 0,
                "image_rate_limit_max": 0,
                "retry_base_s": 0.01,
            }
            app = create_app(Settings(**(usual | changed)))  # type: ignore[arg-type]
            runner = ImagegenRunner(app)
            stack.push_async_callback(runner.cleanup)
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            await eventually(lambda: _listens(app, prefix))
            host, port = runner.addresses[0]
            return Service(f"http://{host}:{port}", app, session)

        yield start


async def _listens(app: web.Application, prefix: str) -> bool:
    """Whether its side loops are under way, so that a test that ends at once ends them in their usual state."""
    return bool(await app[CONNECTION].commands.pubsub_channels(f"*{prefix}*"))


@pytest.fixture
async def service(start_service: StartService) -> Service:
    return await start_service()
