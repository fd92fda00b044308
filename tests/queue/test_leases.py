"""Tests of leases: renewed, expired, taken over and released, and the late results of stale owners."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Any

import orjson
import pytest
from msgspec.structs import replace

from imagegen.errors import QueueUnavailable
from imagegen.queue.claim import Claim, StartResult
from imagegen.queue.client_queue import CacheResult
from imagegen.queue.takeover import MAX_TAKEN
from imagegen.queue.verbs.consume import Entry
from imagegen.tasks.task import State
from tests.conftest import Instance, MakeInstance
from tests.queue.finishing import IMAGE, at_rest, end
from tests.support import eventually, submission


async def test_an_expired_lease_is_taken_over_by_another_instance(make_instance: MakeInstance) -> None:
    one = make_instance(lease_s=1.0)
    await one.client_queue.submit(submission("a"))
    claim = await one.claim()
    await one.worker_queue.start(claim)
    await one.crash()
    two = make_instance(lease_s=1.0)
    taken = await two.claim()
    assert taken.task.id == claim.task.id
    assert (taken.checkpoint.attempts, taken.checkpoint.ambiguous_calls) == (1, 1)
    assert await two.worker_queue.start(taken) is StartResult.STARTED
    assert taken.task.sequence > claim.task.sequence
    assert (await end(two, taken)).possibly_billed_twice == 1
    assert await at_rest(two)


async def test_a_renewed_lease_is_not_taken_over(make_instance: MakeInstance) -> None:
    one, two = make_instance(lease_s=0.6), make_instance(lease_s=0.6)
    await one.client_queue.submit(submission("a"))
    claims = [asyncio.create_task(i.worker_queue.claim()) for i in (one, two)]
    await asyncio.wait(claims, timeout=20, return_when=asyncio.FIRST_COMPLETED)
    done, waiting = await asyncio.wait(claims, timeout=2.0)
    assert (len(done), len(waiting)) == (1, 1)


async def taken_over(make_instance: MakeInstance) -> tuple[Instance, Claim, Instance, Claim]:
    """Return a stale claim and the claim that replaced it, each after its instance; both are started."""
    one = make_instance(lease_s=0.5)
    await one.client_queue.submit(submission("a"))
    stale = await one.claim()
    await one.worker_queue.start(stale)
    await one.crash()
    two = make_instance(lease_s=0.5)
    taken = await two.claim()
    await two.worker_queue.start(taken)
    return one, stale, two, taken


async def test_a_late_result_of_a_stale_owner_never_replaces_a_final_one(make_instance: MakeInstance) -> None:
    one, stale, two, taken = await taken_over(make_instance)
    await end(two, taken)
    stored = await end(one, stale, "failed")
    assert stored.state is State.COMPLETED
    assert (await one.task(stale.task.id)).state is State.COMPLETED


async def test_a_late_result_whose_image_has_completed_the_task_is_not_counted_as_paid_twice(
    make_instance: MakeInstance,
) -> None:
    one = make_instance(lease_s=0.5)
    await one.client_queue.submit(submission("a"))
    stale = await one.claim()
    await one.worker_queue.start(stale)
    await one.crash()
    stale.checkpoint = replace(stale.checkpoint, images=(IMAGE,))
    two = make_instance(lease_s=0.5)
    found = await two.claim()
    found.checkpoint = replace(found.checkpoint, images=(IMAGE,), ambiguous_calls=0)
    found.task = replace(found.task, possibly_billed_twice=0)
    assert (await end(two, found)).possibly_billed_twice == 0
    assert (await end(one, stale)).possibly_billed_twice == 0
    assert (await two.read(found.task.id)).possibly_billed_twice == 0


async def test_a_late_result_is_accepted_if_no_other_exists(make_instance: MakeInstance) -> None:
    one, stale, two, taken = await taken_over(make_instance)
    assert (await end(one, stale)).state is State.COMPLETED
    stored = await end(two, taken, "failed")
    assert stored.state is State.COMPLETED
    assert await at_rest(two)


async def test_a_stale_owner_does_not_release_a_claim_taken_over(make_instance: MakeInstance) -> None:
    one, stale, two, taken = await taken_over(make_instance)
    await one.worker_queue.release([stale], leaving=True)
    (row,) = await two.verbs.pending_entries()
    assert (row.entry_id, row.consumer) == (taken.entry_id, two.parts.dispatcher.instance)
    assert (await end(two, taken)).state is State.COMPLETED
    assert await at_rest(two)


async def test_claims_released_at_shutdown_wake_another_instance(make_instance: MakeInstance) -> None:
    one = make_instance()
    await one.client_queue.submit(submission("a"))
    claim = await one.claim()
    await one.worker_queue.start(claim)
    two = make_instance()
    waiting = asyncio.create_task(two.claim())
    one.worker_queue.quiet()
    await one.crash()
    await one.parts.release_all()
    taken = await asyncio.wait_for(waiting, 20)
    assert await two.worker_queue.start(taken) is StartResult.INHERITED
    assert taken.checkpoint.ambiguous_calls == 1
    assert await two.worker_queue.start(taken) is StartResult.STARTED
    assert taken.task.attempts == 1
    assert (await end(two, taken)).state is State.COMPLETED
    assert await at_rest(two)
    consumers = await two.connection.commands.xinfo_consumers(two.keys.stream, "pool")
    assert len(consumers) == 1


async def test_a_late_result_does_not_affect_the_next_epoch(make_instance: MakeInstance) -> None:
    instance = make_instance()
    await instance.client_queue.submit(submission("a"))
    late = await instance.claim()
    await instance.worker_queue.start(late)
    await instance.client_queue.cancel(late.task.id)
    assert (await instance.client_queue.submit(submission("a"))).cached is CacheResult.MISS
    assert (await end(instance, late)).state is State.PENDING
    claim = await instance.claim()
    assert claim.task.request_json == submission("a").request_json


async def test_an_idle_instance_takes_over_from_a_busy_one_that_died(make_instance: MakeInstance) -> None:
    idle, busy = make_instance(lease_s=1.0), make_instance(lease_s=1.0)
    await eventually(lambda: not idle.notifier.alone and not busy.notifier.alone)
    runs = asyncio.create_task(busy.worker_queue.claim())
    await busy.client_queue.submit(submission("a"))
    await asyncio.wait_for(runs, 20)
    await busy.crash()
    taken = await idle.claim()
    assert taken.task.id == submission("a").task_id


def word(kind: str) -> bytes:
    return orjson.dumps({"from": "another", "kind": kind})


async def test_each_message_of_a_busy_peer_schedules_a_takeover_check(make_instance: MakeInstance) -> None:
    instance = make_instance(lease_s=0.6)
    commands = instance.connection.meter.commands
    await eventually(lambda: commands["takeover"] == 1 and commands["control"])  # it has looked, and listens
    await instance.connection.commands.publish(instance.keys.notifications, word("busy"))
    await eventually(lambda: commands["takeover"] == 2)
    await instance.connection.commands.publish(instance.keys.notifications, word("busy"))
    await eventually(lambda: commands["takeover"] == 3)


async def test_an_instance_with_a_short_lease_takes_no_claim_of_a_living_one_with_a_long_lease(
    make_instance: MakeInstance,
) -> None:
    one = make_instance(lease_s=6.0)
    await one.client_queue.submit(submission("a"))
    claim = await one.claim()
    await one.worker_queue.start(claim)
    two = make_instance(lease_s=0.3)
    taken = asyncio.create_task(two.worker_queue.claim())
    assert not (await asyncio.wait([taken], timeout=2.5))[0]
    taken.cancel()
    assert (await end(one, claim)).possibly_billed_twice == 0
    assert await at_rest(one)


async def test_a_dead_instance_with_a_short_lease_is_replaced_when_that_lease_has_ended(
    make_instance: MakeInstance,
) -> None:
    one = make_instance(lease_s=0.5)
    await one.client_queue.submit(submission("a"))
    claim = await one.claim()
    await one.worker_queue.start(claim)
    await one.crash()
    two = make_instance(lease_s=60.0)
    async with asyncio.timeout(20):
        assert (await two.claim()).task.id == claim.task.id


async def all_idle(instance: Instance, longer_than_s: float) -> bool:
    """Return whether all claims of all instances were renewed so long ago."""
    return all(row.idle_s > longer_than_s for row in await instance.verbs.pending_entries())


async def test_a_takeover_that_redis_breaks_off_half_way_leaves_no_claim_without_a_loop(
    make_instance: MakeInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = MAX_TAKEN + 20
    one = make_instance(lease_s=0.5, slots=count)
    await asyncio.gather(*(one.client_queue.submit(submission(f"{number}")) for number in range(count)))
    for _ in range(count):
        await one.claim()
    await one.crash()
    await eventually(partial(all_idle, one, 0.5))
    two = make_instance(lease_s=0.5, slots=count, start=False)
    take, pages = two.verbs.claim_expired, list[int]()

    async def take_unless_second(consumer: str, entry_ids: Sequence[str], *args: Any, **options: Any) -> list[Entry]:
        pages.append(len(entry_ids))
        if len(pages) == 2:
            raise QueueUnavailable
        return await take(consumer, entry_ids, *args, **options)

    monkeypatch.setattr(two.verbs, "claim_expired", take_unless_second)
    two.start()
    claims = await asyncio.gather(*(two.claim() for _ in range(count)))
    assert len({claim.task.id for claim in claims}) == count
    assert pages[0] < count, "the second page was broken off, after claims of the first one"


async def test_a_claim_with_a_short_lease_that_a_living_instance_with_a_long_one_took_over_is_left_to_it(
    make_instance: MakeInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("imagegen.queue.takeover.CONFIRM_S", 0.3)
    dead, taker, late = make_instance(lease_s=0.3), make_instance(start=False), make_instance(start=False)
    await dead.client_queue.submit(submission("a"))
    await dead.claim()
    await dead.crash()
    probe, looked, taken = late.verbs.probe_claim, asyncio.Event(), asyncio.Event()

    async def held(consumer: str, entry_id: str) -> None:
        looked.set()
        await taken.wait()
        await probe(consumer, entry_id)

    monkeypatch.setattr(late.verbs, "probe_claim", held)
    late.start()
    second = asyncio.create_task(late.claim())
    await asyncio.wait_for(looked.wait(), 20)
    taker.start()
    claim = await taker.claim()

    await eventually(partial(all_idle, taker, 0.3))
    taken.set()
    assert not (await asyncio.wait([second], timeout=2.5))[0]
    second.cancel()
    assert (await taker.worker_queue.start(claim)) is StartResult.STARTED
    assert (await end(taker, claim)).possibly_billed_twice == 0
    assert await at_rest(taker)
