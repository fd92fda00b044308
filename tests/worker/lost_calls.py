"""A provider with a list of jobs, and claims of which a call lost its answer."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from typing import Any

from imagegen.providers.model_rules import ModelTable, Pricing
from imagegen.providers.protocol import Call, CallObserver, Reply
from imagegen.queue.claim import Claim
from imagegen.tasks.provider_job import JobHandle
from tests.conftest import Instance
from tests.support import eventually
from tests.worker.conftest import ScriptedProvider, Step, WorkerHarness, images

PRICING = Pricing(ModelTable((), "scripted", date(2026, 1, 1)), unknown_micro_usd=700)
HANDLE = JobHandle("scripted", "task_1")


@dataclass
class ListingProvider(ScriptedProvider):
    """Provider whose list of jobs gives `found` in order, then nothing."""

    found: list[JobHandle | Exception | None] = field(default_factory=list)
    searched: list[tuple[Call, float]] = field(default_factory=list)
    resumed: list[JobHandle] = field(default_factory=list)

    async def find(self, call: Call, sent_at: float) -> JobHandle | None:
        self.searched.append((call, sent_at))
        found = self.found.pop(0) if self.found else None
        if isinstance(found, Exception):
            raise found
        return found

    async def resume(self, handle: JobHandle, _watcher: CallObserver) -> Reply:
        self.resumed.append(handle)
        return images()


def harness_of(
    instance: Instance, *steps: Step, found: Sequence[JobHandle | Exception | None] = (), **rules: Any
) -> WorkerHarness[ListingProvider]:
    provider = ListingProvider(list(steps), found=list(found), max_images_per_call=1)
    return WorkerHarness(instance, provider, pricing=PRICING, **rules)


async def hang(_call: Call) -> Reply:
    await asyncio.Event().wait()
    raise AssertionError


async def cut_off(one: WorkerHarness[ListingProvider], *, calls: int = 1, **fields: object) -> Claim:
    """Return a claim whose owner stopped within its last call, as a killed process does."""
    claim = await one.claim(**fields)
    attempt = asyncio.ensure_future(one.attempts.run(claim))
    await eventually(lambda: len(one.provider.calls) == calls)
    attempt.cancel()
    await asyncio.wait([attempt])
    return claim


async def taken_over(instance: Instance, claim: Claim) -> Claim:
    """Return the claim of another instance that took it over."""
    (taken,) = await instance.parts.takeover.take({claim.entry_id: 0.0}, min_idle_s=0.0)
    return taken
