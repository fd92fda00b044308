"""Money after faults: the usage report, the budgets in Redis and the upstream's own ledger agree."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import aiohttp

from imagegen.providers.model_rules import Pricing
from imagegen.providers.model_table import load_table
from imagegen.tasks.request import GenerationRequest
from tests.support import AS_ADMIN

BROUGHT_NONE = (500, 503)
"""Outcomes of calls that the emulator counts as paid and that returned no image."""


class Money(NamedTuple):
    """Micro-dollars: of the usage report, the part of it that is unsure, and what the budget of all clients holds."""

    spent: int
    unsure: int
    budget: int


def charged(calls: Iterable[Mapping[str, Any]]) -> int:
    """Return the micro-dollars of the calls in the emulator's ledger, by the same table of prices."""
    pricing = Pricing(load_table("together", None))
    total = 0
    for call in calls:
        if call["paid"] and call["outcome"] not in BROUGHT_NONE:
            body = call["body"]
            request = GenerationRequest(
                prompt="", model=call["model"], width=body["width"], height=body["height"], n=1, steps=body.get("steps")
            )
            price = pricing.call_price(request, call["model"], call["n"])
            assert price, call
            total += price
    return total


async def read_money(http: aiohttp.ClientSession, url: str) -> Money:
    """Read the usage report and the budget of today."""
    async with http.get(f"{url}/api/usage", headers=AS_ADMIN) as answer:
        total = (await answer.json())["total"]
    async with http.get(f"{url}/api/stats", headers=AS_ADMIN) as answer:
        (budget,) = (await answer.json())["budgets"]
    return Money(*(round(dollars * 1_000_000) for dollars in (total["spent"], total["ambiguous"], budget["used"])))


async def check_money(
    http: aiohttp.ClientSession, url: str, calls: Callable[[], Iterable[Mapping[str, Any]]], within_s: float
) -> str:
    """Check that report and budget become equal, and that the upstream charged no less and no more than they say.

    calls: returns the upstream's ledger. Return a line of figures.
    """
    ends_at = time.monotonic() + within_s
    while (money := await read_money(http, url)).spent != money.budget and time.monotonic() < ends_at:
        await asyncio.sleep(0.1)
    assert money.spent == money.budget, money
    upstream = charged(calls())
    assert money.spent - money.unsure <= upstream <= money.spent, (money, upstream)
    return f"spent {money.spent} micro-dollars, {money.unsure} of them unsure, upstream {upstream}"
