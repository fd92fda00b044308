"""Models and emulator of DashScope, and calls of them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

from aiohttp import ClientSession

from imagegen.emulator.dashscope import DashScopeEmulator
from imagegen.providers.dashscope import DashScopeProvider
from imagegen.providers.protocol import Call
from tests.emulated_jobs import emulated
from tests.providers.conftest import MakeCall

MakeProvider = Callable[..., DashScopeProvider]

OLD, MESSAGE, SYNC = "wanx2.1-t2i-turbo", "wan2.6-t2i", "qwen-image-2.0"


def prompted(make_call: MakeCall, switch: str = "", model: str = OLD, **fields: Any) -> Call:
    prompt = f"a cat {{{{fault:{switch}}}}}" if switch else "a cat"
    return make_call(model=model, prompt=prompt, count=fields.get("n", 1), **fields)


async def emulated_dashscope(quick: None) -> AsyncIterator[DashScopeEmulator]:
    async with emulated(DashScopeEmulator, job_s=0.05, price_usd=0.03) as upstream:
        yield upstream


def provider_maker(session: ClientSession, upstream: DashScopeEmulator) -> MakeProvider:
    return lambda key="sk-a-key": DashScopeProvider(session, api_key=key, timeout_s=30, base_url=upstream.url)
