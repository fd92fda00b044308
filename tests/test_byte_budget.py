"""Tests of the byte budget: bounded memory, ordered waits, timeouts."""

from __future__ import annotations

import asyncio

from imagegen.byte_budget import ByteBudget


async def test_what_fits_is_taken_immediately_and_the_rest_waits_in_order() -> None:
    budget, order = ByteBudget(10), []

    async def take(name: str, size: int) -> None:
        await budget.take(size, within_s=60.0)
        order.append(name)

    await take("first", 8)
    waiting = [asyncio.create_task(take("second", 9)), asyncio.create_task(take("third", 1))]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert order == ["first"]
    budget.give(8)
    await asyncio.gather(*waiting)
    assert order == ["first", "second", "third"]
    assert budget.held == 10


async def test_a_single_holder_may_exceed_the_limit() -> None:
    budget = ByteBudget(10)
    await budget.take(100, within_s=0.0)
    assert not budget.try_take(1)
    budget.give(100)
    assert budget.try_take(10)


async def test_a_wait_ends_at_its_timeout() -> None:
    budget = ByteBudget(10)
    assert budget.try_take(10)
    await budget.take(5, within_s=0.01)
    assert budget.held == 15


async def test_a_cancelled_waiter_admits_the_next() -> None:
    budget = ByteBudget(10)
    assert budget.try_take(8)
    leaver = asyncio.create_task(budget.take(9, within_s=60.0))
    await asyncio.sleep(0)
    follower = asyncio.create_task(budget.take(2, within_s=60.0))
    await asyncio.sleep(0)
    leaver.cancel()
    await asyncio.wait_for(follower, 20)
    assert budget.held == 10
