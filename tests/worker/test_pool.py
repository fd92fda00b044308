from __future__ import annotations

import asyncio

import pytest
from msgspec.structs import replace
from support import eventually

from imagegen.errors import UpstreamError
from imagegen.providers.protocol import Call, Reply
from imagegen.queue.verbs.finish import FinishItem, FinishReply
from imagegen.tasks.task import State, WaitReason
from imagegen.worker import parking, pool
from imagegen.worker.circuit_breaker import BreakerConfig

from .conftest import MakeWorkshop, Workshop, fault, links, loss, no_model, pictures, refused


class Switch:
    """An upstream that fails until it is mended."""

    def __init__(self, error: Exception | None = None, call_s: float = 0.005) -> None:
        self.error, self.call_s = error, call_s

    async def __call__(self, call: Call) -> Reply:
        await asyncio.sleep(self.call_s)
        if self.error:
            raise self.error
        return pictures(call.count)


async def hang(_call: Call) -> Reply:
    await asyncio.Event().wait()
    raise AssertionError


async def trouble(workshop: Workshop, task_ids: list[str], at_most: int) -> None:
    """A minute of it, a fiftieth as long; so many calls at most."""
    began = asyncio.get_running_loop().time()
    await asyncio.sleep(1.2)
    minutes = (asyncio.get_running_loop().time() - began) / 1.2
    assert len(workshop.provider.calls) <= at_most * minutes
    assert not any(workshop.task(task_id).state is State.COMPLETED for task_id in task_ids)


async def pause(workshop: Workshop) -> None:
    """Its first call is refused for a minute, and its task cancelled."""
    first = await workshop.submit("first")
    await eventually(lambda: workshop.pacing.blocked("m"))
    await workshop.instance.client_queue.cancel(first)


async def submit_many(workshop: Workshop, count: int) -> list[str]:
    return list(await asyncio.gather(*(workshop.submit(i) for i in range(count))))


async def states(workshop: Workshop, task_ids: list[str], within_s: float = 10.0) -> set[State]:
    return {task.state for task in await workshop.finished(*task_ids, within_s=within_s)}


async def healthy(workshop: Workshop) -> None:
    """All loops live: that many tasks run at once, and are completed."""
    provider = workshop.provider
    provider.most, provider.default = 0, Switch(call_s=0.05)
    task_ids = [await workshop.submit(f"healthy {i}") for i in range(10)]
    assert await states(workshop, task_ids) == {State.COMPLETED}
    assert provider.most == 5


async def test_tasks_are_completed_so_many_at_once_and_no_more(make_workshop: MakeWorkshop) -> None:
    workshop = make_workshop(default=Switch(call_s=0.01), slots=3)
    assert await states(workshop, await submit_many(workshop, 20)) == {State.COMPLETED}
    assert (len(workshop.provider.calls), workshop.provider.most) == (20, 3)


async def test_the_next_task_runs_while_a_result_is_written_and_then_no_more(
    make_workshop: MakeWorkshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    workshop = make_workshop(slots=1, pool=False)
    verbs, writes = workshop.instance.verbs, asyncio.Event()
    finish = verbs.finish

    async def late(item: FinishItem) -> FinishReply:
        await writes.wait()
        return await finish(item)

    monkeypatch.setattr(verbs, "finish", late)
    task_ids = await submit_many(workshop, 4)
    workshop.pool.start()
    await eventually(lambda: len(workshop.provider.calls) == 2)
    await workshop.instance.connection.ping()
    assert len(workshop.provider.calls) == len(workshop.instance.parts.dispatcher.held) == 2
    here = workshop.instance.parts.monitor.local_status()
    assert (here.in_flight, here.retrying) == (0, 0)
    writes.set()
    assert await states(workshop, task_ids) == {State.COMPLETED}


async def test_a_task_that_always_fails_fails_after_its_attempts(make_workshop: MakeWorkshop) -> None:
    workshop = make_workshop(default=fault(500))
    [task] = await workshop.finished(await workshop.submit())
    assert (task.state, task.error.code, task.attempts) == (State.FAILED, "upstream_error", 3)
    assert len(workshop.provider.calls) == 3


async def test_faulty_tasks_one_after_the_other_each_fail_after_their_attempts(make_workshop: MakeWorkshop) -> None:
    workshop = make_workshop(default=fault(500), base_s=0.001)
    for i in range(8):
        await workshop.finished(await workshop.submit(i))
    assert len(workshop.provider.calls) == 24
    assert workshop.pacing.blocked("m") is None


@pytest.mark.parametrize("error", [fault(500), no_model(), loss()])
async def test_images_that_are_paid_for_complete_a_task_that_fails(
    make_workshop: MakeWorkshop, error: UpstreamError
) -> None:
    workshop = make_workshop(pictures(1), default=error, per_call=1)
    [task] = await workshop.finished(await workshop.submit(n=3))
    assert (task.state, [image.index for image in task.images]) == (State.COMPLETED, [0])
    [warning] = task.warnings
    assert warning.startswith("only 1 of 3 images came: ")


async def test_images_that_are_paid_for_complete_a_task_at_its_deadline(make_workshop: MakeWorkshop) -> None:
    workshop = make_workshop(pictures(1), default=fault(429, retry_after_s=0.05), per_call=1, deadline_s=1.0)
    [task] = await workshop.finished(await workshop.submit(n=2))
    assert (task.state, len(task.images)) == (State.COMPLETED, 1)
    assert workshop.task(task.id).warnings


async def test_a_second_loss_ends_the_task(make_workshop: MakeWorkshop) -> None:
    workshop = make_workshop(default=loss(), max_attempts=10)
    [task] = await workshop.finished(await workshop.submit())
    assert (task.error.code, task.possibly_billed_twice) == ("upstream_timeout", 2)
    assert len(workshop.provider.calls) == 2


async def test_a_task_between_its_attempts_holds_no_slot(make_workshop: MakeWorkshop) -> None:
    workshop = make_workshop(fault(500), slots=1, base_s=60.0)
    waiting = await workshop.submit("waits")
    await eventually(lambda: workshop.task(waiting).reason is WaitReason.RETRYING)
    assert await states(workshop, [await workshop.submit("goes on")]) == {State.COMPLETED}


async def test_an_unforeseen_error_fails_its_task_and_no_loop(make_workshop: MakeWorkshop) -> None:
    workshop = make_workshop(*[ZeroDivisionError()] * 10)
    assert await states(workshop, await submit_many(workshop, 10)) == {State.FAILED}
    await healthy(workshop)


async def test_an_unforeseen_error_costs_no_images_that_are_paid_for(
    make_workshop: MakeWorkshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "UNFORESEEN_RETRY_S", 0.01)
    workshop = make_workshop(default=links(), max_attempts=3)
    workshop.keeper.faults[:] = [OSError(24, "Too many open files")]
    assert await states(workshop, [await workshop.submit("once")]) == {State.COMPLETED}
    assert len(workshop.provider.calls) == 1
    workshop.keeper.faults[:] = [ZeroDivisionError()] * 3
    assert await states(workshop, [await workshop.submit("always")]) == {State.FAILED}
    assert len(workshop.provider.calls) == 2


async def test_an_end_that_cannot_be_written_ends_no_loop(
    make_workshop: MakeWorkshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: object) -> None:
        raised.append(1)
        raise ZeroDivisionError

    raised: list[int] = []
    workshop = make_workshop()
    with monkeypatch.context() as patch:
        patch.setattr(workshop.instance.worker_queue, "finish", broken)
        for i in range(6):
            await workshop.submit(i)
        await eventually(lambda: len(raised) >= 6)
    await healthy(workshop)


async def test_cancelled_tasks_drop_their_calls_and_no_loop(make_workshop: MakeWorkshop) -> None:
    workshop = make_workshop(default=hang)
    for i in range(6):
        task_id = await workshop.submit(i)
        await eventually(lambda: workshop.provider.running)
        cancelled = await workshop.instance.client_queue.cancel(task_id)
        assert cancelled.state is State.CANCELLED
        await eventually(lambda: not workshop.provider.running)
        assert workshop.task(task_id).state is State.CANCELLED
    await healthy(workshop)


async def test_claims_lost_at_a_checkpoint_end_no_loop(make_workshop: MakeWorkshop) -> None:
    async def stolen(call: Call) -> Reply:
        for claim in list(workshop.instance.parts.leases.dispatcher.held.values()):
            key = workshop.instance.keys.checkpoint(claim.task.id)
            await workshop.instance.connection.commands.set(key, b'9-0 {"owner":"other"}')
        return pictures(call.count)

    workshop = make_workshop(*[stolen] * 6, per_call=1)
    for i in range(6):
        await workshop.submit(i, n=2)
        await eventually(lambda i=i: len(workshop.provider.calls) == i + 1 and not workshop.provider.running)
    await healthy(workshop)


async def test_a_storm_of_rate_limits_fails_nothing_and_full_speed_is_back_soon(make_workshop: MakeWorkshop) -> None:
    upstream = Switch(fault(429, retry_after_s=0.02))
    workshop = make_workshop(default=upstream)
    task_ids = await submit_many(workshop, 100)
    await trouble(workshop, task_ids, at_most=5 + 12)
    upstream.error, workshop.provider.most = None, 0
    await eventually(lambda: workshop.provider.most == 5, within_s=1.0)
    tasks = await workshop.finished(*task_ids)
    assert {(task.state, task.attempts) for task in tasks} == {(State.COMPLETED, 1)}


@pytest.mark.parametrize("error", [fault(500), fault(503), refused()], ids=["500", "503", "refused"])
async def test_a_dead_upstream_is_called_seldom_and_fails_nothing(
    make_workshop: MakeWorkshop, error: Exception
) -> None:
    upstream = Switch(error)
    workshop = make_workshop(default=upstream, base_s=0.1)
    task_ids = await submit_many(workshop, 100)
    await trouble(workshop, task_ids, at_most=30)
    waiting = [workshop.task(task_id) for task_id in task_ids]
    assert {task.state for task in waiting} <= {State.PENDING, State.PROCESSING}
    held = [task for task in waiting if task.reason is WaitReason.UPSTREAM_OVERLOADED]
    assert held
    assert all(task.retry_at for task in held)
    assert workshop.pacing.blocked("m").reason is WaitReason.UPSTREAM_OVERLOADED
    upstream.error = None
    assert await states(workshop, task_ids) == {State.COMPLETED}


async def test_a_hanging_upstream_is_called_seldom_and_a_second_loss_still_ends_a_task(
    make_workshop: MakeWorkshop,
) -> None:
    upstream = Switch(loss(), call_s=0.04)
    workshop = make_workshop(default=upstream, base_s=0.1)
    task_ids = await submit_many(workshop, 30)
    await trouble(workshop, task_ids, at_most=30)
    upstream.error = None
    for task in await workshop.finished(*task_ids):
        assert task.possibly_billed_twice == (2 if task.state is State.FAILED else task.possibly_billed_twice)
        assert task.possibly_billed_twice <= 2


async def test_a_model_that_rests_does_not_block_another(make_workshop: MakeWorkshop) -> None:
    workshop = make_workshop(fault(429, retry_after_s=60.0), tempo=BreakerConfig())
    first = await workshop.submit("first", model="busy")
    await eventually(lambda: workshop.pacing.blocked("busy"))
    paused = [await workshop.submit(i, model="busy") for i in range(8)]
    await eventually(lambda: len(workshop.pool.parking) == 8)
    assert await states(workshop, [await workshop.submit("other")]) == {State.COMPLETED}
    for task_id in (first, *paused):
        task = workshop.task(task_id)
        assert (task.state, task.attempts) == (State.PENDING, 0)
    told = [workshop.task(task_id).reason for task_id in paused]
    assert told.count(WaitReason.UPSTREAM_RATE_LIMITED) == 8
    assert len(workshop.provider.calls) == 2


async def test_a_task_that_was_set_aside_comes_back(make_workshop: MakeWorkshop) -> None:
    workshop = make_workshop(
        fault(429, retry_after_s=0.2), tempo=BreakerConfig(probe_s=0.1, longest_s=1.0, step_s=0.01)
    )
    first = await workshop.submit("first")
    await eventually(lambda: workshop.pacing.blocked("m"))
    task_ids = [first] + [await workshop.submit(i) for i in range(8)]
    await eventually(lambda: len(workshop.pool.parking) >= 8)
    assert await states(workshop, task_ids) == {State.COMPLETED}
    assert workshop.provider.calls[1:]


async def test_a_cancelled_retry_keeps_its_slot_until_its_call_is_closed(make_workshop: MakeWorkshop) -> None:
    closing, closed = asyncio.Event(), asyncio.Event()

    async def slow_to_close(_call: Call) -> Reply:
        try:
            return await hang(_call)
        finally:
            closing.set()
            await closed.wait()

    workshop = make_workshop(fault(500), slow_to_close, slots=1)
    cancelled = await workshop.submit("cancelled")
    await eventually(lambda: len(workshop.provider.calls) == 2)
    after = await workshop.submit("after")
    await workshop.instance.client_queue.cancel(cancelled)
    await closing.wait()
    await workshop.instance.connection.ping()
    assert len(workshop.provider.calls) == 2
    closed.set()
    assert await states(workshop, [after]) == {State.COMPLETED}


async def test_a_cancelled_task_that_is_parked_makes_room(
    make_workshop: MakeWorkshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parking, "MAX_PARKED", 1)
    workshop = make_workshop(fault(429, retry_after_s=60.0), tempo=BreakerConfig(), slots=2)
    await pause(workshop)
    parked = await workshop.submit("parked")
    await eventually(lambda: len(workshop.pool.parking) == 1)
    in_slot = await workshop.submit("in its slot")
    await eventually(lambda: workshop.pacing._waiters)
    assert len(workshop.pool.parking) == 1
    await workshop.instance.client_queue.cancel(parked)
    await workshop.submit("next")
    await eventually(lambda: {claim.task.id for claim in workshop.pool.parking._parked} not in ({parked}, set()))
    assert workshop.task(in_slot).reason is WaitReason.UPSTREAM_RATE_LIMITED


async def test_a_task_that_waits_is_ended_by_its_deadline_alone(make_workshop: MakeWorkshop) -> None:
    workshop = make_workshop(default=refused(), deadline_s=0.8)
    tasks = await workshop.finished(*await submit_many(workshop, 20))
    assert {(task.state, task.error.code) for task in tasks} <= {
        (State.FAILED, "upstream_overloaded"), (State.FAILED, "upstream_error"), (State.FAILED, "upstream_timeout")
    }  # fmt: skip
    assert all(task.finished_at - task.created_at >= 0.7 for task in tasks)


async def test_a_rate_spaces_the_calls_of_the_pool(make_workshop: MakeWorkshop) -> None:
    workshop = make_workshop(rate_per_min=60 / 0.05)
    task_ids = await submit_many(workshop, 8)
    await eventually(lambda: any(workshop.task(i).reason is WaitReason.UPSTREAM_RATE_LIMITED for i in task_ids))
    assert await states(workshop, task_ids) == {State.COMPLETED}
    times = workshop.provider.times
    assert times[-1] - times[0] >= 7 * 0.05 - 0.02


async def test_drain_waits_for_what_runs(make_workshop: MakeWorkshop) -> None:
    workshop = make_workshop(default=Switch(call_s=0.1))
    task_id = await workshop.submit()
    await eventually(lambda: workshop.provider.running)
    await asyncio.wait_for(workshop.drain(5.0), 1.0)
    assert workshop.task(task_id).state is State.COMPLETED


async def test_drain_hands_back_what_still_runs_at_its_deadline(make_workshop: MakeWorkshop) -> None:
    one = make_workshop(default=hang)
    task_id = await one.submit()
    await eventually(lambda: one.provider.running)
    await asyncio.wait_for(one.drain(0.05), 1.0)
    await one.instance.crash()
    await one.instance.parts.release_all()
    two = make_workshop()
    await eventually(lambda: two.provider.calls)
    await eventually(lambda: task_id in two.instance.task_cache.live or two.instance.task_cache.finished(task_id))
    [task] = await two.finished(task_id)
    assert (task.state, task.possibly_billed_twice) == (State.COMPLETED, 1)


async def test_drain_ends_waits_at_once_and_another_instance_takes_them_unharmed(make_workshop: MakeWorkshop) -> None:
    one = make_workshop(fault(429, retry_after_s=60.0), tempo=BreakerConfig())
    await one.submit("first")
    await eventually(lambda: one.pacing.blocked("m"))
    task_ids = [await one.submit(i) for i in range(8)]
    await eventually(lambda: len(one.pool.parking) >= 8)
    await asyncio.wait_for(one.drain(25.0), 1.0)
    await one.instance.crash()
    await one.instance.parts.release_all()
    two = make_workshop()
    await eventually(lambda: all(two.instance.task_cache.finished(task_id) for task_id in task_ids))
    tasks = await two.finished(*task_ids)
    assert {(task.state, task.attempts, task.possibly_billed_twice) for task in tasks} == {(State.COMPLETED, 1, 0)}


async def test_an_interrupted_task_shows_the_attempts_that_were_made(make_workshop: MakeWorkshop) -> None:
    workshop = make_workshop(pool=False)
    claim = await workshop.claim()
    claim.checkpoint = replace(claim.checkpoint, starts=2, attempts=2, ambiguous_calls=2)
    dispatcher = workshop.instance.parts.dispatcher
    dispatcher.leave_slot(claim)
    dispatcher.put(claim)
    workshop.pool.start()
    (task,) = await workshop.finished(claim.task.id)
    assert (task.error.code, task.attempts, task.possibly_billed_twice) == ("interrupted", 2, 2)


class Faulty:
    """An upstream that works, but for prompts that name a fault; those always get this error."""

    def __init__(self, error: Exception, call_s: float = 0.005) -> None:
        self.error, self.call_s = error, call_s

    async def __call__(self, call: Call) -> Reply:
        await asyncio.sleep(self.call_s)
        if "faulty" in call.request.prompt:
            raise self.error
        return pictures(call.count)


def mixed(faulty: int, good: int, order: str) -> list[str]:
    """Prompts in this order: the faulty ones first, or between the good ones."""
    bad, fine = [f"faulty {i}" for i in range(faulty)], [f"good {i}" for i in range(good)]
    if order == "first":
        return bad + fine
    step = len(fine) // len(bad)
    beside = [prompt for i, one in enumerate(bad) for prompt in (*fine[i * step : (i + 1) * step], one)]
    return beside + fine[len(bad) * step :]


@pytest.mark.parametrize("order", ["first", "spread"])
@pytest.mark.parametrize("faulty", [5, 12])
@pytest.mark.parametrize("error", [fault(500), fault(502, ambiguous=True), loss()], ids=["500", "502", "loss"])
async def test_tasks_that_always_fail_end_and_keep_no_good_one_waiting(
    make_workshop: MakeWorkshop, error: Exception, faulty: int, order: str
) -> None:
    tempo = BreakerConfig(0.05, 0.5, longest_s=0.5, step_s=0.05)
    workshop = make_workshop(default=Faulty(error), base_s=0.3, tempo=tempo)
    prompts = mixed(faulty, 30, order)
    ids = dict(zip(prompts, [await workshop.submit(prompt) for prompt in prompts], strict=True))
    good = [ids[prompt] for prompt in prompts if "good" in prompt]
    assert await states(workshop, good, within_s=1.5) == {State.COMPLETED}
    bad = await workshop.finished(*(ids[prompt] for prompt in prompts if "faulty" in prompt), within_s=5.0)
    most = 2 if error.ambiguous else 3
    assert {(task.state, task.attempts) for task in bad} == {(State.FAILED, most)}
    assert len(workshop.provider.calls) <= 30 + faulty * most


async def test_what_fails_for_one_model_is_nothing_against_another(make_workshop: MakeWorkshop) -> None:
    workshop = make_workshop(default=Faulty(fault(500)), base_s=60.0, tempo=BreakerConfig())
    for i in range(8):
        await workshop.submit(f"faulty {i}", model="broken")
    await eventually(lambda: workshop.pacing.blocked("broken"))
    assert await states(workshop, await submit_many(workshop, 10), within_s=2.0) == {State.COMPLETED}


async def test_a_dead_upstream_costs_no_task_more_than_one_attempt(make_workshop: MakeWorkshop) -> None:
    upstream = Switch(fault(500))
    workshop = make_workshop(default=upstream, base_s=0.02, tempo=BreakerConfig(0.01, 0.02, longest_s=0.4, step_s=0.02))
    task_ids = await submit_many(workshop, 8)
    await eventually(lambda: len(workshop.provider.calls) > 40)
    upstream.error = None
    tasks = await workshop.finished(*task_ids)
    assert {task.state for task in tasks} == {State.COMPLETED}
    assert max(task.attempts for task in tasks) <= 2


@pytest.mark.parametrize("tasks", [5, 10])
async def test_tasks_that_always_fail_with_nothing_beside_them_end_after_the_time_that_an_outage_is_excused(
    make_workshop: MakeWorkshop, tasks: int
) -> None:
    tempo = BreakerConfig(0.01, 0.02, longest_s=0.4, step_s=0.02, excused_s=0.5)
    workshop = make_workshop(default=Switch(fault(500)), base_s=0.02, tempo=tempo)
    ended = await workshop.finished(*await submit_many(workshop, tasks), within_s=5.0)
    assert {(task.state, task.error.code, task.attempts) for task in ended} == {(State.FAILED, "upstream_error", 3)}


async def test_an_overloaded_upstream_is_excused_for_as_long_as_it_lasts(make_workshop: MakeWorkshop) -> None:
    upstream = Switch(fault(503))
    tempo = BreakerConfig(0.01, 0.02, longest_s=0.4, step_s=0.02, excused_s=0.0)
    workshop = make_workshop(default=upstream, base_s=0.02, tempo=tempo)
    task_ids = await submit_many(workshop, 8)
    await eventually(lambda: len(workshop.provider.calls) > 40)
    upstream.error = None
    assert await states(workshop, task_ids) == {State.COMPLETED}


async def test_tasks_of_a_model_that_rests_take_no_slot_from_others_however_many_are_in_front(
    make_workshop: MakeWorkshop,
) -> None:
    workshop = make_workshop(fault(429, retry_after_s=60.0), tempo=BreakerConfig(), slots=2)
    await workshop.submit("first", model="busy")
    await eventually(lambda: workshop.pacing.blocked("busy"))
    waiting = [await workshop.submit(i, model="busy") for i in range(300)]
    assert await states(workshop, [await workshop.submit("other")], within_s=3.0) == {State.COMPLETED}
    assert {workshop.task(task_id).reason for task_id in waiting} == {WaitReason.UPSTREAM_RATE_LIMITED}
    assert len(workshop.provider.calls) == 2


async def test_a_deadline_ends_a_parked_task(make_workshop: MakeWorkshop) -> None:
    workshop = make_workshop(fault(429, retry_after_s=60.0), tempo=BreakerConfig(), deadline_s=0.5)
    await pause(workshop)
    [task] = await workshop.finished(await workshop.submit("parked"), within_s=2.0)
    assert (task.state, task.error.code) == (State.FAILED, "upstream_rate_limited")
    assert task.finished_at - task.created_at < 1.0
    assert len(workshop.pool.parking) == 0


async def test_what_is_parked_beyond_what_runs_soon_is_released_to_other_instances(
    make_workshop: MakeWorkshop,
) -> None:
    tempo = BreakerConfig(0.05, 0.1, longest_s=5.0, step_s=0.01)
    one = make_workshop(fault(429, retry_after_s=0.5), default=Switch(call_s=0.1), slots=2, tempo=tempo)
    await one.submit("first")
    await eventually(lambda: one.pacing.blocked("m"))
    task_ids = [await one.submit(i) for i in range(40)]
    await eventually(lambda: len(one.pool.parking) == 40)
    two = make_workshop(slots=5)
    await eventually(lambda: not one.instance.notifier.alone)
    await eventually(lambda: len(two.provider.calls) >= 20)
    await eventually(
        lambda: all(two.instance.task_cache.finished(i) or one.instance.task_cache.finished(i) for i in task_ids)
    )
    assert len(one.provider.calls) + len(two.provider.calls) == 42
