"""A seeded soup of faults against two instances: its world, its load, and the invariants that hold at its end.

One fault at a time is played while clients go on submitting; after each the service has a moment to recover. What is
played, and when, follows from one seed.
"""

from __future__ import annotations

import asyncio
import random
import re
import signal
import subprocess
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web
from emulated import EmulatorProcess
from faults.fleet import RedisPair, ServiceProcess

LEASE_S = 2.0
SLOTS = 4
CALL_S = 0.15
MAX_ATTEMPTS = 3
PREFIX = "soup"
DISK_BYTES = 64 * 2**20
RECOVERY_S = 1.5
REST_TIMEOUT_S = 120.0
FINAL = frozenset({"completed", "failed", "cancelled"})
POISON = "{{fault:500}}"

_LOG_FAULT = re.compile(r"Traceback|never retrieved|never awaited|nforeseen|CRITICAL")


@dataclass
class Load:
    """Clients that submit, read, watch and leave; they remember each accepted task and every state that they saw."""

    http: aiohttp.ClientSession
    services: list[ServiceProcess]
    webhook_urls: list[str]
    chance: random.Random
    accepted: dict[str, str] = field(default_factory=dict)
    finals: dict[str, dict[str, Any]] = field(default_factory=dict)
    revived: list[str] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    number: int = 0

    async def submit_forever(self) -> None:
        while True:
            await self.submit()
            await asyncio.sleep(CALL_S / SLOTS)

    async def submit(self) -> None:
        """Submit one new task to one instance, else to the other."""
        self.number += 1
        poison = POISON if self.number % 40 == 0 else ""
        body: dict[str, Any] = {"prompt": f"soup task {self.number} {poison}".rstrip()}
        if self.number % 7 == 0:
            body["webhook"] = {"url": self.chance.choice(self.webhook_urls)}
        for service in self.chance.sample(self.services, len(self.services)):
            if await self._accepted(service, body):
                return

    async def _accepted(self, service: ServiceProcess, body: dict[str, Any]) -> bool:
        with suppress(aiohttp.ClientError, TimeoutError):
            async with self.http.post(f"{service.url}/api/images/generate", json=body) as response:
                if response.status in (200, 202):
                    self.accepted[(await response.json())["taskId"]] = body["prompt"]
                    return True
                self.refused[f"{response.status} {(await response.json())['code']}"] += 1
        return False

    async def read_forever(self) -> None:
        """Read accepted tasks at random; a final state must stay."""
        while True:
            await asyncio.sleep(0.05)
            if self.accepted:
                await self.read(self.chance.choice(list(self.accepted)), self.chance.choice(self.services))

    async def read(self, task_id: str, service: ServiceProcess) -> dict[str, Any] | None:
        """Return the task as an instance answers it; None where it gives no answer."""
        with suppress(aiohttp.ClientError, TimeoutError):
            async with self.http.get(f"{service.url}/api/images/{task_id}") as response:
                task: dict[str, Any] = await response.json()
                if response.status != 200:
                    return {"status": task.get("status", "")} if response.status == 404 else None
                if task_id in self.finals and task["status"] not in FINAL:
                    self.revived.append(task_id)
                if task["status"] in FINAL:
                    self.finals[task_id] = task
                return task
        return None

    async def leave_forever(self) -> None:
        """Open images and event streams, and leave before they end."""
        while True:
            await asyncio.sleep(0.1)
            if self.accepted:
                task_id, service = self.chance.choice(list(self.accepted)), self.chance.choice(self.services)
                path = self.chance.choice((f"{task_id}/0", f"{task_id}/events"))
                with suppress(aiohttp.ClientError, TimeoutError):
                    async with self.http.get(f"{service.url}/api/images/{path}") as response:
                        await response.content.read(10)


@dataclass
class World:
    """All that a fault can be played on. data: the folder of the images; small_disk: whether it can be filled."""

    pair: RedisPair
    services: list[ServiceProcess]
    emulator: EmulatorProcess
    load: Load
    data: Path
    small_disk: bool
    chance: random.Random

    @property
    def victim(self) -> ServiceProcess:
        return self.chance.choice(self.services)


async def kill(world: World) -> None:
    victim = world.victim
    await victim.kill()
    await asyncio.sleep(world.chance.uniform(0.0, LEASE_S))
    await victim.start(world.load.http)


async def restart(world: World) -> None:
    victim = world.victim
    assert await victim.end() == 0
    await victim.start(world.load.http)


async def freeze(world: World) -> None:
    victim = world.victim
    victim.signal(signal.SIGSTOP)
    await asyncio.sleep(LEASE_S * world.chance.uniform(0.5, 2.0))
    victim.signal(signal.SIGCONT)


async def freeze_redis(world: World) -> None:
    world.pair.primary.signal(signal.SIGSTOP)
    await asyncio.sleep(LEASE_S * world.chance.uniform(0.5, 2.0))
    world.pair.primary.signal(signal.SIGCONT)


async def fail_over(world: World) -> None:
    await world.pair.fail_over(lose_s=world.chance.uniform(0.2, 1.0))


async def silence(world: World) -> None:
    """Keep the connections to Redis open and pass nothing for a while, then cut them."""
    world.pair.proxy.black_hole = True
    await asyncio.sleep(world.chance.uniform(0.5, LEASE_S))
    world.pair.proxy.cut()
    world.pair.proxy.black_hole = False


async def cut(world: World) -> None:
    world.pair.proxy.cut(reset=world.chance.random() < 0.5)


async def drop_replies(world: World) -> None:
    proxy = world.pair.proxy
    proxy.drop_some(0.2, world.chance.randrange(2**31))
    await asyncio.sleep(LEASE_S)
    proxy.drop_reply = lambda _request: False


async def delete_stream(world: World) -> None:
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
    fault = world.chance.choice(("503", "429 retry_after=1", "reset_before_read"))
    world.emulator.script({"fault": fault.split()[0], "times": 20, **({"retry_after": 1} if " " in fault else {})})


async def open_idle_connections(world: World) -> None:
    opened = []
    for service in world.services:
        for _ in range(100):
            with suppress(OSError):
                opened.append(await asyncio.open_connection("127.0.0.1", service.port))
    await asyncio.sleep(1.0)
    for _, writer in opened:
        writer.close()


Fault = Callable[[World], Awaitable[None]]

FAULTS: tuple[Fault, ...] = (
    kill,
    restart,
    freeze,
    freeze_redis,
    fail_over,
    silence,
    cut,
    drop_replies,
    delete_stream,
    fill_disk,
    overload_upstream,
    open_idle_connections,
)


@contextmanager
def small_disk(folder: Path) -> Any:
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
async def receivers() -> AsyncIterator[list[str]]:
    """Serve two webhook receivers: one that answers at once, one that takes nine seconds."""

    async def take(request: web.Request) -> web.Response:
        await asyncio.sleep(float(request.match_info["delay_s"]))
        return web.Response()

    app = web.Application()
    app.router.add_post("/{delay_s}/", take)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    base = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield [f"{base}/0/", f"{base}/9/"]
    finally:
        await runner.cleanup()


@asynccontextmanager
async def soup_world(folder: Path, seed: int) -> AsyncIterator[World]:
    """Start Redis, the emulated upstream and two instances; end them with exit code 0."""
    chance = random.Random(seed)
    async with AsyncExitStack() as stack:
        data = folder / "data"
        has_small_disk = stack.enter_context(small_disk(data))
        emulator = stack.enter_context(EmulatorProcess("--image", "png", "--delay", str(CALL_S)))
        pair = await stack.enter_async_context(RedisPair(folder))
        webhook_urls = await stack.enter_async_context(receivers())
        settings = {
            "REDIS_URL": pair.proxy.url,
            "REDIS_PREFIX": PREFIX,
            "TOGETHER_API_KEY": "k",
            "TOGETHER_API_URL": emulator.url,
            "DATA_DIR": str(data),
            "LEASE_SECONDS": str(LEASE_S),
            "RETRY_BASE_SECONDS": "0.1",
            "MAX_ATTEMPTS": str(MAX_ATTEMPTS),
            "WORKER_CONCURRENCY": str(SLOTS),
            "RATE_LIMIT_MAX": "0",
            "IMAGE_RATE_LIMIT_MAX": "0",
            "WEBHOOK_ALLOW_PRIVATE": "true",
            "LOG_LEVEL": "INFO",
        }
        services = [ServiceProcess(settings, folder / f"service{i}.log") for i in range(2)]
        http = await stack.enter_async_context(aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)))
        for service in services:
            stack.push_async_callback(service.ensure_dead)
        await asyncio.gather(*(service.start(http) for service in services))
        load = Load(http, services, webhook_urls, chance)
        yield World(pair, services, emulator, load, data, has_small_disk, chance)
        assert [await service.end() for service in services] == [0, 0]


async def play(world: World, duration_s: float) -> Counter[str]:
    """Play faults one after the other, each kind once before any comes twice; return how often each was played."""
    loop, counts = asyncio.get_running_loop(), Counter[str]()
    load = world.load
    clients = [asyncio.create_task(c) for c in (load.submit_forever(), load.read_forever(), load.leave_forever())]
    ends_at = loop.time() + duration_s
    try:
        while loop.time() < ends_at:
            for fault in world.chance.sample(FAULTS, len(FAULTS)):
                if loop.time() >= ends_at:
                    break
                await fault(world)
                counts[fault.__name__] += 1
                await asyncio.sleep(RECOVERY_S * world.chance.uniform(0.3, 1.0))
            for client in clients:
                if client.done():
                    client.result()
    finally:
        for client in clients:
            client.cancel()
        await asyncio.gather(*clients, return_exceptions=True)
    return counts


async def check_invariants(world: World) -> str:
    """Wait for rest, then check every invariant; return a line of figures."""
    load = world.load
    tasks = await _all_final(load)
    missing = [task_id for task_id, task in tasks.items() if task["status"] not in FINAL]
    assert missing == [], [tasks[task_id] for task_id in missing[:5]]
    assert load.revived == []
    failed = {task_id: task["error"]["code"] for task_id, task in tasks.items() if task["status"] == "failed"}
    unexpected = {i: code for i, code in failed.items() if POISON not in load.accepted[i] and code != "interrupted"}
    assert unexpected == {}
    excess, recorded = _check_payments(world, tasks)
    await _check_images(load, tasks)
    await _check_redis_at_rest(world)
    for service in world.services:
        faults = [line for line in service.log.read_text().splitlines() if _LOG_FAULT.search(line)]
        assert faults == []
    return (
        f"{len(tasks)} accepted, {len(failed)} failed {dict(Counter(failed.values()))}, "
        f"{excess} excess paid calls, {recorded} recorded, refused {dict(load.refused)}"
    )


async def _all_final(load: Load) -> dict[str, dict[str, Any]]:
    tasks: dict[str, dict[str, Any]] = {}
    loop = asyncio.get_running_loop()
    ends_at = loop.time() + REST_TIMEOUT_S
    for number, task_id in enumerate(load.accepted):
        service = load.services[number % 2]
        while (task := await load.read(task_id, service)) is None or task["status"] in ("pending", "processing"):
            if loop.time() > ends_at:
                break
            await asyncio.sleep(0.05)
        tasks[task_id] = task or {"status": "no answer"}
    return tasks


def _check_payments(world: World, tasks: dict[str, dict[str, Any]]) -> tuple[int, int]:
    """No image is paid for beyond the planned one and the recorded losses; answers of 5xx brought none."""
    accepted = world.load.accepted
    paid = Counter(
        call["prompt"]
        for call in world.emulator.ledger()["calls"]
        if call["paid"] and call["outcome"] not in (500, 503)
    )
    recorded = {accepted[task_id]: int(task.get("possiblyBilledTwice", 0)) for task_id, task in tasks.items()}
    beyond = {p: (paid[p], recorded[p]) for p in recorded if paid[p] > 1 + recorded[p]}
    assert beyond == {}, f"paid calls, and those recorded as ambiguous: {beyond}"
    return sum(max(paid[prompt] - 1, 0) for prompt in recorded), sum(recorded.values())


async def _check_images(load: Load, tasks: dict[str, dict[str, Any]]) -> None:
    """Every image of a completed task is there, on both instances."""
    for number, (task_id, task) in enumerate(tasks.items()):
        if task["status"] == "completed":
            service = load.services[number % 2]
            async with load.http.get(f"{service.url}/api/images/{task_id}/0") as response:
                body = await response.read()
                assert (response.status, len(body)) == (200, task["data"][0]["bytes"]), (task, body[:200])


async def _check_redis_at_rest(world: World) -> None:
    """The stream is empty, nothing is pending, and each key but the stream and the outbox ends by itself."""
    redis, stream = world.pair.primary.client, f"{{{PREFIX}}}:tasks"
    assert await redis.xrange(stream) == []
    assert (await redis.xpending(stream, "pool"))["pending"] == 0
    outbox = f"{{{PREFIX}}}:outbox".encode()
    keys = [key async for key in redis.scan_iter(f"{{{PREFIX}}}:*")]
    endless = [key for key in keys if await redis.ttl(key) == -1 and key not in (stream.encode(), outbox)]
    assert endless == []
