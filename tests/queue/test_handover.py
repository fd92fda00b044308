"""Claims that go from one instance to another: what arrives, and what comes back."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Awaitable, Sequence

import orjson
import pytest

from imagegen.chosen_parts import other_instances
from imagegen.queue import handover, notifier
from imagegen.queue.claim import Claim
from imagegen.queue.verbs.consume import Entry
from imagegen.tasks.provider_job import AcceptedJob, JobHandle
from tests.conftest import Instance, MakeInstance
from tests.support import eventually, submission

Pair = tuple[Instance, Instance]

JOB = AcceptedJob(JobHandle("fal", "job_1", "account"), (0,))


@pytest.fixture
async def pair(make_instance: MakeInstance) -> Pair:
    """Return two instances that have heard of each other."""
    one, other = make_instance(), make_instance()
    await eventually(lambda: one.notifier.peers and other.notifier.peers)
    return one, other


async def claimed(instance: Instance, name: str = "a") -> Claim:
    await instance.client_queue.submit(submission(name))
    return await instance.claim()


def may_serve(instance: Instance) -> bool:
    """Return whether an instance leaves a model that it does not serve itself for others."""
    return other_instances(instance.parts).channels.may_serve("a-model", sandbox=False)


async def test_a_new_instance_excludes_no_model_of_peers_that_it_has_not_met(
    make_instance: MakeInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notifier, "FIRST_GREETING_S", 600.0)
    one = make_instance()
    await eventually(lambda: one.notifier.has_met_peers)
    assert not may_serve(one)
    late = make_instance(start=False)
    assert may_serve(late)
    late.start()
    await eventually(lambda: late.notifier.has_met_peers)
    assert set(late.notifier.greetings) == {one.notifier.instance}


async def test_a_new_subscription_makes_no_instance_wait_for_its_peers_again(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, _ = pair
    monkeypatch.setattr(notifier, "FIRST_GREETING_S", 600.0)
    await eventually(lambda: one.notifier.has_met_peers)
    joined = asyncio.Event()
    one.notifier.on_join.append(lambda: joined.set() if one.notifier.has_met_peers else None)
    one.connection.subscriptions.hang_up()
    await asyncio.wait_for(joined.wait(), 20)


async def test_an_instance_waits_for_a_silent_subscriber_no_longer_than_for_a_first_greeting(
    make_instance: MakeInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notifier, "FIRST_GREETING_S", 600.0)
    new = make_instance(start=False)
    async with new.connection.subscriptions.subscribed(new.keys.notifications):
        new.start()
        await eventually(lambda: new.notifier.subscribed)
        await new.notifier.flush()
        assert not new.notifier.has_met_peers
        monkeypatch.setattr(notifier, "FIRST_GREETING_S", 0.0)
        assert new.notifier.has_met_peers


async def test_a_peer_from_before_a_new_subscription_does_not_count_as_one_that_has_answered(
    make_instance: MakeInstance,
) -> None:
    one, unmet = make_instance(), make_instance(start=False)
    await eventually(lambda: one.notifier.has_met_peers)
    hello = orjson.dumps({"from": "a-gone-instance", "kind": "hello"})
    joined = asyncio.Event()
    async with unmet.connection.subscriptions.subscribed(one.keys.notifications):
        await unmet.connection.commands.publish(one.keys.notifications, hello)
        await eventually(lambda: "a-gone-instance" in one.notifier.peers)
        one.notifier.on_join.append(joined.set)
        one.connection.subscriptions.hang_up()
        await asyncio.wait_for(joined.wait(), 20)
        await one.notifier.flush()
        assert one.notifier.may_live(unmet.notifier.instance)


async def test_a_claim_that_is_given_away_runs_at_the_other_instance(pair: Pair) -> None:
    one, other = pair
    given = await claimed(one)
    one.parts.handover.give(given, other.notifier.instance)
    taken = await other.claim()
    assert (taken.entry_id, taken.task.id, taken.contested) == (given.entry_id, given.task.id, False)
    assert (taken.checkpoint.attempts, taken.checkpoint.ambiguous_calls) == (0, 0)
    assert one.parts.dispatcher.held == {}
    assert other.connection.meter.takeovers == 0


@pytest.mark.parametrize("kind", ["handover", "yours"])
async def test_a_handover_is_received_under_the_word_of_each_version(pair: Pair, kind: str) -> None:
    one, other = pair
    given = await claimed(one)
    one.parts.dispatcher.forget(given)
    one.notifier.publish(kind, to=other.notifier.instance, ids=[given.entry_id], contested=[])
    taken = await other.claim()
    assert taken.task.id == given.task.id


async def test_the_job_of_a_claim_goes_along_and_counts_as_no_lost_call(
    pair: Pair, make_instance: MakeInstance
) -> None:
    one, other = pair
    begun = await claimed(one)
    await one.worker_queue.start(begun)
    begun.checkpoint = begun.checkpoint.with_job(JOB)
    assert await one.worker_queue.record_job(begun, begun.checkpoint)
    one.parts.handover.give(begun, other.notifier.instance)
    taken = await other.claim()
    assert (taken.checkpoint.job, taken.checkpoint.ambiguous_calls, taken.contested) == (JOB, 0, True)


async def test_a_claim_that_the_other_instance_does_not_take_comes_back(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handover, "CHECK_S", 0.05)
    one, other = pair
    given = await claimed(one)
    one.parts.handover.give(given, "gone")
    again = await one.claim()
    assert (again.entry_id, other.parts.dispatcher.held) == (given.entry_id, {})


async def test_a_draining_instance_takes_no_claim(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handover, "CHECK_S", 0.05)
    one, other = pair
    other.worker_queue.quiet()
    given = await claimed(one)
    one.parts.handover.give(given, other.notifier.instance)
    again = await one.claim()
    assert again.entry_id == given.entry_id


async def test_an_entry_that_its_giver_does_not_hold_any_more_is_not_taken(
    pair: Pair, make_instance: MakeInstance
) -> None:
    one, other = pair
    given = await claimed(one)
    third = make_instance(start=False)
    assert len(await third.parts.takeover.take_given(one.notifier.instance, [given.entry_id])) == 1
    assert await other.parts.takeover.take_given(one.notifier.instance, [given.entry_id]) == []
    assert other.parts.dispatcher.held == {}


@pytest.mark.parametrize("ids", [None, 5, ["x"], [3, None], []])
async def test_a_message_that_is_no_handover_changes_nothing(pair: Pair, ids: object) -> None:
    one, other = pair
    one.notifier.publish(handover.KIND, to=other.notifier.instance, ids=ids)
    await one.notifier.flush()
    given = await claimed(one)
    one.parts.handover.give(given, other.notifier.instance)
    assert (await other.claim()).entry_id == given.entry_id


async def test_malformed_ids_in_a_message_cost_no_command_and_no_error(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = pair
    take_given, asked = other.verbs.take_given, []

    def recorded(giver: str, taker: str, entry_ids: Sequence[str]) -> Awaitable[list[Entry]]:
        asked.append(list(entry_ids))
        return take_given(giver, taker, entry_ids)

    monkeypatch.setattr(other.verbs, "take_given", recorded)
    faults: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: faults.append(context))
    for bad in ("x", "-", "1-", "-1", "1-2-3", "\u00b2-1", f"{2**64}-0", "9" * 5_000 + "-1", "+-*"):
        one.notifier.publish(handover.KIND, to=other.notifier.instance, ids=[bad])
    await one.notifier.flush()
    given = await claimed(one)
    one.parts.handover.give(given, other.notifier.instance)
    await other.claim()
    gc.collect()
    assert faults == []
    assert asked == [[given.entry_id]]


async def test_a_claim_on_its_way_to_an_instance_that_stops_goes_back_with_its_job(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = pair
    take_given = other.verbs.take_given

    async def slow(giver: str, taker: str, entry_ids: Sequence[str]) -> list[Entry]:
        await asyncio.sleep(0.2)  # a slow Redis
        return await take_given(giver, taker, entry_ids)

    monkeypatch.setattr(other.verbs, "take_given", slow)
    begun = await claimed(one)
    await one.worker_queue.start(begun)
    begun.checkpoint = begun.checkpoint.with_job(JOB)
    assert await one.worker_queue.record_job(begun, begun.checkpoint)
    one.parts.dispatcher.forget(begun)
    message = {"from": one.notifier.instance, "to": other.notifier.instance, "ids": [begun.entry_id]}
    other.notifier.handlers[handover.KIND](message)
    await other.parts.release_all()
    await asyncio.gather(*(task for task in asyncio.all_tasks() if task.get_name() == "handover"))
    assert [consumer.name for consumer in await one.verbs.consumers() if consumer.pending] == []
    released = await one.claim()
    await one.worker_queue.read_released(released)
    assert (released.checkpoint.job, released.checkpoint.ambiguous_calls) == (JOB, 0)


async def test_a_takeover_that_a_stop_interrupts_keeps_the_record_of_the_call(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = pair
    begun = await claimed(one)
    await one.worker_queue.start(begun)
    one.parts.dispatcher.forget(begun)
    reads, is_reading = other.parts.takeover._verbs.read_checkpoints, asyncio.Event()

    async def never(_ids: object) -> list[bytes | None]:
        is_reading.set()
        await asyncio.Event().wait()
        raise AssertionError

    monkeypatch.setattr(other.parts.takeover._verbs, "read_checkpoints", never)
    taking = asyncio.create_task(other.parts.takeover.take({begun.entry_id: 1.0}, min_idle_s=0.0))
    await asyncio.wait_for(is_reading.wait(), 20)
    taking.cancel()
    await asyncio.gather(taking, return_exceptions=True)
    monkeypatch.setattr(other.parts.takeover._verbs, "read_checkpoints", reads)
    await other.parts.release_idle([])
    released = await one.claim()
    await one.worker_queue.read_released(released)
    assert released.checkpoint.ambiguous_calls == 1


async def test_an_instance_that_was_killed_is_forgotten_by_a_ping(
    make_instance: MakeInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notifier, "SILENT_S", 1.0)
    one, alive, killed = make_instance(), make_instance(), make_instance(start=False)
    killed.notifier.greeting = lambda: {"serves": "all"}
    killed.start()
    names = {alive.notifier.instance, killed.notifier.instance}
    await eventually(lambda: one.notifier.peers.keys() == names)
    assert one.notifier.greetings[killed.notifier.instance]["serves"] == "all"
    await killed.crash()

    def is_forgotten() -> bool:
        one.notifier.ping_peers()  # once more after the end of the last one: a late message may have been on its way
        return one.notifier.peers.keys() == {alive.notifier.instance}

    await eventually(is_forgotten, 20)
    assert killed.notifier.instance not in one.notifier.greetings
