"""The time limit of calls, which is to do what `asyncio.timeout` does."""

import asyncio
import time

import pytest

from imagegen.providers.timelimit import TimeLimit


async def overdue(limit: TimeLimit) -> None:
    with limit.block():
        await asyncio.Event().wait()


async def test_a_block_that_takes_too_long_is_a_timeout_and_its_task_goes_on():
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        await overdue(TimeLimit(0.05))
    assert 0.04 < time.monotonic() - began < 1.0
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    await asyncio.sleep(0)


async def test_a_block_that_ends_in_time_is_left_alone():
    limit = TimeLimit(0.3)
    with limit.block():
        await asyncio.sleep(0)
    await asyncio.sleep(0.4)  # nothing is to happen when its time would have been over


async def test_each_block_has_its_whole_time_though_one_timer_serves_all():
    async def one(delay_s: float) -> float:
        await asyncio.sleep(delay_s)
        began = time.monotonic()
        with pytest.raises(TimeoutError):
            await overdue(limit)
        return time.monotonic() - began

    limit = TimeLimit(0.1)
    with limit.block():
        await asyncio.sleep(0)
    took_s = await asyncio.gather(*(one(delay_s) for delay_s in (0.0, 0.03, 0.06, 0.15)))
    assert all(taken > 0.09 for taken in took_s)


async def test_a_cancellation_from_elsewhere_stays_one():
    running = asyncio.create_task(overdue(TimeLimit(0.3)))
    await asyncio.sleep(0)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    await asyncio.sleep(0.4)  # nothing is to happen when its time would have been over


async def test_a_cancellation_at_the_same_time_wins():
    async def late() -> None:
        with limit.block():
            try:
                await asyncio.Event().wait()
            finally:
                running.cancel()

    limit = TimeLimit(0.02)
    running = asyncio.create_task(late())
    with pytest.raises(asyncio.CancelledError):
        await running


async def test_an_error_of_the_block_is_told_as_it_is():
    with pytest.raises(ValueError, match="its own"), TimeLimit(0.05).block():
        raise ValueError("its own")
