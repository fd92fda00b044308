"""Clients of a soup of faults, and the receivers of their webhooks; both record every response and delivery."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Self

import aiohttp
from aiohttp import web

from tests.faults.fleet import ServiceProcess

CALL_S = 0.15
SLOTS = 4
STALE_S = 2.0
"""An instance may answer for so long what it read of another one's task."""

FINAL = frozenset({"completed", "failed", "cancelled"})
POISON = "{{fault:500}}"
POISON_EACH, WEBHOOK_EACH, SLOW_WEBHOOK_EACH = 40, 7, 42
SLOW_RECEIVER_S = 2.0


class Receivers:
    """Two webhook receivers on one port: one responds at once, one after `SLOW_RECEIVER_S`. They can be restarted.

    delivered: how often each task's webhook was answered with 200.
    """

    def __init__(self) -> None:
        self.delivered: Counter[str] = Counter()
        self._port = 0
        self._runner: web.AppRunner | None = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    def url(self, delay_s: float) -> str:
        return f"http://127.0.0.1:{self._port}/{delay_s:g}/"

    async def start(self) -> None:
        app = web.Application()
        app.router.add_post("/{delay_s}/", self._take)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self._port, reuse_address=True).start()
        self._port = int(self._runner.addresses[0][1])

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _take(self, request: web.Request) -> web.Response:
        task_id = (await request.json())["data"]["taskId"]
        await asyncio.sleep(float(request.match_info["delay_s"]))
        self.delivered[task_id] += 1
        return web.Response()


@dataclass
class Load:
    """Clients that submit, read, watch and leave.

    accepted: prompt of each accepted task; with_webhook: those with one; finals: the first final state of each task,
    and when it was seen; revived: tasks that were seen in another state after a final one.
    """

    http: aiohttp.ClientSession
    services: Sequence[ServiceProcess]
    receivers: Receivers
    chance: random.Random
    accepted: dict[str, str] = field(default_factory=dict)
    with_webhook: set[str] = field(default_factory=set)
    finals: dict[str, tuple[str, float]] = field(default_factory=dict)
    revived: list[tuple[str, str]] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    number: int = 0

    async def run(self) -> None:
        """Run all clients until this is cancelled."""
        async with asyncio.TaskGroup() as group:
            for client in (self._submit_forever(), self._read_forever(), self._leave_forever()):
                group.create_task(client)

    async def read(self, task_id: str, service: ServiceProcess) -> dict[str, Any] | None:
        """Return the task from an instance; None if it does not respond."""
        with suppress(aiohttp.ClientError, TimeoutError):
            async with self.http.get(f"{service.url}/api/images/{task_id}") as response:
                task: dict[str, Any] = await response.json()
                if response.status != 200:
                    return {"status": task.get("status", "")} if response.status == 404 else None
                self._compare(task_id, task)
                return task
        return None

    def _compare(self, task_id: str, task: dict[str, Any]) -> None:
        """Record a task that left its final state."""
        status, now = task["status"], time.monotonic()
        if task_id not in self.finals:
            if status in FINAL:
                self.finals[task_id] = status, now
            return
        before, seen_at = self.finals[task_id]
        if status != before and (status in FINAL or now > seen_at + STALE_S):
            self.revived.append((task_id, f"{before} -> {status} after {now - seen_at:.1f} s"))

    async def _submit_forever(self) -> None:
        while True:
            await self._submit()
            await asyncio.sleep(CALL_S / SLOTS)

    async def _submit(self) -> None:
        """Submit one new task to one instance, else to the other."""
        self.number += 1
        poison = POISON if self.number % POISON_EACH == 0 else ""
        body: dict[str, Any] = {"prompt": f"soup task {self.number} {poison}".rstrip()}
        if self.number % WEBHOOK_EACH == 0:
            slow = self.number % SLOW_WEBHOOK_EACH == 0
            body["webhook"] = {"url": self.receivers.url(SLOW_RECEIVER_S if slow else 0)}
        for service in self.chance.sample(self.services, len(self.services)):
            if await self._is_accepted(service, body):
                return

    async def _is_accepted(self, service: ServiceProcess, body: dict[str, Any]) -> bool:
        with suppress(aiohttp.ClientError, TimeoutError):
            async with self.http.post(f"{service.url}/api/images/generate", json=body) as response:
                answer = await response.json()
                if response.status in (200, 202):
                    self.accepted[answer["taskId"]] = body["prompt"]
                    if "webhook" in body:
                        self.with_webhook.add(answer["taskId"])
                    return True
                self.refused[f"{response.status} {answer['code']}"] += 1
        return False

    async def _read_forever(self) -> None:
        while True:
            await asyncio.sleep(0.05)
            if self.accepted:
                await self.read(self.chance.choice(list(self.accepted)), self.chance.choice(self.services))

    async def _leave_forever(self) -> None:
        """Open images and event streams, and leave before they end."""
        while True:
            await asyncio.sleep(0.1)
            if self.accepted:
                task_id, service = self.chance.choice(list(self.accepted)), self.chance.choice(self.services)
                path = self.chance.choice((f"{task_id}/0", f"{task_id}/events"))
                with suppress(aiohttp.ClientError, TimeoutError):
                    async with self.http.get(f"{service.url}/api/images/{path}") as response:
                        await response.content.read(10)
