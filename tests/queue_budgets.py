"""Tasks with a price and instances with budgets, for the tests of money in the queue."""

from __future__ import annotations

import asyncio

from msgspec.structs import replace

from imagegen.errors import BudgetExceeded
from imagegen.queue.claim import Claim, StartResult
from imagegen.tasks.cost import Cost, day_of
from imagegen.tasks.submission import Submission
from imagegen.tasks.task import Task
from tests.conftest import Instance
from tests.support import submission

PRICE = 700
TOTAL, KEY = 0, 7


def priced(name: object, client: str = "", price: int | None = PRICE) -> Submission:
    return replace(submission(name), client=client, cost=Cost(price))


def cost_of(task: Task) -> Cost:
    """Return the cost of a task that has one."""
    assert task.cost is not None
    return task.cost


async def used(instance: Instance, slot: int = TOTAL) -> int:
    """Return what a budget of today holds in Redis."""
    key = instance.keys.budgets(day_of(instance.client_queue.clock()))
    (value,) = await instance.connection.commands.execute_command("BITFIELD", key, "GET", "i64", f"#{slot + 1}")
    return int(value)


def limited(instance: Instance, *limits: tuple[int, int]) -> Instance:
    instance.client_queue.limits.of_others = limits
    return instance


async def put(instance: Instance, *names: object) -> list[Task]:
    """Submit a batch that is accepted."""
    return [each.task for each in await asyncio.gather(*(instance.client_queue.submit(priced(n)) for n in names))]


async def refusals(instance: Instance, *names: object) -> list[BudgetExceeded | None]:
    """Submit a batch; return the refusal of each task, None if it is accepted."""

    async def refusal(name: object) -> BudgetExceeded | None:
        try:
            await instance.client_queue.submit(priced(name))
        except BudgetExceeded as error:
            return error
        return None

    return list(await asyncio.gather(*map(refusal, names)))


async def started(instance: Instance, *names: object) -> list[Claim]:
    await put(instance, *names)
    claims = await instance.parts.leases.hold(await instance.verbs.read_entries("i", 10, 0.01))
    for claim in claims:
        claim.checkpoint = replace(claim.checkpoint, cost=claim.cost.before_call(PRICE))
        assert await instance.worker_queue.start(claim) is StartResult.STARTED
    return claims
