"""Tests that failing tasks and paused models take no slot from others."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import pytest

from imagegen.errors import UpstreamError
from imagegen.providers.job_polling import JobState, Poll, poll_until_end
from imagegen.providers.protocol import Call, CallObserver, Reply
from imagegen.tasks.provider_job import JobHandle
from imagegen.tasks.task import State, WaitReason
from imagegen.worker.circuit_breaker import BreakerConfig
from imagegen.worker.job_wait import JOB_SLOT_S
from tests.conftest import MakeInstance
from tests.support import eventually
from tests.worker.conftest import TEMPO, MakeHarness, ScriptedProvider, WorkerHarness, fault, images, loss
from tests.worker.pool_load import states, submit_many


async def pass_waits(harness: WorkerHarness, task_ids: list[str]) -> None:
    """Let time pass, not within a call of Redis, until tasks that fail again and again have ended."""
    while not all(harness.task(task_id).state.is_final for task_id in task_ids):
        await harness.instance.connection.ping()
        await harness.pass_time(5)


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
    harness = make_harness(default=Faulty(error), base_s=60.0, tempo=tempo)
    prompts = mixed(faulty, 30, order)
    ids = dict(zip(prompts, [await harness.submit(prompt) for prompt in prompts], strict=True))
    good, bad = ([ids[prompt] for prompt in prompts if kind in prompt] for kind in ("good", "faulty"))
    assert await states(harness, good, within_s=30.0) == {State.COMPLETED}, "they wait for no second attempt"
    await asyncio.wait_for(pass_waits(harness, bad), 600)
    most = 2 if error.ambiguous else 3
    assert {(task.state, task.attempts) for task in await harness.finished(*bad)} == {(State.FAILED, most)}
    assert len(harness.provider.calls) <= 30 + faulty * (most + 1)  # a call may be blamed on the upstream, for a moment


@pytest.mark.parametrize("order", ["first", "spread"])
async def test_tasks_that_a_rate_limit_always_refuses_soon_stop_no_others(
    make_harness: MakeHarness, order: str
) -> None:
    tempo = BreakerConfig(0.05, 0.5, longest_s=0.5, step_s=0.05)
    harness = make_harness(default=Faulty(fault(429)), base_s=0.4, tempo=tempo)
    prompts = mixed(5, 30, order)
    ids = dict(zip(prompts, [await harness.submit(prompt) for prompt in prompts], strict=True))
    good, bad = ([ids[prompt] for prompt in prompts if kind in prompt] for kind in ("good", "faulty"))
    assert await states(harness, good, within_s=30.0) == {State.COMPLETED}
    refused = len(harness.provider.calls) - 30
    assert refused <= 15, "each is called about twice until it is known that it alone meets the limit"
    assert not any(harness.task(task_id).state.is_final for task_id in bad), "waiting out a 429 is no attempt"
    later = await submit_many(harness, 30)
    assert await states(harness, later, within_s=5.0) == {State.COMPLETED}


@dataclass
class StuckJobs(ScriptedProvider):
    """Provider of jobs, of which those of some prompts never end; `stuck` is their number."""

    stuck: int = 0

    async def generate(self, call: Call, watcher: CallObserver) -> Reply:
        await super().generate(call, watcher)
        await watcher.accepted(JobHandle("scripted", f"job-{len(self.calls)}"))
        if "stuck" in call.request.prompt:
            self.stuck += 1
            await asyncio.Event().wait()
        return images(call.count)


async def test_jobs_that_never_end_keep_slots_from_other_tasks_for_a_minute(make_instance: MakeInstance) -> None:
    provider = StuckJobs()
    harness: WorkerHarness[Any] = WorkerHarness(make_instance(slots=5), provider, deadline_s=3_600.0)
    harness.pool.start()
    stuck = [await harness.submit(f"stuck {i}") for i in range(10)]
    await eventually(lambda: provider.stuck == 5)
    good = await submit_many(harness, 5)
    await harness.pass_time(JOB_SLOT_S)
    await eventually(lambda: provider.stuck == 10)
    await harness.pass_time(JOB_SLOT_S)
    assert await states(harness, good) == {State.COMPLETED}
    assert {harness.task(task_id).state for task_id in stuck} == {State.PROCESSING}
    await harness.drain(0.0)


async def test_a_job_that_is_accepted_ends_a_rate_limit_for_others(make_instance: MakeInstance) -> None:
    provider = StuckJobs(steps=[fault(429)])
    harness: WorkerHarness[Any] = WorkerHarness(make_instance(slots=5), provider, tempo=TEMPO)
    harness.pool.start()
    await harness.submit("limited")
    await eventually(lambda: harness.pacing.blocked("m"))
    for i in range(4):
        await harness.submit(f"stuck {i}")
    await eventually(lambda: provider.stuck == 4)
    await harness.drain(0.0)


@dataclass
class UnreadJobs(ScriptedProvider):
    """Provider of jobs, of which those of some prompts are polled by `poll`; `unread` is their number."""

    poll: Poll = field(kw_only=True)
    unread: int = 0

    async def generate(self, call: Call, watcher: CallObserver) -> Reply:
        await super().generate(call, watcher)
        handle = JobHandle("scripted", f"job-{len(self.calls)}")
        await watcher.accepted(handle)
        if "unread" in call.request.prompt:
            self.unread += 1
            return await poll_until_end(handle, watcher, self.poll)
        return images(call.count)


async def hanging() -> JobState:
    await asyncio.Event().wait()
    return JobState("running")


async def refused_for_half_a_minute() -> JobState:
    raise UpstreamError("upstream_rate_limited", "slow down", status=429, retryable=True, retry_after_s=30.0)


async def not_found() -> JobState:
    return JobState("forgotten")


async def of_an_unknown_state() -> JobState:
    return JobState("running", unclear=True)


@pytest.mark.parametrize("poll", [hanging, refused_for_half_a_minute, not_found, of_an_unknown_state])
async def test_jobs_with_a_state_that_can_not_be_read_keep_slots_from_other_tasks_for_seconds(
    make_instance: MakeInstance, poll: Poll
) -> None:
    provider = UnreadJobs(poll=poll)
    harness: WorkerHarness[Any] = WorkerHarness(make_instance(slots=5), provider, deadline_s=3_600.0)
    harness.pool.start()
    for i in range(10):
        await harness.submit(f"unread {i}")
    try:
        await eventually(lambda: provider.unread == 5)
        good = await submit_many(harness, 5)
        await harness.pass_time(4.0)
        await eventually(lambda: provider.unread == 10)
        await harness.pass_time(4.0)
        assert await states(harness, good) == {State.COMPLETED}
    finally:
        await harness.drain(0.0)
    assert len(provider.calls) == 15


@dataclass
class SearchedJobs(ScriptedProvider):
    """Provider of which the jobs of some prompts are searched for, without end; `searched` is their number."""

    searched: int = 0

    async def generate(self, call: Call, watcher: CallObserver) -> Reply:
        await super().generate(call, watcher)
        if "lost" in call.request.prompt:
            self.searched += 1
            watcher.job_unread()
            await asyncio.Event().wait()
        return images(call.count)


async def test_calls_of_which_the_job_is_searched_for_keep_no_slot_from_others(make_instance: MakeInstance) -> None:
    provider = SearchedJobs()
    harness: WorkerHarness[Any] = WorkerHarness(make_instance(slots=2), provider)
    harness.pool.start()
    for i in range(4):
        await harness.submit(f"lost {i}")
    await eventually(lambda: provider.searched == 4)
    assert await states(harness, await submit_many(harness, 4)) == {State.COMPLETED}
    await harness.drain(0.0)


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
