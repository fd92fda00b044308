"""Tasks with a price and instances with budgets, for the tests of money in the queue."""

from __future__ import annotations

import asyncio

from msgspec.structs import replace

from imagegen.queue.claim import StartResult
from imagegen.tasks.cost import Cost, day_of
from tests.support import submission

PRICE = 700
TOTAL, KEY = 0, 7


def priced(name: object, client: str = "", price: int | None = PRICE):
    return replace(submission(name), client=client, cost=Cost(price))


async def used(instance, slot: int = TOTAL) -> int:
    """Return what a budget of today holds in Redis."""
    key = instance.keys.budgets(day_of(instance.client_queue.clock()))
    (value,) = await instance.connection.commands.execute_command("BITFIELD", key, "GET", "i64", f"#{slot + 1}")
    return int(value)


def limited(instance, *limits: tuple[int, int]):
    instance.client_queue.limits.of_others = limits
    return instance


async def put(instance, *names):
    results = await asyncio.gather(*(instance.client_queue.submit(priced(n)) for n in names), return_exceptions=True)
    return [result if isinstance(result, BaseException) else result.task for result in results]


async def started(instance, *names):
    await put(instance, *names)
    claims = await instance.parts.leases.hold(await instance.verbs.read_entries("i", 10, 0.01))
    for claim in claims:
        claim.checkpoint = replace(claim.checkpoint, cost=claim.cost.before_call(PRICE))
        assert await instance.worker_queue.start(claim) is StartResult.STARTED
    return claims
