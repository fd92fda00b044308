"""Random faults from a seed against two instances: their worlds and the faults.

One fault at a time is played while clients go on submitting; after each the service has a moment to recover. What is
played, and when, follows from one seed.

State of a killed process alone can't be restored, so a loss of writes comes no sooner than `CALM_S` after a
crash, and a crash no sooner than that after a loss.
"""

from __future__ import annotations

import asyncio
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import aiohttp
from redis.asyncio import Redis

from tests.emulator_fixtures import EmulatorProcess
from tests.faults.fleet import RedisPair, ServiceProcess
from tests.faults.invariants import Rest
from tests.faults.load import CALL_S, SLOTS, Load, Receivers
from tests.faults.money import check_money
from tests.service.topology import Cluster, cluster, port_of, url_of
from tests.support import ADMIN_TOKEN

LEASE_S = 2.0
MAX_ATTEMPTS = 5
PREFIX = "imagegen"
DEADLINE_S = 120.0
"""A task without a restorable entry fails then; on a busy machine instances need half a minute to start."""

DISK_BYTES = 64 * 2**20
RECOVERY_S = 1.5
CALM_S = 6.0
MIGRATION_PAUSE_S = 0.002


@dataclass
class World:
    """Targets of the faults. data: the folder of the images; small_disk: whether it can be filled."""

    services: list[ServiceProcess]
    emulator: EmulatorProcess
    load: Load
    data: Path
    small_disk: bool
    chance: random.Random
    timeline: list[tuple[float, str]] = field(default_factory=list)

    @property
    def victim(self) -> ServiceProcess:
        return self.chance.choice(self.services)

    @property
    def redis(self) -> Redis:
        """Return a direct client of the server that has the keys."""
        raise NotImplementedError

    async def rest(self, *, quiet_within_s: float) -> str:
        """Check the invariants; return a line of figures."""
        rest = Rest(
            self.redis,
            PREFIX,
            self.load,
            self.emulator,
            MAX_ATTEMPTS,
            DEADLINE_S + 20,
            quiet_within_s,
            self.timeline,
        )
        return await rest.check()

    async def money(self, within_s: float) -> str:
        """Check report, budget and the upstream's ledger after the instances have ended; return a line of figures.

        Redis must have lost no write.
        """
        await asyncio.gather(*(service.end() for service in self.services))
        await self.services[0].start(self.load.http)
        calls = self.emulator.ledger
        return await check_money(self.load.http, self.services[0].url, lambda: calls()["calls"], within_s)


@dataclass
class PairWorld(World):
    """A primary and its replica behind one address."""

    pair: RedisPair = field(kw_only=True)

    @property
    def redis(self) -> Redis:
        return self.pair.primary.client


@dataclass
class ClusterWorld(World):
    """Three nodes; the slot of the service's keys moves among them."""

    cluster: Cluster = field(kw_only=True)
    clients: dict[int, Redis] = field(kw_only=True)

    @property
    def redis(self) -> Redis:
        return self.clients[port_of(self.cluster.owner)]


AnyWorld = TypeVar("AnyWorld", bound=World)


async def kill(world: World) -> None:
    victim = world.victim
    await victim.kill()
    await asyncio.sleep(world.chance.uniform(0.0, LEASE_S))
    await victim.start(world.load.http)


async def restart(world: World) -> None:
    victim = world.victim
    assert await victim.end() == 0
    await victim.start(world.load.http)


async def stop_all(world: World) -> None:
    """End every instance at the same moment."""
    codes = await asyncio.gather(*(service.end() for service in world.services))
    assert set(codes) == {0}
    await asyncio.gather(*(service.start(world.load.http) for service in world.services))


async def kill_all(world: World) -> None:
    await asyncio.gather(*(service.kill() for service in world.services))
    await asyncio.gather(*(service.start(world.load.http) for service in world.services))


async def freeze(world: World) -> None:
    victim = world.victim
    victim.signal(signal.SIGSTOP)
    await asyncio.sleep(LEASE_S * world.chance.uniform(0.5, 2.0))
    victim.signal(signal.SIGCONT)


async def freeze_redis(world: PairWorld) -> None:
    world.pair.primary.signal(signal.SIGSTOP)
    await asyncio.sleep(LEASE_S * world.chance.uniform(0.5, 2.0))
    world.pair.primary.signal(signal.SIGCONT)


async def fail_over(world: PairWorld) -> None:
    await world.pair.fail_over(lose_s=world.chance.uniform(0.2, 1.0))


async def silence(world: PairWorld) -> None:
    """Keep the connections to Redis open and pass nothing for a while, then cut them."""
    world.pair.proxy.black_hole = True
    await asyncio.sleep(world.chance.uniform(0.5, LEASE_S))
    world.pair.proxy.cut()
    world.pair.proxy.black_hole = False


async def silence_old(world: PairWorld) -> None:
    """Pass nothing more on the connections that are open; new ones work."""
    world.pair.proxy.silence()
    await asyncio.sleep(world.chance.uniform(0.5, LEASE_S))


async def cut(world: PairWorld) -> None:
    world.pair.proxy.cut(reset=world.chance.random() < 0.5)


async def drop_replies(world: PairWorld) -> None:
    proxy = world.pair.proxy
    proxy.drop_some(0.2, world.chance.randrange(2**31))
    await asyncio.sleep(LEASE_S)
    proxy.drop_reply = lambda _request: False


async def delete_stream(world: PairWorld) -> None:
    await world.pair.primary.client.delete(f"{{{PREFIX}}}:tasks")


async def fill_disk(world: World) -> None:
    if world.small_disk:
        filler = world.data / "filler"
        with suppress(OSError), filler.open("wb", buffering=0) as file:
            while file.write(b"\0" * 2**16):
                pass
        await asyncio.sleep(world.chance.uniform(0.5, 3.0))
        filler.unlink(missing_ok=True)


async def overload_upstream(world: World) -> None:
    """Each rest of a second after a 429 ends with one call."""
    some = ({"fault": "503", "times": 20}, {"fault": "429", "retry_after": 1, "times": 4})
    world.emulator.script(world.chance.choice((*some, {"fault": "reset_before_read", "times": 20})))


async def open_idle_connections(world: World) -> None:
    opened = []
    for service in world.services:
        for _ in range(100):
            with suppress(OSError):
                opened.append(await asyncio.open_connection("127.0.0.1", service.port))
    await asyncio.sleep(1.0)
    for _, writer in opened:
        writer.close()


async def restart_receivers(world: World) -> None:
    await world.load.receivers.stop()
    await asyncio.sleep(world.chance.uniform(0.2, 1.0))
    await world.load.receivers.start()


async def migrate(world: ClusterWorld) -> None:
    """Move the slot of the service's keys to another node, key by key."""
    target = world.chance.choice(world.cluster.others)
    await asyncio.to_thread(world.cluster.migrate, target, pause_s=MIGRATION_PAUSE_S)


async def kill_while_migrating(world: ClusterWorld) -> None:
    moving = asyncio.create_task(migrate(world))
    await kill(world)
    await moving


async def cut_clients(world: ClusterWorld) -> None:
    """End every client connection of the node that has the keys."""
    await world.redis.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")


Fault = Callable[[AnyWorld], Awaitable[None]]

CRASHES: frozenset[str] = frozenset({"kill", "kill_all", "kill_while_migrating", "stop_all", "restart"})
LOSSES: frozenset[str] = frozenset({"fail_over", "delete_stream"})

COMMON: tuple[Fault[World], ...] = (
    kill,
    kill_all,
    restart,
    stop_all,
    freeze,
    fill_disk,
    overload_upstream,
    open_idle_connections,
    restart_receivers,
)
OF_PAIR: tuple[Fault[PairWorld], ...] = (
    *COMMON,
    freeze_redis,
    fail_over,
    silence,
    silence_old,
    cut,
    drop_replies,
    delete_stream,
)
OF_CLUSTER: tuple[Fault[ClusterWorld], ...] = (
    migrate,
    kill_while_migrating,
    cut_clients,
    migrate,
    kill_all,
    freeze,
    overload_upstream,
)


@contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """Mount a small file system on the folder where that is allowed; yield whether it was."""
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


@asynccontextmanager
async def pair_world(folder: Path, seed: int) -> AsyncIterator[PairWorld]:
    """Run two instances and a Redis that fails over."""
    async with AsyncExitStack() as stack:
        pair = await stack.enter_async_context(RedisPair(folder))
        url = pair.proxy.url
        async with _world(folder, seed, [url, url]) as world:
            yield PairWorld(**vars(world), pair=pair)


@asynccontextmanager
async def cluster_world(folder: Path, seed: int) -> AsyncIterator[ClusterWorld]:
    """Run two instances that start from different nodes of a cluster."""
    with cluster(folder / "cluster") as nodes:
        urls = [url_of(node) for node in nodes.nodes[:2]]
        clients = {port_of(node): Redis(port=port_of(node)) for node in nodes.nodes}
        async with AsyncExitStack() as stack:
            for client in clients.values():
                stack.push_async_callback(client.aclose)
            world = await stack.enter_async_context(_world(folder, seed, urls))
            yield ClusterWorld(**vars(world), cluster=nodes, clients=clients)


@asynccontextmanager
async def _world(folder: Path, seed: int, redis_urls: Sequence[str]) -> AsyncIterator[World]:
    """Start the emulated upstream, receivers and one instance for each address; end them with exit code 0."""
    chance = random.Random(seed)
    async with AsyncExitStack() as stack:
        data = folder / "data"
        has_small_disk = stack.enter_context(small_disk(data))
        emulator = stack.enter_context(EmulatorProcess("--image", "png", "--delay", str(CALL_S)))
        receivers = await stack.enter_async_context(Receivers())
        http = await stack.enter_async_context(aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)))
        services = [
            ServiceProcess(_settings(url, emulator.url, data), folder / f"service{number}.log")
            for number, url in enumerate(redis_urls)
        ]
        for service in services:
            stack.push_async_callback(service.ensure_dead)
        await asyncio.gather(*(service.start(http) for service in services))
        load = Load(http, services, receivers, chance)
        yield World(services, emulator, load, data, has_small_disk, chance)
        assert await asyncio.gather(*(service.end() for service in services)) == [0] * len(services)


def _settings(redis_url: str, upstream_url: str, data: Path) -> dict[str, str]:
    return {
        "REDIS_URL": redis_url,
        "REDIS_PREFIX": PREFIX,
        "TOGETHER_API_KEY": "k",
        "TOGETHER_API_URL": upstream_url,
        "DATA_DIR": str(data),
        "LEASE_SECONDS": str(LEASE_S),
        "RETRY_BASE_SECONDS": "0.1",
        "MAX_ATTEMPTS": str(MAX_ATTEMPTS),
        "TASK_DEADLINE": str(DEADLINE_S),
        "WORKER_CONCURRENCY": str(SLOTS),
        "RATE_LIMIT_MAX": "0",
        "IMAGE_RATE_LIMIT_MAX": "0",
        "WEBHOOK_ALLOW_PRIVATE": "true",
        "ADMIN_TOKEN": ADMIN_TOKEN,
        "BUDGET_DAILY_USD": "1000",
        "LOG_LEVEL": "INFO",
    }


async def play(
    world: AnyWorld, faults: Sequence[Fault[AnyWorld]], duration_s: float, *, at_least: int = 0, tasks: int = 0
) -> Counter[str]:
    """Play faults one after the other, each kind once before any comes twice; return how often each was played.

    at_least: how many faults, and tasks: how many accepted tasks, must be there before the end.
    """
    counts, played_at = Counter[str](), {"crash": 0.0, "loss": 0.0}
    clients = asyncio.create_task(world.load.run())
    ends_at = time.monotonic() + duration_s
    order: list[Fault[AnyWorld]] = []
    try:
        while time.monotonic() < ends_at or counts.total() < at_least or len(world.load.accepted) < tasks:
            order = order or world.chance.sample(faults, len(faults))
            fault = order.pop()
            await _keep_apart(fault.__name__, played_at)
            world.timeline.append((time.time(), fault.__name__))
            await fault(world)
            world.timeline.append((time.time(), "-"))
            counts[fault.__name__] += 1
            await asyncio.sleep(RECOVERY_S * world.chance.uniform(0.3, 1.0))
            if clients.done():
                clients.result()
    finally:
        clients.cancel()
        await asyncio.gather(clients, return_exceptions=True)
    return counts


async def _keep_apart(name: str, played_at: dict[str, float]) -> None:
    """Wait until a crash and a loss are far enough from each other."""
    kind = "crash" if name in CRASHES else "loss" if name in LOSSES else ""
    if kind:
        other = "loss" if kind == "crash" else "crash"
        await asyncio.sleep(max(played_at[other] + CALM_S - time.monotonic(), 0.0))
        played_at[kind] = time.monotonic()
