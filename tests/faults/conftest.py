from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from imagegen.redis_client.embedded import EmbeddedRedis
from tests.certificates import server_tls
from tests.faults.counted_calls import Calls
from tests.faults.proxy import FaultProxy
from tests.support import wait_for_one_day


@pytest.fixture
def one_day() -> None:
    """Let a test that compares money begin and end on one day."""
    wait_for_one_day(100.0)


@pytest.fixture
async def proxy(redis_url: str) -> AsyncIterator[FaultProxy]:
    async with FaultProxy(redis_url.removeprefix("unix://")) as proxy:
        yield proxy


@pytest.fixture(scope="session")
def tls(tmp_path_factory: pytest.TempPathFactory) -> ssl.SSLContext:
    """Return the server side of TLS with a self-signed certificate."""
    return server_tls(tmp_path_factory.mktemp("tls"))


@pytest.fixture
async def own_redis(tmp_path: Path) -> AsyncIterator[EmbeddedRedis]:
    """Run a server for one test, to be stopped, filled and demoted."""
    server = EmbeddedRedis(tmp_path)
    await server.start()
    yield server
    await server.stop()


@pytest.fixture
async def calls() -> AsyncIterator[Calls]:
    calls = Calls()
    yield calls
    await calls.stop()
