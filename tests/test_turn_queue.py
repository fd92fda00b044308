"""Tests of the queue of waiters that one event wakes."""

from __future__ import annotations

import asyncio

import pytest

from imagegen.turn_queue import PER_TURN, TurnQueue
from tests.support import Turns

WAITERS = 10 * PER_TURN


class Refused(Exception):
    """What the shared work raises."""


async def fails() -> int:
    raise Refused


async def test_a_shared_result_goes_to_few_in_one_turn_and_in_the_order_of_arrival() -> None:
    queue, end, resumed = TurnQueue(), asyncio.Event(), list[int]()

    async def work() -> str:
        await end.wait()
        return "result"

    async def wait(number: int) -> str:
        result = await queue.result_of(shared)
        resumed.append(number)
        return result

    shared = asyncio.create_task(work())
    waiting = asyncio.gather(*(wait(number) for number in range(WAITERS)))
    await asyncio.sleep(0)
    turns = Turns(lambda: len(resumed))
    end.set()
    assert await waiting == ["result"] * WAITERS
    assert turns.most() <= PER_TURN
    assert resumed == list(range(WAITERS))


async def test_one_who_leaves_takes_nothing_from_the_others() -> None:
    queue, end = TurnQueue(), asyncio.Event()
    shared = asyncio.create_task(end.wait())
    waiting = [asyncio.create_task(queue.result_of(shared)) for _ in range(3)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    end.set()
    await asyncio.sleep(0)
    waiting[1].cancel()
    left, left_later, result = await asyncio.gather(*waiting, return_exceptions=True)
    assert isinstance(left, asyncio.CancelledError)
    assert isinstance(left_later, asyncio.CancelledError)
    assert result is True


async def test_a_failure_goes_to_all_who_wait() -> None:
    queue = TurnQueue()
    shared = asyncio.create_task(fails())
    results = await asyncio.gather(*(queue.result_of(shared) for _ in range(3)), return_exceptions=True)
    assert [type(result) for result in results] == [Refused] * 3
    with pytest.raises(Refused):
        await queue.result_of(shared)
