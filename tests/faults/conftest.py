from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from faults.proxy import FaultProxy

from imagegen.queue.embedded import EmbeddedRedis


@pytest.fixture
async def proxy(redis_url: str) -> AsyncIterator[FaultProxy]:
    async with FaultProxy(redis_url.removeprefix("unix://")) as proxy:
        yield proxy


@pytest.fixture
async def own_redis(tmp_path: Path) -> AsyncIterator[EmbeddedRedis]:
    """A server of this test alone, to be stopped, filled and demoted."""
    server = EmbeddedRedis(tmp_path)
    await server.start()
    yield server
    await server.stop()
