"""Tests that failing tasks and paused models take no slot from others."""

from __future__ import annotations

import asyncio

import pytest

from imagegen.errors import UpstreamError
from imagegen.providers.protocol import Call, Reply
from imagegen.tasks.task import State, WaitReason
from imagegen.worker.circuit_breaker import BreakerConfig
from tests.support import eventually
from tests.worker.conftest import MakeHarness, WorkerHarness, fault, images, loss
from tests.worker.pool_load import states, submit_many


async def undisturbed_s(harness: WorkerHarness) -> float:
    """Return the seconds of ten good tasks alone; on a busy machine all other times are longer by the same factor."""
    began = asyncio.get_running_loop().time()
    task_ids = [await harness.submit(f"good alone {number}") for number in range(10)]
    assert await states(harness, task_ids, within_s=30.0) == {State.COMPLETED}
    return asyncio.get_running_loop().time() - began


async def test_a_paused_model_does_not_block_another(make_harness: MakeHarness) -> None:
    harness = make_harness(fault(429, retry_after_s=60.0), tempo=BreakerConfig())
    first = await harness.submit("first", model="busy")
    await eventually(lambda: harness.pacing.blocked("busy"))
    paused = [await harness.submit(i, model="busy") for i in range(8)]
    await eventually(lambda: len(harness.pool.parking) == 8)
    assert await states(harness, [await harness.submit("other")]) == {State.COMPLETED}
    for task_id in (first, *paused):
        task = harness.task(task_id)
        assert (task.state, task.attempts) == (State.PENDING, 0)
    reasons = [harness.task(task_id).reason for task_id in paused]
    assert reasons.count(WaitReason.UPSTREAM_RATE_LIMITED) == 8
    assert len(harness.provider.calls) == 2


class Faulty:
    """An upstream that always returns the error for prompts that name a fault, and images otherwise."""

    def __init__(self, error: Exception, call_s: float = 0.005) -> None:
        self.error, self.call_s = error, call_s

    async def __call__(self, call: Call) -> Reply:
        await asyncio.sleep(self.call_s)
        if "faulty" in call.request.prompt:
            raise self.error
        return images(call.count)


def mixed(faulty: int, good: int, order: str) -> list[str]:
    """Return the prompts with the faulty ones first or between the good ones."""
    bad, fine = [f"faulty {i}" for i in range(faulty)], [f"good {i}" for i in range(good)]
    if order == "first":
        return bad + fine
    step = len(fine) // len(bad)
    beside = [prompt for i, one in enumerate(bad) for prompt in (*fine[i * step : (i + 1) * step], one)]
    return beside + fine[len(bad) * step :]


@pytest.mark.parametrize("order", ["first", "spread"])
@pytest.mark.parametrize("faulty", [5, 12])
@pytest.mark.parametrize("error", [fault(500), fault(502, ambiguous=True), loss()], ids=["500", "502", "loss"])
async def test_tasks_that_always_fail_end_and_delay_no_good_task(
    make_harness: MakeHarness, error: UpstreamError, faulty: int, order: str
) -> None:
    tempo = BreakerConfig(0.05, 0.5, longest_s=0.5, step_s=0.05)
    harness = make_harness(default=Faulty(error), base_s=0.3, tempo=tempo)
    slack_s = 10 * await undisturbed_s(harness)
    prompts = mixed(faulty, 30, order)
    ids = dict(zip(prompts, [await harness.submit(prompt) for prompt in prompts], strict=True))
    good = [ids[prompt] for prompt in prompts if "good" in prompt]
    assert await states(harness, good, within_s=1.5 + slack_s) == {State.COMPLETED}
    bad = await harness.finished(*(ids[prompt] for prompt in prompts if "faulty" in prompt), within_s=5.0 + slack_s)
    most = 2 if error.ambiguous else 3
    assert {(task.state, task.attempts) for task in bad} == {(State.FAILED, most)}
    probes = slack_s / tempo.probe_s  # of a pause that began because of a slow machine
    assert len(harness.provider.calls) <= 10 + 30 + faulty * most + probes


async def test_failures_of_one_model_do_not_affect_another(make_harness: MakeHarness) -> None:
    harness = make_harness(default=Faulty(fault(500)), base_s=60.0, tempo=BreakerConfig())
    for i in range(8):
        await harness.submit(f"faulty {i}", model="broken")
    await eventually(lambda: harness.pacing.blocked("broken"))
    assert await states(harness, await submit_many(harness, 10)) == {State.COMPLETED}


async def test_tasks_of_a_paused_model_take_no_slot_from_others(
    make_harness: MakeHarness,
) -> None:
    harness = make_harness(fault(429, retry_after_s=60.0), tempo=BreakerConfig(), slots=2)
    await harness.submit("first", model="busy")
    await eventually(lambda: harness.pacing.blocked("busy"))
    waiting = [await harness.submit(i, model="busy") for i in range(300)]
    assert await states(harness, [await harness.submit("other")]) == {State.COMPLETED}
    assert {harness.task(task_id).reason for task_id in waiting} == {WaitReason.UPSTREAM_RATE_LIMITED}
    assert len(harness.provider.calls) == 2
