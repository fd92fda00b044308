"""Cancels of tasks with a provider job: what is called, when the task is over, and what is taken back."""

from __future__ import annotations

import asyncio
import time

import pytest
from msgspec.structs import replace

from imagegen.errors import QueueUnavailable
from imagegen.queue import canceller as canceller_module
from imagegen.queue.claim import Claim
from imagegen.queue.codec import decode_record
from imagegen.tasks.provider_job import AcceptedJob, JobHandle
from imagegen.tasks.task import State, Task
from tests import queue_budgets
from tests.conftest import Instance, MakeInstance
from tests.queue_budgets import PRICE, TOTAL, cost_of, limited, put, started, used
from tests.support import eventually, submission

HANDLE = JobHandle("fal", "job_1")


class Upstream:
    """Provider that answers each cancel with `answer`, after `released`."""

    def __init__(self, answer: bool | None = True) -> None:
        self.answer = answer
        self.cancelled: list[JobHandle] = []
        self.asked, self.released = asyncio.Event(), asyncio.Event()
        self.released.set()

    async def cancel(self, handle: JobHandle) -> bool | None:
        self.cancelled.append(handle)
        self.asked.set()
        await self.released.wait()
        return self.answer


def with_upstream(instance: Instance, answer: bool | None = True) -> Upstream:
    upstream = Upstream(answer)
    instance.client_queue.canceller.cancel_upstream = upstream.cancel
    return upstream


async def with_job(instance: Instance, name: str = "a") -> Claim:
    (claim,) = await started(instance, name)
    claim.checkpoint = claim.checkpoint.with_job(AcceptedJob(HANDLE, (0,)))
    assert await instance.worker_queue.record_job(claim, claim.checkpoint)
    return claim


async def stored(instance: Instance, task_id: str) -> Task:
    return decode_record(await instance.stored(instance.keys.record(task_id)))[1]


@pytest.fixture
async def one(make_instance: MakeInstance) -> Instance:
    instance = limited(make_instance(start=False), (TOTAL, 3 * PRICE))
    await instance.verbs.create_group()
    return instance


async def test_a_confirmed_cancel_is_shown_and_gives_the_money_back(one: Instance) -> None:
    upstream, claim = with_upstream(one), await with_job(one)
    ended: list[Task] = []
    one.client_queue.canceller.on_ended = ended.append
    task = await one.cancel(claim.task.id)
    assert (task.state, task.cancelled_upstream, upstream.cancelled) == (State.CANCELLED, True, [HANDLE])
    assert (cost_of(task).charged, cost_of(task).unsure, await used(one)) == (0, 0, 0)
    kept = await stored(one, task.id)
    assert (kept.cancelled_upstream, cost_of(kept).charged, ended) == (True, 0, [task])


async def test_a_field_of_the_request_is_not_taken_for_a_confirmed_cancel(
    one: Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    _ = with_upstream(one)
    request = b'{"prompt":"a","model":"m","extra":{"upstream":true}}'
    monkeypatch.setattr(queue_budgets, "submission", lambda name: replace(submission(name), request_json=request))
    claim = await with_job(one)
    task = await one.cancel(claim.task.id)
    assert (task.cancelled_upstream, cost_of(task).charged, await used(one)) == (True, 0, 0)


@pytest.mark.parametrize("answer", [False, None])
async def test_a_cancel_that_the_provider_does_not_confirm_stays_charged(one: Instance, answer: bool | None) -> None:
    upstream, claim = with_upstream(one, answer), await with_job(one)
    task = await one.cancel(claim.task.id)
    assert (task.cancelled_upstream, cost_of(task).charged, cost_of(task).unsure) == (False, PRICE, PRICE)
    assert (await used(one), upstream.cancelled) == (PRICE, [HANDLE])


async def test_a_task_without_a_job_is_not_cancelled_upstream(one: Instance) -> None:
    upstream = with_upstream(one)
    (claim,) = await started(one, "a")
    task = await one.cancel(claim.task.id)
    assert (task.cancelled_upstream, upstream.cancelled) == (False, [])


async def test_the_task_is_over_and_its_slot_free_before_the_provider_answers(one: Instance) -> None:
    upstream, claim = with_upstream(one), await with_job(one)
    upstream.released.clear()
    cancel = asyncio.ensure_future(one.cancel(claim.task.id))
    await asyncio.wait_for(upstream.asked.wait(), 20)
    assert claim.lost
    assert (await stored(one, claim.task.id)).state is State.CANCELLED
    upstream.released.set()
    assert (await cancel).cancelled_upstream


async def test_a_provider_that_does_not_answer_leaves_the_task_charged(
    one: Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(canceller_module, "UPSTREAM_S", 0.05)
    upstream, claim = with_upstream(one), await with_job(one)
    upstream.released.clear()
    task = await one.cancel(claim.task.id)
    assert (task.cancelled_upstream, cost_of(task).charged) == (False, PRICE)


async def test_a_cancel_is_completed_if_its_client_does_not_wait(one: Instance) -> None:
    upstream, claim = with_upstream(one), await with_job(one)
    upstream.released.clear()
    cancel = asyncio.ensure_future(one.cancel(claim.task.id))
    await asyncio.wait_for(upstream.asked.wait(), 20)
    cancel.cancel()
    await asyncio.wait([cancel])
    upstream.released.set()
    await one.client_queue.canceller.close()
    assert ((await stored(one, claim.task.id)).cancelled_upstream, await used(one)) == (True, 0)


async def test_two_cancels_at_once_are_one_upstream(make_instance: MakeInstance, one: Instance) -> None:
    two = limited(make_instance(start=False), (TOTAL, 3 * PRICE))
    first, second, claim = with_upstream(one), with_upstream(two), await with_job(one)
    tasks = await asyncio.gather(*(each.cancel(claim.task.id) for each in (one, two)))
    assert {task.state for task in tasks} == {State.CANCELLED}
    assert first.cancelled + second.cancelled == [HANDLE]
    assert await used(one) == 0


async def late(instance: Instance, claim: Claim) -> None:
    instance.worker_queue.on_job_dropped(claim, HANDLE, PRICE)
    await instance.client_queue.canceller.close()


async def test_a_job_that_is_accepted_after_the_cancel_is_cancelled_once(one: Instance) -> None:
    upstream = with_upstream(one)
    (claim,) = await started(one, "a")
    taken_back = []
    one.client_queue.canceller.on_taken_back = lambda _task, amount: taken_back.append(amount)
    await one.client_queue.cancel(claim.task.id)
    assert await used(one) == PRICE
    await late(one, claim)
    await late(one, claim)
    task = await stored(one, claim.task.id)
    assert (task.cancelled_upstream, cost_of(task).charged, await used(one)) == (True, 0, 0)
    assert taken_back == [PRICE]
    assert upstream.cancelled[0] == HANDLE


@pytest.mark.parametrize(("is_listed", "cancelled"), [(False, [HANDLE]), (True, [])])
async def test_a_late_job_of_a_task_that_another_instance_took_over_is_cancelled_if_that_can_not_find_it(
    make_instance: MakeInstance, one: Instance, is_listed: bool, cancelled: list[JobHandle]
) -> None:
    upstream = with_upstream(one)
    one.client_queue.canceller.lists_jobs = lambda _channel: is_listed
    (claim,) = await started(one, "a")
    two = make_instance(start=False)
    await two.parts.takeover.take({claim.entry_id: 0.0}, min_idle_s=0.0)
    await late(one, claim)
    assert upstream.cancelled == cancelled


async def test_a_job_that_another_instance_waits_for_is_not_cancelled_if_the_reply_to_its_record_was_lost(
    make_instance: MakeInstance, one: Instance
) -> None:
    upstream, claim = with_upstream(one), await with_job(one)
    two = make_instance(start=False)
    await two.parts.takeover.take({claim.entry_id: 0.0}, min_idle_s=0.0)
    assert not await one.worker_queue.record_job(claim, replace(claim.checkpoint, warnings=("again",)))
    await late(one, claim)
    assert upstream.cancelled == []


@pytest.mark.parametrize(("is_listed", "cancelled"), [(False, [HANDLE]), (True, [])])
async def test_a_late_job_of_a_task_that_was_cancelled_and_submitted_again_is_cancelled_if_the_task_can_not_find_it(
    one: Instance, is_listed: bool, cancelled: list[JobHandle]
) -> None:
    upstream = with_upstream(one)
    one.client_queue.canceller.lists_jobs = lambda _channel: is_listed
    (claim,) = await started(one, "a")
    await one.client_queue.cancel(claim.task.id)
    (again,) = await put(one, "a")
    await late(one, claim)
    task = await stored(one, again.id)
    assert (upstream.cancelled, task.state, task.cancelled_upstream) == (cancelled, State.PENDING, False)


async def test_a_record_of_a_version_before_reads_as_not_confirmed(one: Instance) -> None:
    with_upstream(one, False)
    claim = await with_job(one)
    task = await one.cancel(claim.task.id)
    record = await one.stored(one.keys.record(task.id))
    assert b"upstream" not in record.partition(b"\n")[2]
    assert task.finished_at == pytest.approx(time.time(), abs=60)


@pytest.mark.parametrize("is_running", [False, True])
async def test_a_task_whose_record_redis_has_lost_can_be_cancelled(
    make_instance: MakeInstance, is_running: bool
) -> None:
    one = make_instance()
    (task,) = await put(one, "a")
    if is_running:
        claim = await one.claim()
        await one.worker_queue.start(claim)
    await one.connection.commands.delete(one.keys.record(task.id))

    async def is_cancelled() -> bool:
        try:
            cancelled = await one.client_queue.cancel(task.id)
        except QueueUnavailable:  # while other instances may write back what they know of it
            return False
        assert cancelled is not None
        return cancelled.state is State.CANCELLED

    await eventually(is_cancelled)
    assert (await one.read(task.id)).state is State.CANCELLED
