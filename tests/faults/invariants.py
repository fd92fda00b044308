"""The invariants that hold once a soup of faults has come to rest.

All are checked before any failure is raised; details of the tasks concerned are printed with it.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from redis.asyncio import Redis

from tests.emulator_fixtures import EmulatorProcess
from tests.faults.load import FINAL, POISON, Load
from tests.faults.money import BROUGHT_NONE

SHOWN = 3
"""Tasks of each broken invariant that are printed."""

SILENT_S = 65.0
"""Consumers of instances that are gone are removed within some time over this."""

MAX_RESIDENT_MIB = 200
_LOG_FAULT = re.compile(r"Traceback|never retrieved|never awaited|nforeseen|CRITICAL")
FAULT_LINES = 60
"""Lines that are shown from one of these on."""


@dataclass
class Rest:
    """The world at its end. final_within_s, quiet_within_s: how long tasks, and what follows them, may take.

    timeline: when each fault was played, and its name.
    """

    redis: Redis
    prefix: str
    load: Load
    emulator: EmulatorProcess
    max_attempts: int
    final_within_s: float
    quiet_within_s: float
    timeline: list[tuple[float, str]]
    broken: dict[str, Any] = field(default_factory=dict)
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)

    async def check(self) -> str:
        """Check every invariant; return a line of figures. Raises AssertionError with every violation."""
        await self._read_all()
        self._check_states()
        excess, recorded = self._check_payments()
        await self._check_images()
        ended_at = time.monotonic() + self.quiet_within_s
        await asyncio.gather(self._check_redis(ended_at), self._check_webhooks(ended_at), self._check_ready(ended_at))
        resident = self._check_processes()
        assert not self.broken, self._report()
        failed = Counter(task["error"]["code"] for task in self.tasks.values() if task["status"] == "failed")
        return (
            f"{len(self.tasks)} accepted, failed {dict(failed)}, {excess} excess paid calls, {recorded} recorded, "
            f"{len(self.load.with_webhook)} webhooks, refused {dict(self.load.refused)}, resident MiB {resident}"
        )

    async def _read_all(self) -> None:
        ends_at = time.monotonic() + self.final_within_s
        for number, task_id in enumerate(self.load.accepted):
            service = self.load.services[number % len(self.load.services)]
            while (task := await self.load.read(task_id, service)) is None or task["status"] not in FINAL:
                if time.monotonic() > ends_at:
                    break
                await asyncio.sleep(0.05)
            self.tasks[task_id] = task or {"status": "no answer"}

    def _check_states(self) -> None:
        self._expect_none("not final", (i for i, task in self.tasks.items() if task["status"] not in FINAL))
        self._expect_none("revived", self.load.revived)
        failed = {i: task for i, task in self.tasks.items() if task["status"] == "failed"}
        self._expect_none("failed", (i for i, task in failed.items() if not self._may_fail(i, task)))
        completed = {i: task for i, task in self.tasks.items() if task["status"] == "completed"}
        attempts = (i for i, task in completed.items() if not 1 <= task["attempts"] <= self.max_attempts)
        self._expect_none("attempts", attempts)

    def _may_fail(self, task_id: str, task: dict[str, Any]) -> bool:
        """Return whether the upstream refuses the task, its entry was lost, or its calls ended without an image.

        On a slow machine few tasks run, so that one of them may have all its calls while the upstream is overloaded.
        """
        is_poison, code = POISON in self.load.accepted[task_id], task["error"]["code"]
        is_overloaded = code == "upstream_overloaded" and task["attempts"] == self.max_attempts
        return is_poison or is_overloaded or code == "interrupted" or task.get("possiblyBilledTwice", 0) >= 2

    def _check_payments(self) -> tuple[int, int]:
        """Check that no image is paid beyond the planned one and the recorded losses."""
        paid = Counter(call["prompt"] for call in self._calls() if call["paid"] and call["outcome"] not in BROUGHT_NONE)
        recorded = {i: int(task.get("possiblyBilledTwice", 0)) for i, task in self.tasks.items()}
        prompts = self.load.accepted
        self._expect_none("paid", (i for i, count in recorded.items() if paid[prompts[i]] > 1 + count))
        sent = Counter(call["prompt"] for call in self._calls())
        starts = Counter({i: sent[prompts[i]] for i in self.tasks})
        self._expect_none("unsent but recorded", (i for i, count in recorded.items() if count > starts[i] + 2))
        return sum(max(paid[prompts[i]] - 1, 0) for i in recorded), sum(recorded.values())

    async def _check_images(self) -> None:
        """Check that every image of a completed task is served."""
        gone = []
        for number, (task_id, task) in enumerate(self.tasks.items()):
            if task["status"] == "completed":
                service = self.load.services[number % len(self.load.services)]
                async with self.load.http.get(f"{service.url}/api/images/{task_id}/0") as response:
                    if (response.status, len(await response.read())) != (200, task["data"][0]["bytes"]):
                        gone.append(task_id)
        self._expect_none("images", gone)

    async def _check_redis(self, ends_at: float) -> None:
        """Check that the stream is empty, nothing is pending, dead consumers are removed and keys expire."""
        stream, outbox = f"{{{self.prefix}}}:tasks", f"{{{self.prefix}}}:outbox"

        async def entries() -> Any:
            return await self.redis.xrange(stream)

        async def pending() -> Any:
            return await self.redis.xpending_range(stream, "pool", "-", "+", 10)

        async def consumers() -> Any:
            found = await self.redis.xinfo_consumers(stream, "pool")
            return found if len(found) > len(self.load.services) else []

        async def endless() -> Any:
            keys = [key async for key in self.redis.scan_iter(f"{{{self.prefix}}}:*")]
            lasting = (stream.encode(), outbox.encode(), f"{{{self.prefix}}}:server".encode())
            return [key for key in keys if key not in lasting and await self.redis.ttl(key) == -1]

        looks = [entries, pending, endless]
        if self.quiet_within_s > SILENT_S:
            looks.append(consumers)
        for look in looks:
            await self._expect_none_by(ends_at, look)

    async def _check_webhooks(self, ends_at: float) -> None:
        """Check that every webhook was delivered or is in the outbox until its next try."""
        receivers, outbox = self.load.receivers, f"{{{self.prefix}}}:outbox"

        async def undelivered() -> Any:
            missing = self.load.with_webhook - receivers.delivered.keys()
            if time.monotonic() < ends_at - 1:
                return missing
            entries: Any = await self.redis.zrange(outbox, 0, -1)
            names = {name.decode().partition(":")[0] for name in entries}
            return missing - names

        await self._expect_none_by(ends_at, undelivered)

    async def _check_ready(self, ends_at: float) -> None:
        async def unready() -> Any:
            return [service.port for service in self.load.services if not await service.is_ready(self.load.http)]

        await self._expect_none_by(ends_at, unready)

    def _check_processes(self) -> list[int]:
        """Check that logs have no traceback and memory is not larger; return the resident MiB of each instance."""
        resident = []
        for service in self.load.services:
            lines = service.log.read_text().splitlines()
            at = [number for number, line in enumerate(lines) if _LOG_FAULT.search(line)]
            faults = ("\n".join(lines[number : number + FAULT_LINES]) for number in at)
            self._expect_none(f"log of {service.port}", faults)
            resident.append(service.resident_mib)
        self._expect_none("resident MiB", (mib for mib in resident if mib > MAX_RESIDENT_MIB))
        return resident

    async def _expect_none_by(self, ends_at: float, look: Callable[[], Awaitable[Any]]) -> None:
        while (found := await look()) and time.monotonic() < ends_at:
            await asyncio.sleep(0.5)
        self._expect_none(look.__name__, found)

    def _expect_none(self, name: str, found: Iterable[Any]) -> None:
        if found := list(found):
            self.broken[name] = found

    def _calls(self) -> list[Mapping[str, Any]]:
        return list(self.emulator.ledger()["calls"])

    def _report(self) -> str:
        """Return the violations, and for the first tasks of each kind the task, its paid calls and log lines."""
        lines = [f"{at:.2f} {name}" for at, name in self.timeline]
        calls = defaultdict(list)
        for call in self._calls():
            calls[call["prompt"]].append(
                {k: call[k] for k in ("received_at", "answered_at", "outcome", "client_there")}
            )
        logs = [line for service in self.load.services for line in service.log.read_text().splitlines()]
        for name, found in self.broken.items():
            lines.append(f"{name}: {len(found)}")
            for item in found[:SHOWN]:
                lines.append(f"  {item}")
                task_id = item[0] if isinstance(item, tuple) else item
                if task_id in self.tasks:
                    lines += [f"    {self.tasks[task_id]}", f"    calls {calls[self.load.accepted[task_id]]}"]
                    lines += [f"    {line}" for line in logs if str(task_id) in line]
        return "\n".join(lines)
