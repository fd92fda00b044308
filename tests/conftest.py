"""Fixtures of all rooms: a real Redis with a fresh prefix for each test, and an instance of the queue on it."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack

import pytest

from imagegen.queue.instance import QueueConfig, QueueInstance, open_queue
from imagegen.redis_client.connection import Connection
from imagegen.redis_client.embedded import EmbeddedRedis
from imagegen.supervisor import Supervisor

_numbers = itertools.count()


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    server = EmbeddedRedis(tmp_path_factory.mktemp("redis"))
    asyncio.run(server.start())
    yield server.url
    asyncio.run(server.stop())


@pytest.fixture
def prefix() -> str:
    return f"test{next(_numbers)}"


class Instance:
    """The queue room of one process, with its side loops."""

    def __init__(self, room: QueueInstance) -> None:
        self.connection, self.keys, self.scripts = room.connection, room.keys, room.scripts
        self.memory, self.claims, self.queue = room.task_cache, room.worker_queue, room.client_queue
        self.control, self.feed = room.notifier, room.feed
        self.room = room
        self.loops: list[asyncio.Task[None]] = []

    def start(self) -> None:
        self.loops = [asyncio.create_task(loop, name=name) for name, loop in self.room.loops().items()]

    async def crash(self) -> None:
        """Stops without a word, as kill -9 does."""
        await Supervisor().stop(self.loops)
        self.loops.clear()


MakeInstance = Callable[..., Instance]


@pytest.fixture
async def make_instance(redis_url: str, prefix: str) -> AsyncIterator[MakeInstance]:
    """Makes instances that share one queue: `make_instance(lease_s=…, max_queue=…, start=False)`."""
    async with AsyncExitStack() as stack:

        def make(
            *,
            lease_s: float = 30.0,
            result_ttl_s: float = 60.0,
            max_queue: int = 1000,
            slots: int = 5,
            deadline_s: float = 3600.0,
            start: bool = True,
            url: str = redis_url,
        ) -> Instance:
            connection = Connection(url)
            life_s = {"record_life_s": 60.0, "deadline_s": deadline_s}
            rules = QueueConfig(prefix, lease_s, result_ttl_s, max_queue=max_queue, slots=slots, **life_s)
            instance = Instance(open_queue(connection, rules, instance=f"i{next(_numbers)}"))
            stack.push_async_callback(connection.close)
            stack.push_async_callback(instance.crash)
            if start:
                instance.start()
            return instance

        yield make
