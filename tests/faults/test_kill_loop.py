"""Kills one of two instances again and again, at chosen steps and in the middle of calls, and checks the history."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from imagegen.redis_client.embedded import EmbeddedRedis
from tests.emulator_fixtures import EmulatorProcess
from tests.faults.fleet import KILL_SEED, KILL_STEPS, ServiceProcess
from tests.faults.money import check_money
from tests.support import ADMIN_TOKEN

CALL_S = 0.25
SLOTS = 4
MONEY_S = 60.0


@dataclass
class Client:
    """Client that submits tasks to a live instance and records the accepted ones."""

    http: aiohttp.ClientSession
    services: list[ServiceProcess]
    accepted: dict[str, str] = field(default_factory=dict)
    number: int = 0

    async def submit_forever(self) -> None:
        while True:
            prompt = f"kill loop task {self.number}"
            self.number += 1
            for service in (self.services[self.number % 2], self.services[(self.number + 1) % 2]):
                if await self._accepted(service, prompt):
                    break
            await asyncio.sleep(CALL_S / SLOTS / 2)

    async def task(self, task_id: str) -> dict[str, Any]:
        async with self.http.get(f"{self.services[0].url}/api/images/{task_id}?wait=10") as response:
            return dict(await response.json())

    async def _accepted(self, service: ServiceProcess, prompt: str) -> bool:
        try:
            async with self.http.post(f"{service.url}/api/images/generate", json={"prompt": prompt}) as response:
                if response.status in (200, 202):
                    self.accepted[(await response.json())["taskId"]] = prompt
                    return True
        except (aiohttp.ClientError, TimeoutError):
            pass
        return False


@asynccontextmanager
async def fleet(redis: EmbeddedRedis, upstream: str, folder: Path, instances: int = 2) -> AsyncIterator[Client]:
    environ = {
        "REDIS_URL": redis.url,
        "TOGETHER_API_KEY": "k",
        "TOGETHER_API_URL": upstream,
        "IMAGE_STORE": "upstream",
        "LEASE_SECONDS": "2",
        "RETRY_BASE_SECONDS": "0.05",
        "WORKER_CONCURRENCY": str(SLOTS),
        "RATE_LIMIT_MAX": "0",
        "IMAGE_RATE_LIMIT_MAX": "0",
        "LOG_LEVEL": "ERROR",
        "DATA_DIR": str(folder / "data"),
        "ADMIN_TOKEN": ADMIN_TOKEN,
        "BUDGET_DAILY_USD": "1000",
        "SURE_DEAD_S": "0.3",
    }
    services = [ServiceProcess(environ, folder / f"service{i}.log", folder / f"kill{i}") for i in range(instances)]
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=20)) as http:
        await asyncio.gather(*(service.start(http) for service in services))
        yield Client(http, services)
        assert {await service.end() for service in services} == {0}


async def kill(client: Client, kills: int, emulator: EmulatorProcess) -> tuple[Counter[str], int]:
    """Kill one instance after the other; return the kills at each step and the tasks in flight."""
    chance, counts, in_flight = random.Random(KILL_SEED), Counter[str](), 0
    plan = [step for step in KILL_STEPS for _ in range(max(kills // 10, 1))]
    plan += ["in flight"] * (kills - len(plan))
    chance.shuffle(plan)
    for number, step in enumerate(plan):
        victim = client.services[number % 2]
        while step == "in flight" and (await asyncio.to_thread(emulator.ledger))["in_flight"] < SLOTS:
            await asyncio.sleep(0.01)
        await (victim.kill() if step == "in flight" else victim.kill_at(step))
        counts[step] += 1
        in_flight += SLOTS
        await victim.start(client.http)
        await asyncio.sleep(chance.uniform(0.0, 0.3))
    return counts, in_flight


async def check(client: Client, emulator: EmulatorProcess, in_flight: int) -> None:
    """Check that every accepted task is final and no paid call exceeds the recorded losses."""
    tasks = {}
    async with asyncio.timeout(90):
        for task_id in client.accepted:
            while (task := await client.task(task_id)).get("status") in ("pending", "processing"):
                pass
            tasks[task_id] = task
    lost = [task_id for task_id, task in tasks.items() if task["status"] not in ("completed", "failed")]
    assert lost == []
    paid = Counter(call["prompt"] for call in emulator.ledger()["calls"] if call["paid"])
    recorded = {client.accepted[i]: int(task.get("possiblyBilledTwice", 0)) for i, task in tasks.items()}
    beyond = {prompt: paid[prompt] - 1 - recorded[prompt] for prompt in recorded if paid[prompt] > 1 + recorded[prompt]}
    assert beyond == {}
    excess = sum(max(paid[prompt] - 1, 0) for prompt in recorded)
    assert excess <= sum(recorded.values()) <= in_flight
    print(f"{len(tasks)} tasks, {excess} excess paid calls, {sum(recorded.values())} recorded, {in_flight} in flight")


async def loop_of(kills: int, folder: Path) -> None:
    redis = EmbeddedRedis(folder / "redis")
    await redis.start()
    try:
        with EmulatorProcess("--delay", str(CALL_S), "--image", "none") as emulator:
            async with fleet(redis, emulator.url, folder) as client:
                submitting = asyncio.create_task(client.submit_forever())
                counts, in_flight = await kill(client, kills, emulator)
                submitting.cancel()
                print(f"seed {KILL_SEED}: {dict(counts)}")
                await check(client, emulator, in_flight)
            async with fleet(redis, emulator.url, folder, instances=1) as client:
                url = client.services[0].url
                print(await check_money(client.http, url, lambda: emulator.ledger()["calls"], MONEY_S))
    finally:
        await redis.stop()


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("one_day")
async def test_twelve_kills_lose_no_task_and_record_each_payment_to_the_cent(tmp_path: Path) -> None:
    await loop_of(12, tmp_path)


@pytest.mark.faults
@pytest.mark.timeout(1800)
async def test_two_hundred_kills_lose_no_task_and_record_each_payment_to_the_cent(tmp_path: Path) -> None:
    await loop_of(200, tmp_path)
