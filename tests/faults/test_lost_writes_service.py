"""Service processes on a Redis that loses acknowledged writes: of 44 tasks none is lost or paid again."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.emulator_fixtures import EmulatedUpstream
from tests.faults.proxy import FaultProxy
from tests.faults.servers import RedisServer, primary_and_replica, promote
from tests.forked import ForkedProcess
from tests.ports import free_port
from tests.support import ADMIN_TOKEN, AS_ADMIN, eventually

ROOT = Path(__file__).resolve().parents[2]
STREAM = "{imagegen}:tasks"
FINISHED, RUNNING, WAITING = 20, 4, 20
NOT_FOUND = 50
"""Answers of 404 that another instance may give before it has noticed the loss."""


class Fleet:
    """Service processes with some slots together, and a client that records the accepted tasks."""

    def __init__(self, http: aiohttp.ClientSession, folder: Path, settings: dict[str, str], slots: int) -> None:
        self._http, self._folder, self._settings, self._slots = http, folder, settings, slots
        self._processes: list[ForkedProcess] = []
        self.urls: list[str] = []
        self.accepted: dict[str, str] = {}
        self.not_found = 0

    async def start(self, count: int) -> None:
        for number in range(count):
            port = free_port()
            environ = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ} | self._settings
            environ |= {"PORT": str(port), "DATA_DIR": str(self._folder / f"data{number}")}
            environ |= {"WORKER_CONCURRENCY": str(self._slots // count), "ADMIN_TOKEN": ADMIN_TOKEN}
            process = await asyncio.to_thread(
                ForkedProcess, [str(ROOT / "run.py")], cwd=self._folder, env=environ, stdout=2
            )
            self._processes.append(process)
            self.urls.append(f"http://127.0.0.1:{port}")
        for url in self.urls:
            await eventually(partial(self._ready, url), within_s=60)
        await eventually(lambda: self._know_each_other(count), within_s=20)

    async def end(self) -> list[int]:
        for process in self._processes:
            process.terminate()
        return [await asyncio.to_thread(process.wait) for process in self._processes]

    async def kill(self) -> None:
        for process in self._processes:
            process.kill()
            await asyncio.to_thread(process.wait)

    async def submit(self, kind: str, count: int) -> list[str]:
        ids = []
        for number in range(count):
            url, prompt = self.urls[number % len(self.urls)], f"{kind} {number}"
            async with self._http.post(f"{url}/api/images/generate", json={"prompt": prompt}) as answer:
                assert answer.status in (200, 202), await answer.text()
                ids.append((await answer.json())["taskId"])
            self.accepted[ids[-1]] = prompt
        return ids

    async def submit_at_both(self, kind: str, count: int) -> None:
        """Submit tasks at once, each at all instances; again where Redis is away."""

        async def submit(url: str, number: int) -> bool:
            async with self._http.post(f"{url}/api/images/generate", json={"prompt": f"{kind} {number}"}) as answer:
                return answer.status in (200, 202)

        submits = [eventually(partial(submit, url, number)) for url in self.urls for number in range(count)]
        await asyncio.gather(*submits)

    async def all_are(self, ids: Iterable[str], *states: str | None) -> bool:
        """Return whether every instance has these tasks in one of these states."""
        return all([await self.state(url, task_id) in states for url in self.urls for task_id in ids])

    async def state(self, url: str, task_id: str) -> str | None:
        async with self._http.get(f"{url}/api/images/{task_id}") as answer:
            self.not_found += answer.status == 404
            status: str | None = (await answer.json()).get("status")
            return status

    async def billed_twice(self) -> int:
        """Return the calls that the tasks count as paid twice."""
        counts = []
        for task_id in self.accepted:
            async with self._http.get(f"{self.urls[0]}/api/images/{task_id}") as answer:
                counts.append((await answer.json()).get("possiblyBilledTwice", 0))
        return sum(counts)

    async def stats(self, url: str) -> dict[str, Any]:
        async with self._http.get(f"{url}/api/stats", headers=AS_ADMIN) as answer:
            return dict(await answer.json())

    async def _know_each_other(self, count: int) -> bool:
        return all([(await self.stats(url))["instance"]["instances"] == count for url in self.urls])

    async def _ready(self, url: str) -> bool:
        try:
            async with self._http.get(f"{url}/readyz") as answer:
                return answer.status == 200
        except (aiohttp.ClientError, TimeoutError):
            return False


@asynccontextmanager
async def fleet(folder: Path, redis_url: str, upstream: str, count: int, slots: int = RUNNING) -> AsyncIterator[Fleet]:
    settings = {
        "REDIS_URL": redis_url,
        "TOGETHER_API_KEY": "k",
        "TOGETHER_API_URL": upstream,
        "IMAGE_STORE": "upstream",
        "LEASE_SECONDS": "6",
        "RATE_LIMIT_MAX": "0",
        "IMAGE_RATE_LIMIT_MAX": "0",
        "LOG_LEVEL": "ERROR",
    }
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10)) as http:
        fleet = Fleet(http, folder, settings, slots)
        try:
            await fleet.start(count)
            yield fleet
            assert await fleet.end() == [0] * count
        finally:
            await fleet.kill()


async def failover(primary: RedisServer, replica: RedisServer, proxy: FaultProxy) -> None:
    proxy.to(replica.path)
    proxy.cut()
    await primary.kill()


async def restart_empty(primary: RedisServer, _replica: RedisServer, _proxy: FaultProxy) -> None:
    await primary.kill()
    await primary.start()


async def flush(primary: RedisServer, _replica: RedisServer, _proxy: FaultProxy) -> None:
    await primary.redis.flushall()


async def delete_stream(primary: RedisServer, _replica: RedisServer, _proxy: FaultProxy) -> None:
    await primary.redis.delete(STREAM)


async def trim_stream(primary: RedisServer, _replica: RedisServer, _proxy: FaultProxy) -> None:
    await primary.redis.xtrim(STREAM, maxlen=0, approximate=False)


async def destroy_group(primary: RedisServer, _replica: RedisServer, _proxy: FaultProxy) -> None:
    await primary.redis.xgroup_destroy(STREAM, "pool")


Loss = Callable[[RedisServer, RedisServer, FaultProxy], Awaitable[None]]


async def lose(folder: Path, count: int, loss: Loss) -> None:
    async with AsyncExitStack() as stack:
        primary, replica = await stack.enter_async_context(primary_and_replica(folder / "redis"))
        proxy = await stack.enter_async_context(FaultProxy(primary.path))
        upstream = await stack.enter_async_context(EmulatedUpstream(image="none"))
        instances = await stack.enter_async_context(fleet(folder, proxy.url, upstream.url, count))
        if loss is failover:
            await promote(primary, replica)
        finished = await instances.submit("finished", FINISHED)
        await eventually(lambda: instances.all_are(finished, "completed"), within_s=20)
        upstream.script({"fault": "ok", "delay_s": 6.0, "times": RUNNING, "match": "running"})
        await instances.submit("running", RUNNING)
        await upstream.ledger.wait_for(lambda ledger: ledger.in_flight == RUNNING)
        await instances.submit("waiting", WAITING)
        await loss(primary, replica, proxy)
        instances.not_found = 0
        await eventually(lambda: instances.all_are(instances.accepted, "completed", "failed"), within_s=90)
        assert await instances.all_are(instances.accepted, "completed")
        paid = Counter(call.prompt for call in upstream.ledger.paid)
        assert paid == Counter(instances.accepted.values())
        written_back = Counter[str]()
        for url in instances.urls:
            written_back.update((await instances.stats(url))["redis"]["writtenBack"])
        assert loss is not failover or instances.not_found <= NOT_FOUND
        print(f"{loss.__name__}, {count} instances, {len(paid)} tasks; written back: {dict(written_back)}")


async def test_a_failover_loses_no_task_and_pays_nothing_twice(tmp_path: Path) -> None:
    await lose(tmp_path, 2, failover)


@pytest.mark.faults
async def test_tasks_that_end_in_the_lost_window_of_four_instances_are_paid_once(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        primary, replica = await stack.enter_async_context(primary_and_replica(tmp_path / "redis"))
        proxy = await stack.enter_async_context(FaultProxy(primary.path))
        upstream = await stack.enter_async_context(EmulatedUpstream(image="none"))
        instances = await stack.enter_async_context(fleet(tmp_path, proxy.url, upstream.url, 4, slots=16))
        upstream.script({"fault": "ok", "delay_s": 0.5, "times": 60})
        await instances.submit("ends", 60)
        await promote(primary, replica)
        await eventually(lambda: len(upstream.ledger.paid) >= 50, within_s=20)
        await failover(primary, replica, proxy)
        await eventually(lambda: instances.all_are(instances.accepted, "completed"), within_s=60)
        assert Counter(call.prompt for call in upstream.ledger.paid) == Counter(instances.accepted.values())
        assert await instances.billed_twice() == 0


@pytest.mark.faults
@pytest.mark.parametrize("loss", [failover, flush])
async def test_submits_at_the_moment_of_a_loss_join_the_tasks_that_run(tmp_path: Path, loss: Loss) -> None:
    async with AsyncExitStack() as stack:
        primary, replica = await stack.enter_async_context(primary_and_replica(tmp_path / "redis"))
        proxy = await stack.enter_async_context(FaultProxy(primary.path))
        upstream = await stack.enter_async_context(EmulatedUpstream(image="none"))
        instances = await stack.enter_async_context(fleet(tmp_path, proxy.url, upstream.url, 2, slots=16))
        await promote(primary, replica)
        upstream.script({"fault": "ok", "delay_s": 5.0, "times": 16})
        await instances.submit("runs", 16)
        await upstream.ledger.wait_for(lambda ledger: ledger.in_flight == 16)
        losing = asyncio.ensure_future(loss(primary, replica, proxy))
        for _ in range(5):
            await instances.submit_at_both("runs", 16)
        await losing
        await eventually(lambda: instances.all_are(instances.accepted, "completed"), within_s=60)
        assert Counter(call.prompt for call in upstream.ledger.paid) == Counter(instances.accepted.values())


@pytest.mark.faults
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("loss", [failover, restart_empty, flush, delete_stream, trim_stream, destroy_group])
async def test_tasks_in_memory_survive_every_loss_and_are_paid_once(tmp_path: Path, loss: Loss, count: int) -> None:
    await lose(tmp_path, count, loss)
