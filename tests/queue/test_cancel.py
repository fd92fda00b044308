"""Tests of cancels of tasks: waiting, running, finished, and on another instance."""

from __future__ import annotations

import asyncio

from imagegen.queue.claim import StartResult
from imagegen.tasks.task import State
from tests.conftest import MakeInstance
from tests.queue.finishing import at_rest, end, run_one, start_submitted
from tests.support import eventually, submission


async def test_a_cancelled_task_is_never_started(make_instance: MakeInstance) -> None:
    one, two = make_instance(), make_instance(start=False)
    await one.client_queue.submit(submission("a"))
    claim = await one.claim()
    assert (await two.cancel(claim.task.id)).state is State.CANCELLED
    assert await one.worker_queue.start(claim) is StartResult.LOST
    one.worker_queue.drop(claim)
    assert (await one.task(claim.task.id)).state is State.CANCELLED
    assert await at_rest(one)


async def test_a_late_result_never_revives_a_cancelled_task(make_instance: MakeInstance) -> None:
    one, two = make_instance(), make_instance(start=False)
    await one.client_queue.submit(submission("a"))
    claim = await one.claim()
    await one.worker_queue.start(claim)
    cancelled = await two.cancel(claim.task.id)
    assert cancelled.sequence > claim.task.sequence
    assert (await end(one, claim)).state is State.CANCELLED
    assert cancelled.request_json == submission("a").request_json


async def test_a_cancel_on_another_instance_stops_the_attempt(make_instance: MakeInstance) -> None:
    one, two = make_instance(), make_instance()
    await eventually(lambda: not two.notifier.alone and not one.notifier.alone)
    claim = await start_submitted(one)
    stopped = asyncio.Event()
    claim.on_lost = stopped.set
    await two.client_queue.cancel(claim.task.id)
    await asyncio.wait_for(stopped.wait(), 6)
    assert claim.lost


async def test_cancel_of_a_finished_task_changes_nothing(make_instance: MakeInstance) -> None:
    instance = make_instance()
    await instance.client_queue.submit(submission("a"))
    final = await run_one(instance)
    assert await instance.client_queue.cancel(final.id) == final
    assert await instance.client_queue.cancel("0" * 32) is None


async def test_a_cancelled_waiting_task_leaves_the_stream_empty(make_instance: MakeInstance) -> None:
    instance = make_instance(start=False)
    await instance.verbs.create_group()
    await instance.client_queue.submit(submission("a"))
    await instance.client_queue.cancel(submission("a").task_id)
    assert await at_rest(instance)


async def test_a_cancel_while_the_entry_is_on_its_way_to_this_instance_is_no_loss_of_redis(
    make_instance: MakeInstance,
) -> None:
    instance = make_instance(start=False)
    await instance.verbs.create_group()
    losses: list[str] = []
    instance.parts.leases.on_loss = lambda: losses.append("loss")
    await instance.client_queue.submit(submission("a"))
    entries = await instance.verbs.read_entries(instance.parts.dispatcher.instance, 1, 0.01)
    await instance.client_queue.cancel(submission("a").task_id)
    assert await instance.parts.leases.hold(entries) == []
    assert losses == []
    assert (await instance.read(submission("a").task_id)).state is State.CANCELLED
    assert await at_rest(instance)
