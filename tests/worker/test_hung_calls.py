"""Tests that calls that hang, and hang again when they are repeated, leave slots to others."""

from __future__ import annotations

import asyncio

from imagegen.providers.protocol import Call, Reply
from imagegen.tasks.task import State, WaitReason
from tests.support import eventually
from tests.worker.conftest import MakeHarness, WorkerHarness, images, loss
from tests.worker.pool_load import states


class Hanging:
    """An upstream that gives no answer to the first call for a prompt that hangs, nor to its repeat until `ends`."""

    def __init__(self) -> None:
        self.ends = asyncio.Event()
        self.begun: list[str] = []
        self.repeating = self.most_repeating = 0

    async def __call__(self, call: Call) -> Reply:
        prompt = call.request.prompt
        if "hangs" in prompt:
            self.begun.append(prompt)
            if self.begun.count(prompt) == 1:
                raise loss()
            self.repeating += 1
            self.most_repeating = max(self.most_repeating, self.repeating)
            await self.ends.wait()
            self.repeating -= 1
        return images(call.count)


async def hanging(make_harness: MakeHarness) -> tuple[WorkerHarness, Hanging, list[str]]:
    """Return an instance of four slots, half of them for repeats, with four tasks that hang once more."""
    harness, upstream = make_harness(slots=4, most_hung=2), Hanging()
    harness.provider.default = upstream
    ids = [await harness.submit(f"hangs {number}") for number in range(4)]
    await eventually(lambda: len(upstream.begun) == 6)
    return harness, upstream, ids


async def test_repeats_of_calls_that_hung_leave_half_of_the_slots_to_others(make_harness: MakeHarness) -> None:
    harness, upstream, hung = await hanging(make_harness)
    await eventually(lambda: [harness.task(task_id).reason for task_id in hung].count(WaitReason.RETRYING) == 2)
    others = [await harness.submit(f"other {number}") for number in range(6)]
    assert await states(harness, others) == {State.COMPLETED}
    assert len(upstream.begun) == 6
    upstream.ends.set()
    tasks = await harness.finished(*hung)
    assert {(task.state, task.possibly_billed_twice) for task in tasks} == {(State.COMPLETED, 1)}
    assert (len(upstream.begun), upstream.most_repeating) == (8, 2)


async def test_a_task_that_waits_to_repeat_a_call_that_hung_is_released_by_a_stop(make_harness: MakeHarness) -> None:
    harness, upstream, _ = await hanging(make_harness)
    harness.pool.quiet()
    upstream.ends.set()
    await harness.pool.wait_idle(10)
    assert len(upstream.begun) == 6
    assert not harness.pool.active_claims
