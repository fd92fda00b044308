"""Kills two instances while many clients submit more than the budget allows, and compares all accounts of the money."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from redis.asyncio import Redis

from imagegen.redis_client.embedded import EmbeddedRedis
from imagegen.redis_client.keys import Keys
from imagegen.tasks.cost import MICRO_USD, day_of
from tests.emulator_fixtures import EmulatorProcess
from tests.faults.fleet import KILL_SEED, ServiceProcess

IMAGE_MICRO_USD = 708
"""Of FLUX.1-schnell at 512 x 512."""

CLIENTS = 20
CALL_S = 0.05


@dataclass
class Clients:
    """Clients that submit to a live instance, and repeat what was not answered."""

    http: aiohttp.ClientSession
    services: list[ServiceProcess]
    accepted: dict[str, str] = field(default_factory=dict)
    refused: int = 0

    async def submit_all(self, count: int) -> None:
        prompts = iter(range(count))

        async def submit_next() -> None:
            for number in prompts:
                while not await self._answered(f"budget task {number}", self.services[number % 2]):
                    await asyncio.sleep(0.05)

        await asyncio.gather(*(submit_next() for _ in range(CLIENTS)))

    async def _answered(self, prompt: str, service: ServiceProcess) -> bool:
        try:
            async with self.http.post(f"{service.url}/api/images/generate", json={"prompt": prompt}) as response:
                if response.status == 402:
                    self.refused += 1
                elif response.status in (200, 202):
                    self.accepted[(await response.json())["taskId"]] = prompt
                return response.status in (200, 202, 402)
        except (aiohttp.ClientError, TimeoutError):
            return False

    async def ended(self, task_id: str) -> dict[str, Any]:
        while True:
            async with self.http.get(f"{self.services[0].url}/api/images/{task_id}?wait=10") as response:
                task = dict(await response.json())
            if task["status"] not in ("pending", "processing"):
                return task


async def used_micro_usd(redis: EmbeddedRedis, prefix: str) -> int:
    """Return what the budget of all clients holds today, reserved and charged."""
    client = Redis.from_url(redis.url)
    async with client:
        key = Keys(prefix).budgets(day_of(time.time()))
        (value,) = await client.execute_command("BITFIELD", key, "GET", "i64", "#1")
    return int(value)


async def kill_while_submitting(submits: int, images: int, kills: int, folder: Path) -> None:
    redis, chance = EmbeddedRedis(folder / "redis"), random.Random(KILL_SEED)
    await redis.start()
    environ = {
        "REDIS_URL": redis.url,
        "TOGETHER_API_KEY": "k",
        "IMAGE_STORE": "upstream",
        "LEASE_SECONDS": "2",
        "RETRY_BASE_SECONDS": "0.05",
        "WORKER_CONCURRENCY": "8",
        "RATE_LIMIT_MAX": "0",
        "IMAGE_RATE_LIMIT_MAX": "0",
        "IMAGE_UNITS_PER_MINUTE": "0",
        "LOG_LEVEL": "ERROR",
        "DATA_DIR": str(folder / "data"),
        "BUDGET_DAILY_USD": f"{images * IMAGE_MICRO_USD / MICRO_USD:.6f}",
    }
    try:
        with EmulatorProcess("--delay", str(CALL_S), "--image", "none") as emulator:
            environ["TOGETHER_API_URL"] = emulator.url
            services = [ServiceProcess(environ, folder / f"service{number}.log") for number in range(2)]
            async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=20)) as http:
                await asyncio.gather(*(service.start(http) for service in services))
                clients = Clients(http, services)
                submitting = asyncio.create_task(clients.submit_all(submits))
                for number in range(kills):
                    await asyncio.sleep(chance.uniform(0.1, 0.6))
                    await services[number % 2].kill()
                    await services[number % 2].start(http)
                async with asyncio.timeout(300):
                    await submitting
                    tasks = {task_id: await clients.ended(task_id) for task_id in clients.accepted}
                await check(clients, tasks, images, emulator, await used_micro_usd(redis, "imagegen"))
                assert [await service.end() for service in services] == [0, 0]
    finally:
        await redis.stop()


async def check(
    clients: Clients, tasks: dict[str, dict[str, Any]], images: int, emulator: EmulatorProcess, used: int
) -> None:
    """Check that no more was paid than the budget, and that counters, tasks and the upstream agree."""
    calls = [call for call in emulator.ledger()["calls"] if call["paid"]]
    charged = sum(round(task["cost"]["charged"] * MICRO_USD) for task in tasks.values())
    print(f"{len(tasks)} accepted, {clients.refused} refused, {len(calls)} paid calls, {charged} charged, {used} used")
    assert clients.refused
    assert len(calls) <= images
    assert used == charged <= images * IMAGE_MICRO_USD
    assert len(calls) * IMAGE_MICRO_USD <= charged


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("one_day")
async def test_two_kills_among_submits_over_the_budget_overspend_nothing(tmp_path: Path) -> None:
    await kill_while_submitting(150, 60, 2, tmp_path)


@pytest.mark.faults
@pytest.mark.timeout(600)
async def test_five_kills_among_two_thousand_submits_overspend_nothing(tmp_path: Path) -> None:
    await kill_while_submitting(2_000, 1_000, 5, tmp_path)
