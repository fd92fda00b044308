from __future__ import annotations

import asyncio
from functools import partial

import pytest
from msgspec.structs import replace

from imagegen.errors import UpstreamError
from imagegen.providers.protocol import Call, Reply
from imagegen.queue.verbs.finish import FinishItem, FinishReply
from imagegen.tasks.task import State, WaitReason
from imagegen.worker import parking, pool
from imagegen.worker.circuit_breaker import BreakerConfig
from tests.support import eventually
from tests.worker.conftest import MakeHarness, WorkerHarness, failure, fault, images, links, loss, refused


class Switch:
    """An upstream that fails until it is repaired."""

    def __init__(self, error: Exception | None = None, call_s: float = 0.005) -> None:
        self.error, self.call_s = error, call_s

    async def __call__(self, call: Call) -> Reply:
        await asyncio.sleep(self.call_s)
        if self.error:
            raise self.error
        return images(call.count)


async def hang(_call: Call) -> Reply:
    await asyncio.Event().wait()
    raise AssertionError


async def check_trouble(harness: WorkerHarness, task_ids: list[str], at_most: int) -> None:
    """Simulate a minute of trouble fifty times faster; allow `at_most` calls."""
    began = asyncio.get_running_loop().time()
    await asyncio.sleep(1.2)
    minutes = (asyncio.get_running_loop().time() - began) / 1.2
    assert len(harness.provider.calls) <= at_most * minutes
    assert not any(harness.task(task_id).state is State.COMPLETED for task_id in task_ids)


async def pause(harness: WorkerHarness) -> None:
    """Let the first call be refused for a minute and cancel its task."""
    first = await harness.submit("first")
    await eventually(lambda: harness.pacing.blocked("m"))
    await harness.instance.client_queue.cancel(first)


async def submit_many(harness: WorkerHarness, count: int) -> list[str]:
    return list(await asyncio.gather(*(harness.submit(i) for i in range(count))))


async def undisturbed_s(harness: WorkerHarness) -> float:
    """Return the seconds of ten good tasks alone; on a busy machine all other times are longer by the same factor."""
    began = asyncio.get_running_loop().time()
    task_ids = [await harness.submit(f"good alone {number}") for number in range(10)]
    assert await states(harness, task_ids, within_s=30.0) == {State.COMPLETED}
    return asyncio.get_running_loop().time() - began


async def states(harness: WorkerHarness, task_ids: list[str], within_s: float = 30.0) -> set[State]:
    return {task.state for task in await harness.finished(*task_ids, within_s=within_s)}


async def healthy(harness: WorkerHarness) -> None:
    """Check that all loops are alive: as many tasks run at once and complete."""
    provider = harness.provider
    ends = asyncio.Event()

    async def held(call: Call) -> Reply:
        await ends.wait()
        return images(call.count)

    provider.most, provider.default = 0, held
    task_ids = [await harness.submit(f"healthy {i}") for i in range(10)]
    await eventually(lambda: provider.running == 5)
    ends.set()
    assert await states(harness, task_ids) == {State.COMPLETED}
    assert provider.most == 5


async def test_no_more_tasks_run_than_there_are_slots(make_harness: MakeHarness) -> None:
    harness = make_harness(default=Switch(call_s=0.01), slots=3)
    assert await states(harness, await submit_many(harness, 20)) == {State.COMPLETED}
    assert (len(harness.provider.calls), harness.provider.most) == (20, 3)


async def test_one_further_task_runs_while_a_result_is_written(
    make_harness: MakeHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = make_harness(slots=1, pool=False)
    verbs, writes = harness.instance.verbs, asyncio.Event()
    finish = verbs.finish

    async def late(item: FinishItem) -> FinishReply:
        await writes.wait()
        return await finish(item)

    monkeypatch.setattr(verbs, "finish", late)
    task_ids = await submit_many(harness, 4)
    harness.pool.start()
    await eventually(lambda: len(harness.provider.calls) == 2)
    await harness.instance.connection.ping()
    assert len(harness.provider.calls) == len(harness.instance.parts.dispatcher.held) == 2
    here = harness.instance.parts.monitor.local_status()
    assert (here.in_flight, here.retrying) == (0, 0)
    writes.set()
    assert await states(harness, task_ids) == {State.COMPLETED}


async def test_a_task_that_always_fails_fails_after_its_attempts(make_harness: MakeHarness) -> None:
    harness = make_harness(default=fault(500))
    [task] = await harness.finished(await harness.submit())
    assert (task.state, failure(task).code, task.attempts) == (State.FAILED, "upstream_error", 3)
    assert len(harness.provider.calls) == 3


async def test_faulty_tasks_one_after_the_other_each_fail_after_their_attempts(make_harness: MakeHarness) -> None:
    harness = make_harness(default=fault(500), base_s=0.001)
    for i in range(8):
        await harness.finished(await harness.submit(i))
    assert len(harness.provider.calls) == 24
    assert harness.pacing.blocked("m") is None


async def test_images_that_are_paid_for_complete_a_task_at_its_deadline(make_harness: MakeHarness) -> None:
    harness = make_harness(images(1), default=fault(429, retry_after_s=0.05), per_call=1, deadline_s=1.0)
    [task] = await harness.finished(await harness.submit(n=2))
    assert (task.state, len(task.images)) == (State.COMPLETED, 1)
    assert harness.task(task.id).warnings


async def test_a_second_loss_ends_the_task(make_harness: MakeHarness) -> None:
    harness = make_harness(default=loss(), max_attempts=10)
    [task] = await harness.finished(await harness.submit())
    assert (failure(task).code, task.possibly_billed_twice) == ("upstream_timeout", 2)
    assert len(harness.provider.calls) == 2


async def test_a_task_between_its_attempts_holds_no_slot(make_harness: MakeHarness) -> None:
    harness = make_harness(fault(500), slots=1, base_s=60.0)
    waiting = await harness.submit("waits")
    await eventually(lambda: harness.task(waiting).reason is WaitReason.RETRYING)
    assert await states(harness, [await harness.submit("goes on")]) == {State.COMPLETED}


async def test_an_unforeseen_error_fails_its_task_and_no_loop(make_harness: MakeHarness) -> None:
    harness = make_harness(*[ZeroDivisionError()] * 10)
    assert await states(harness, await submit_many(harness, 10)) == {State.FAILED}
    await healthy(harness)


async def test_an_unforeseen_error_loses_no_paid_images(
    make_harness: MakeHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "UNFORESEEN_RETRY_S", 0.01)
    harness = make_harness(default=links(), max_attempts=3)
    harness.image_saver.faults[:] = [OSError(24, "Too many open files")]
    assert await states(harness, [await harness.submit("once")]) == {State.COMPLETED}
    assert len(harness.provider.calls) == 1
    harness.image_saver.faults[:] = [ZeroDivisionError()] * 3
    assert await states(harness, [await harness.submit("always")]) == {State.FAILED}
    assert len(harness.provider.calls) == 2


async def test_an_unwritable_outcome_ends_no_loop(make_harness: MakeHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(*_: object) -> None:
        raised.append(1)
        raise ZeroDivisionError

    raised: list[int] = []
    harness = make_harness()
    with monkeypatch.context() as patch:
        patch.setattr(harness.instance.worker_queue, "finish", broken)
        for i in range(6):
            await harness.submit(i)
        await eventually(lambda: len(raised) >= 6)
    await healthy(harness)


async def test_cancelled_tasks_drop_their_calls_and_no_loop(make_harness: MakeHarness) -> None:
    harness = make_harness(default=hang)
    for i in range(6):
        task_id = await harness.submit(i)
        await eventually(lambda: harness.provider.running)
        cancelled = await harness.instance.cancel(task_id)
        assert cancelled.state is State.CANCELLED
        await eventually(lambda: not harness.provider.running)
        assert harness.task(task_id).state is State.CANCELLED
    await healthy(harness)


def has_called(harness: WorkerHarness, times: int) -> bool:
    return len(harness.provider.calls) == times and not harness.provider.running


async def test_claims_lost_at_a_checkpoint_end_no_loop(make_harness: MakeHarness) -> None:
    async def stolen(call: Call) -> Reply:
        for claim in list(harness.instance.parts.leases.dispatcher.held.values()):
            key = harness.instance.keys.checkpoint(claim.task.id)
            await harness.instance.connection.commands.set(key, b'9-0 {"owner":"other"}')
        return images(call.count)

    harness = make_harness(*[stolen] * 6, per_call=1)
    for i in range(6):
        await harness.submit(i, n=2)
        await eventually(partial(has_called, harness, i + 1))
    await healthy(harness)


async def test_a_storm_of_rate_limits_fails_nothing_and_full_speed_is_back_soon(make_harness: MakeHarness) -> None:
    upstream = Switch(fault(429, retry_after_s=0.02))
    harness = make_harness(default=upstream)
    task_ids = await submit_many(harness, 100)
    await check_trouble(harness, task_ids, at_most=5 + 12)
    upstream.error, harness.provider.most = None, 0
    await eventually(lambda: harness.provider.most == 5, within_s=5.0)
    tasks = await harness.finished(*task_ids)
    assert {(task.state, task.attempts) for task in tasks} == {(State.COMPLETED, 1)}


@pytest.mark.parametrize("error", [fault(500), fault(503), refused()], ids=["500", "503", "refused"])
async def test_a_dead_upstream_is_called_rarely_and_fails_nothing(make_harness: MakeHarness, error: Exception) -> None:
    upstream = Switch(error)
    harness = make_harness(default=upstream, base_s=0.1)
    task_ids = await submit_many(harness, 100)
    await check_trouble(harness, task_ids, at_most=30)
    waiting = [harness.task(task_id) for task_id in task_ids]
    assert {task.state for task in waiting} <= {State.PENDING, State.PROCESSING}
    held = [task for task in waiting if task.reason is WaitReason.UPSTREAM_OVERLOADED]
    assert held
    assert all(task.retry_at for task in held)
    await eventually(lambda: (wait := harness.pacing.blocked("m")) and wait.reason is WaitReason.UPSTREAM_OVERLOADED)
    upstream.error = None
    assert await states(harness, task_ids) == {State.COMPLETED}


async def test_a_hanging_upstream_is_called_rarely_and_a_second_loss_ends(
    make_harness: MakeHarness,
) -> None:
    upstream = Switch(loss(), call_s=0.04)
    harness = make_harness(default=upstream, base_s=0.1)
    task_ids = await submit_many(harness, 30)
    await check_trouble(harness, task_ids, at_most=30)
    upstream.error = None
    for task in await harness.finished(*task_ids):
        assert task.possibly_billed_twice == (2 if task.state is State.FAILED else task.possibly_billed_twice)
        assert task.possibly_billed_twice <= 2


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


async def test_a_parked_task_resumes(make_harness: MakeHarness) -> None:
    harness = make_harness(fault(429, retry_after_s=0.5), tempo=BreakerConfig(probe_s=0.1, longest_s=1.0, step_s=0.01))
    first = await harness.submit("first")
    await eventually(lambda: harness.pacing.blocked("m"))
    task_ids = [first, *await submit_many(harness, 8)]
    await eventually(lambda: len(harness.pool.parking))
    assert await states(harness, task_ids) == {State.COMPLETED}
    assert harness.provider.calls[1:]


async def test_a_cancelled_retry_keeps_its_slot_until_its_call_is_closed(make_harness: MakeHarness) -> None:
    closing, closed = asyncio.Event(), asyncio.Event()

    async def slow_to_close(_call: Call) -> Reply:
        try:
            return await hang(_call)
        finally:
            closing.set()
            await closed.wait()

    harness = make_harness(fault(500), slow_to_close, slots=1)
    cancelled = await harness.submit("cancelled")
    await eventually(lambda: len(harness.provider.calls) == 2)
    after = await harness.submit("after")
    await harness.instance.client_queue.cancel(cancelled)
    await closing.wait()
    await harness.instance.connection.ping()
    assert len(harness.provider.calls) == 2
    closed.set()
    assert await states(harness, [after]) == {State.COMPLETED}


async def test_a_cancelled_parked_task_frees_its_place(
    make_harness: MakeHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parking, "MAX_PARKED", 1)
    harness = make_harness(fault(429, retry_after_s=60.0), tempo=BreakerConfig(), slots=2)
    await pause(harness)
    parked = await harness.submit("parked")
    await eventually(lambda: len(harness.pool.parking) == 1)
    in_slot = await harness.submit("in its slot")
    await eventually(lambda: harness.pacing.waiters)
    assert len(harness.pool.parking) == 1
    await harness.instance.client_queue.cancel(parked)
    await harness.submit("next")
    await eventually(lambda: {claim.task.id for claim in harness.pool.parking._parked} not in ({parked}, set()))
    assert harness.task(in_slot).reason is WaitReason.UPSTREAM_RATE_LIMITED


async def test_a_task_that_waits_is_ended_by_its_deadline_alone(make_harness: MakeHarness) -> None:
    harness = make_harness(default=refused(), deadline_s=0.8)
    tasks = await harness.finished(*await submit_many(harness, 20))
    assert {(task.state, failure(task).code) for task in tasks} <= {
        (State.FAILED, "upstream_overloaded"), (State.FAILED, "upstream_error"), (State.FAILED, "upstream_timeout")
    }  # fmt: skip
    assert all(task.finished_at and task.finished_at - task.created_at >= 0.7 for task in tasks)


async def test_a_rate_spaces_the_calls_of_the_pool(make_harness: MakeHarness) -> None:
    harness = make_harness(rate_per_min=60 / 0.05)
    task_ids = await submit_many(harness, 8)
    await eventually(lambda: any(harness.task(i).reason is WaitReason.UPSTREAM_RATE_LIMITED for i in task_ids))
    assert await states(harness, task_ids) == {State.COMPLETED}
    times = harness.provider.times
    assert times[-1] - times[0] >= 7 * 0.05 - 0.02


async def test_drain_waits_for_running_attempts(make_harness: MakeHarness) -> None:
    harness = make_harness(default=Switch(call_s=0.1))
    task_id = await harness.submit()
    await eventually(lambda: harness.provider.running)
    await asyncio.wait_for(harness.drain(60.0), 20)
    assert harness.task(task_id).state is State.COMPLETED


async def test_drain_releases_running_attempts_at_its_deadline(make_harness: MakeHarness) -> None:
    one = make_harness(default=hang)
    task_id = await one.submit()
    await eventually(lambda: one.provider.running)
    await asyncio.wait_for(one.drain(0.05), 20)
    await one.instance.crash()
    await one.instance.parts.release_all()
    two = make_harness()
    await eventually(lambda: two.provider.calls)
    await eventually(lambda: task_id in two.instance.task_cache.live or two.instance.task_cache.finished(task_id))
    [task] = await two.finished(task_id)
    assert (task.state, task.possibly_billed_twice) == (State.COMPLETED, 1)


async def test_drain_ends_waits_and_another_instance_claims_them(make_harness: MakeHarness) -> None:
    one = make_harness(fault(429, retry_after_s=60.0), tempo=BreakerConfig())
    await one.submit("first")
    await eventually(lambda: one.pacing.blocked("m"))
    task_ids = [await one.submit(i) for i in range(8)]
    await eventually(lambda: len(one.pool.parking) >= 8)
    await asyncio.wait_for(one.drain(60.0), 20)
    await one.instance.crash()
    await one.instance.parts.release_all()
    two = make_harness()
    await eventually(lambda: all(two.instance.task_cache.finished(task_id) for task_id in task_ids))
    tasks = await two.finished(*task_ids)
    assert {(task.state, task.attempts, task.possibly_billed_twice) for task in tasks} == {(State.COMPLETED, 1, 0)}


async def test_an_interrupted_task_shows_the_attempts_that_were_made(make_harness: MakeHarness) -> None:
    harness = make_harness(pool=False)
    claim = await harness.claim()
    claim.checkpoint = replace(claim.checkpoint, starts=2, attempts=2, ambiguous_calls=2)
    dispatcher = harness.instance.parts.dispatcher
    dispatcher.leave_slot(claim)
    dispatcher.put(claim)
    harness.pool.start()
    (task,) = await harness.finished(claim.task.id)
    assert (failure(task).code, task.attempts, task.possibly_billed_twice) == ("interrupted", 2, 2)


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


async def test_a_dead_upstream_costs_no_task_more_than_one_attempt(make_harness: MakeHarness) -> None:
    upstream = Switch(fault(500))
    harness = make_harness(default=upstream, base_s=0.02, tempo=BreakerConfig(0.01, 0.02, longest_s=0.4, step_s=0.02))
    task_ids = await submit_many(harness, 8)
    await eventually(lambda: len(harness.provider.calls) > 40)
    upstream.error = None
    tasks = await harness.finished(*task_ids)
    assert {task.state for task in tasks} == {State.COMPLETED}
    assert max(task.attempts for task in tasks) <= 2


@pytest.mark.parametrize("tasks", [5, 10])
async def test_lone_failing_tasks_end_after_the_excused_outage_time(make_harness: MakeHarness, tasks: int) -> None:
    tempo = BreakerConfig(0.01, 0.02, longest_s=0.4, step_s=0.02, excused_s=0.5)
    harness = make_harness(default=Switch(fault(500)), base_s=0.02, tempo=tempo)
    ended = await harness.finished(*await submit_many(harness, tasks))
    assert {(task.state, failure(task).code, task.attempts) for task in ended} == {(State.FAILED, "upstream_error", 3)}


async def test_an_overloaded_upstream_is_excused_for_as_long_as_it_lasts(make_harness: MakeHarness) -> None:
    upstream = Switch(fault(503))
    tempo = BreakerConfig(0.01, 0.02, longest_s=0.4, step_s=0.02, excused_s=0.0)
    harness = make_harness(default=upstream, base_s=0.02, tempo=tempo)
    task_ids = await submit_many(harness, 8)
    await eventually(lambda: len(harness.provider.calls) > 40)
    upstream.error = None
    assert await states(harness, task_ids) == {State.COMPLETED}


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


async def test_a_deadline_ends_a_parked_task(make_harness: MakeHarness) -> None:
    harness = make_harness(fault(429, retry_after_s=60.0), tempo=BreakerConfig(), deadline_s=0.5)
    await pause(harness)
    [task] = await harness.finished(await harness.submit("parked"), within_s=20.0)
    assert (task.state, failure(task).code) == (State.FAILED, "upstream_rate_limited")
    assert task.finished_at is not None
    assert task.finished_at - task.created_at < 20.0
    assert len(harness.pool.parking) == 0


async def test_excess_parked_claims_are_released_to_other_instances(
    make_harness: MakeHarness,
) -> None:
    tempo = BreakerConfig(0.05, 0.1, longest_s=5.0, step_s=0.01)
    one = make_harness(fault(429, retry_after_s=1.5), default=Switch(call_s=0.1), slots=2, tempo=tempo)
    await one.submit("first")
    await eventually(lambda: one.pacing.blocked("m"))
    task_ids = await submit_many(one, 40)
    await eventually(lambda: len(one.pool.parking) == 40)
    two = make_harness(slots=5)
    await eventually(lambda: not one.instance.notifier.alone)
    await eventually(lambda: len(two.provider.calls) >= 20)
    await eventually(
        lambda: all(two.instance.task_cache.finished(i) or one.instance.task_cache.finished(i) for i in task_ids)
    )
    assert len(one.provider.calls) + len(two.provider.calls) == 42
