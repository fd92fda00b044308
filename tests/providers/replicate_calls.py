"""A model and the emulator of Replicate, with a provider of it."""

from __future__ import annotations

from collections.abc import AsyncIterator

from aiohttp import ClientSession

from imagegen.emulator.replicate import ReplicateEmulator
from imagegen.providers.replicate import ReplicateProvider
from tests.emulated_jobs import emulated

MODEL = "black-forest-labs/flux-schnell"
LINK = "https://a.example/1.png"


async def emulated_replicate() -> AsyncIterator[ReplicateEmulator]:
    async with emulated(ReplicateEmulator, job_s=0.05) as service:
        yield service


def replicate_provider(session: ClientSession, service: ReplicateEmulator) -> ReplicateProvider:
    return ReplicateProvider(session, api_key="r8_secret", base_url=service.url, timeout_s=30, channel="main")
