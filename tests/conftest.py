"""Fixtures of all tests: a real Redis, a real S3 server, a fresh prefix for each test and instances of the queue."""

from __future__ import annotations

import asyncio
import gc
import itertools
import signal
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from imagegen.queue import change_relay
from imagegen.queue.claim import Claim
from imagegen.queue.instance import QueueConfig, QueueInstance, open_queue
from imagegen.redis_client.connection import Connection
from imagegen.redis_client.embedded import EmbeddedRedis
from imagegen.redis_client.topology import DEADLINE_S, Servers
from imagegen.supervisor import Supervisor
from imagegen.tasks.task import Task
from tests import orphans, parallel
from tests.certificates import shorten_bundle
from tests.s3_server import S3Server
from tests.support import cache_library_paths, wait_for_one_day
from tests.tiers import order_of, tier_of

TESTS = Path(__file__).parent

orphans.end_started_programs()
cache_library_paths()
shorten_bundle()

Servers.deadline_s = 20.0
"""On a busy machine, the tests of this process and their Redis may both pause for some seconds."""

_numbers = itertools.count()


@pytest.fixture(autouse=True)
def within_one_day() -> None:
    """Begin no test in the last seconds of a UTC day: budgets and the usage report count by days."""
    wait_for_one_day(20.0)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Let the programs of the test be interrupted, also where a shell started the tests in the background.

    Such a shell ignores SIGINT, and programs inherit what is ignored, but no handler.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Collect the tests without collections of garbage, of which later ones need not look at the tests."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--forks", type=int, default=1, help="processes, forked after the collection, that run the tests")


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> bool | None:
    """Run the tests in forked processes, if `--forks` says so."""
    processes = session.config.getoption("forks")
    if processes < 2 or session.config.option.collectonly or session.testsfailed:
        return None
    parallel.run(session, processes)
    return True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {path: path.relative_to(TESTS).as_posix() for path in {item.path for item in items}}
    orders = {path: order_of(place) for path, place in places.items()}
    tiers = {path: tier_of(place) for path, place in places.items()}
    items.sort(key=lambda item: orders[item.path])
    for item in items:
        item.add_marker(tiers[item.path])


@pytest.fixture(scope="module", autouse=True)
def no_io(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a unit test that opens a connection or starts a process."""

    def refuse(*_args: object, **_options: object) -> None:
        raise AssertionError("a unit test does no I/O")

    with pytest.MonkeyPatch.context() as patch:
        if tier_of(request.path.relative_to(TESTS).as_posix()) == "unit":
            for name in ("socket.socket.connect", "socket.socket.bind", "subprocess.Popen"):
                patch.setattr(name, refuse)
        yield


@pytest.fixture(scope="module")
def no_garbage_collections() -> Iterator[None]:
    """Collect no garbage in the tests of a file that parses all code: most of its time would go into collections."""
    gc.disable()
    yield
    gc.enable()


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    server = EmbeddedRedis(tmp_path_factory.mktemp("redis"))
    asyncio.run(server.start())
    yield server.url
    asyncio.run(server.stop())


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    server = S3Server()
    with server.serve():
        yield server


@pytest.fixture
def prefix() -> str:
    return f"test{next(_numbers)}"


class Instance:
    """Queue of one process with its background loops."""

    def __init__(self, parts: QueueInstance) -> None:
        self.parts = parts
        self.connection, self.keys, self.verbs = parts.connection, parts.keys, parts.verbs
        self.task_cache, self.worker_queue, self.client_queue = parts.task_cache, parts.worker_queue, parts.client_queue
        self.notifier, self.feed = parts.notifier, parts.feed
        self.loops: list[asyncio.Task[None]] = []

    def start(self) -> None:
        self.loops = [asyncio.create_task(loop, name=name) for name, loop in self.parts.loops().items()]

    async def crash(self) -> None:
        """Stop the loops without a message, as kill -9 does; a greeting under way does not reach a later instance."""
        await Supervisor().stop(self.loops)
        self.loops.clear()
        await self.notifier.flush()

    async def claim(self, within_s: float = 40.0) -> Claim:
        """Return the next claim; fail without one."""
        async with asyncio.timeout(within_s):
            claim = await self.worker_queue.claim()
        assert claim is not None
        return claim

    async def task(self, task_id: str) -> Task:
        """Return a task as clients see it; fail without one."""
        task = await self.client_queue.get(task_id)
        assert task is not None
        return task

    async def read(self, task_id: str) -> Task:
        """Return a task as Redis has it; fail without one."""
        task = await self.client_queue.read(task_id)
        assert task is not None
        return task

    async def cancel(self, task_id: str) -> Task:
        """Cancel a task for all of its clients; fail without one."""
        task = await self.client_queue.cancel(task_id)
        assert task is not None
        return task

    async def stored(self, key: str) -> bytes:
        """Return the value of a key; fail without one."""
        value = await self.connection.commands.get(key)
        assert isinstance(value, bytes)
        return value


MakeInstance = Callable[..., Instance]


@pytest.fixture
def late_refresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read awaited tasks again too late for a test of a message. A fixture that shortens the interval requires this."""
    monkeypatch.setattr(change_relay, "REFRESH_S", 60.0)


@pytest.fixture
def service_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give a call of Redis no more time than a service does, for the tests of that limit."""
    monkeypatch.setattr(Servers, "deadline_s", DEADLINE_S)


@pytest.fixture
async def make_instance(redis_url: str, prefix: str, late_refresh: None) -> AsyncIterator[MakeInstance]:
    """Make instances that share one queue: `make_instance(lease_s=…, max_queue=…, start=False)`."""
    async with AsyncExitStack() as stack:

        def make(
            *,
            lease_s: float = 30.0,
            result_ttl_s: float = 60.0,
            max_queue: int = 1000,
            slots: int = 5,
            deadline_s: float = 3600.0,
            window: int = 10,
            start: bool = True,
            url: str = redis_url,
        ) -> Instance:
            connection = Connection(url)
            rules = QueueConfig(
                prefix,
                lease_s,
                result_ttl_s,
                record_life_s=60.0,
                max_queue=max_queue,
                slots=slots,
                deadline_s=deadline_s,
                window=window,
            )
            instance = Instance(open_queue(connection, rules, instance=f"i{next(_numbers)}"))
            stack.push_async_callback(connection.close)
            stack.push_async_callback(instance.crash)
            if start:
                instance.start()
            return instance

        yield make
