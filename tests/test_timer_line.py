"""Timers of one duration."""

from __future__ import annotations

import asyncio
from functools import partial

import pytest

from imagegen.timer_line import TimeLimit, TimerLine
from tests.support import LoopTime


async def test_timers_end_after_their_duration_in_order_but_for_cancelled_ones() -> None:
    time, line, ended = LoopTime(), TimerLine(10.0), list[int]()
    for number in range(4):
        timer = line.begin(partial(ended.append, number))
        if number in (0, 2):
            timer.cancel()
        await time.move(4.0)
    assert ended == [1]  # begun at 4, and it is 16 now
    await time.move(5.0)
    assert ended == [1]
    await time.move(1.5)
    assert ended == [1, 3]
    line.begin(lambda: ended.append(4))
    await time.move(10.5)
    assert ended == [1, 3, 4]


async def test_a_timer_that_another_one_cancels_when_both_are_due_does_not_end() -> None:
    time, line, ended = LoopTime(), TimerLine(1.0), list[str]()

    def end() -> None:
        ended.append("first")
        second.cancel()

    line.begin(end)
    second = line.begin(lambda: ended.append("second"))
    await time.move(2.0)
    assert ended == ["first"]


async def test_a_timer_that_begins_again_at_its_end_delays_no_other_timer() -> None:
    time, line, ended = LoopTime(), TimerLine(1.0), list[str]()
    line.begin(lambda: line.begin(lambda: ended.append("again")))
    await time.move(0.5)
    line.begin(lambda: ended.append("other"))
    await time.move(0.6)
    await time.move(0.5)
    assert ended == ["other"]
    await time.move(0.6)
    assert ended == ["other", "again"]


async def test_an_error_in_a_timer_ends_no_other_timer_of_its_line() -> None:
    time, line, ended, errors = LoopTime(), TimerLine(1.0), list[str](), list[object]()
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: errors.append(context["exception"]))
    line.begin(lambda: 1 // 0)
    line.begin(lambda: ended.append("second"))
    await time.move(2.0)
    await time.move(0.0)
    assert ended == ["second"]
    assert [type(error) for error in errors] == [ZeroDivisionError]


async def test_a_block_over_its_time_limit_raises_a_timeout_and_its_task_goes_on() -> None:
    time, line = LoopTime(), TimerLine(5.0)
    moving = asyncio.create_task(time.move(6.0))
    with pytest.raises(TimeoutError), TimeLimit(line):
        await asyncio.Event().wait()
    await moving
    assert asyncio.current_task().cancelling() == 0  # type: ignore[union-attr]


async def test_a_cancelled_task_ends_as_cancelled_within_a_time_limit_too() -> None:
    line = TimerLine(5.0)

    async def wait() -> None:
        with TimeLimit(line):
            await asyncio.Event().wait()

    waiting = asyncio.create_task(wait())
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting


async def test_a_block_that_ends_in_time_is_not_cancelled_later() -> None:
    time, line = LoopTime(), TimerLine(5.0)
    with TimeLimit(line):
        await time.move(4.0)
    await time.move(20.0)


def test_a_line_begins_again_in_another_loop() -> None:
    line = TimerLine(0.01)

    async def wait() -> None:
        ended = asyncio.Event()
        line.begin(ended.set)
        await ended.wait()

    asyncio.run(wait())
    asyncio.run(wait())
