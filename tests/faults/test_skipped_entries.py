"""Entries that the group has passed without a claim, after commands of an operator: their tasks run nevertheless."""

from __future__ import annotations

import asyncio
from functools import partial

import pytest

from imagegen.queue import change_relay, takeover, task_lookup
from tests.conftest import Instance, MakeInstance
from tests.support import counts, eventually, submission

LEASE_S = 1.2


@pytest.fixture
def soon(late_refresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the regular checks of instances in tenths of a second."""
    monkeypatch.setattr(takeover, "FIRST_CHECK_S", 0.3)
    monkeypatch.setattr(takeover, "EARLY_CHECK_S", 0.2)
    monkeypatch.setattr(change_relay, "REFRESH_S", 0.2)
    monkeypatch.setattr(change_relay, "TRUST_S", 0.4)
    monkeypatch.setattr(task_lookup, "TRUST_S", 0.4)


async def pass_all(instance: Instance) -> None:
    await instance.connection.commands.xgroup_setid(instance.keys.stream, "pool", "$")


async def remove_claims(instance: Instance) -> None:
    for row in await instance.connection.commands.xinfo_consumers(instance.keys.stream, "pool"):
        await instance.connection.commands.xgroup_delconsumer(instance.keys.stream, "pool", row["name"])


async def test_a_task_that_the_group_was_moved_past_runs_where_it_was_accepted(
    make_instance: MakeInstance, soon: None
) -> None:
    one = make_instance(lease_s=LEASE_S)
    await eventually(lambda: one.notifier.subscribed)
    names = {(await one.client_queue.submit(submission(number))).task.id for number in range(3)}
    await pass_all(one)
    claims = [await one.claim(30) for _ in names]
    assert {claim.task.id for claim in claims} == names
    assert not any(claim.task.possibly_billed_twice for claim in claims)


async def test_tasks_that_the_group_was_moved_past_run_on_another_instance(
    make_instance: MakeInstance, soon: None
) -> None:
    gone = make_instance(lease_s=LEASE_S, start=False)
    await gone.verbs.create_group()
    names = {(await gone.client_queue.submit(submission(number))).task.id for number in range(250)}
    await pass_all(gone)
    lives = make_instance(lease_s=LEASE_S, slots=100)
    claimed: set[str] = set()
    while claimed != names:
        claim = await lives.claim(30)
        assert claim.task.id not in claimed
        claimed.add(claim.task.id)
        lives.parts.dispatcher.leave_slot(claim)


async def test_a_removed_claim_of_a_dead_instance_is_taken_over(make_instance: MakeInstance, soon: None) -> None:
    one = make_instance(lease_s=LEASE_S)
    waiting = asyncio.create_task(one.claim())
    await eventually(lambda: one.parts.dispatcher.free_slots)
    task_id = (await one.client_queue.submit(submission("a"))).task.id
    await one.worker_queue.start(await asyncio.wait_for(waiting, 20))
    await one.crash()
    await remove_claims(one)
    two = make_instance(lease_s=LEASE_S)
    claim = await two.claim(30)
    assert (claim.task.id, claim.checkpoint.attempts) == (task_id, 1)


async def test_removed_claims_stay_with_a_live_instance(make_instance: MakeInstance, soon: None) -> None:
    one, two = make_instance(lease_s=4.0), make_instance(lease_s=4.0)
    waiting = asyncio.create_task(one.claim())
    await eventually(lambda: one.parts.dispatcher.free_slots)
    await two.client_queue.submit(submission("a"))
    claim = await asyncio.wait_for(waiting, 20)
    await one.worker_queue.start(claim)
    idle = asyncio.create_task(two.worker_queue.claim())
    written_back = one.connection.meter.written_back
    for times in (1, 2):
        await remove_claims(one)
        await eventually(partial(counts, written_back, "running", times))
    assert not claim.lost
    assert not idle.done()
    idle.cancel()
