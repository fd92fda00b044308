"""Budgets of a day, reserved by submits and settled by the end of a task, on a real Redis."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from msgspec.structs import replace

from imagegen.errors import BudgetExceeded, PriceUnknown, QueueUnavailable
from imagegen.queue.claim import Claim, StartResult
from imagegen.queue.client_queue import CacheResult
from imagegen.queue.verbs.budget_counters import BudgetLimits, Limits
from imagegen.queue.verbs.finish import finish_item
from imagegen.queue.verbs.restore_results import RestoredResult
from imagegen.redis_client.multiplexer import Arg, Script
from imagegen.tasks import transitions
from imagegen.tasks.cost import Cost, day_of
from imagegen.tasks.family import RequestFamily, ReusedImages
from imagegen.tasks.image import StoredImage
from imagegen.tasks.submission import Submission
from imagegen.tasks.task import State, Task, TaskError
from tests.conftest import Instance, MakeInstance
from tests.queue_budgets import KEY, PRICE, TOTAL, cost_of, limited, priced, put, refusals, started, used
from tests.support import eventually, family_submission, submission

IMAGE = StoredImage(0, "image/png", 10, 8, 8, "a" * 64)
LIMITS: Limits = ((TOTAL, 3 * PRICE),)
FAULT = TaskError("upstream_error", "no", retryable=True)


@pytest.fixture
async def one(make_instance: MakeInstance) -> Instance:
    """Return an instance without background loops, with room for three tasks in its total budget."""
    instance = limited(make_instance(start=False), (TOTAL, 3 * PRICE))
    await instance.verbs.create_group()
    return instance


async def end(instance: Instance, claim: Claim, cost: Cost, state: State = State.COMPLETED) -> Task:
    claim.checkpoint = replace(claim.checkpoint, cost=cost)
    task, now = replace(claim.task, cost=cost.ended()), time.time()
    if state is State.COMPLETED:
        return await instance.worker_queue.finish(claim, transitions.completed(task, [IMAGE], [], now=now, ttl_s=60))
    return await instance.worker_queue.finish(claim, transitions.failed(task, FAULT, now=now, ttl_s=60))


async def test_a_batch_is_accepted_up_to_the_limit_and_not_a_micro_dollar_more(one: Instance) -> None:
    refused = [refusal for refusal in await refusals(one, *"abcdef") if refusal]
    assert len(refused) == 3
    assert refused[0].status == 402
    assert refused[0].values["resets_at"] == time.strftime("%Y-%m-%dT00:00:00.000Z", time.gmtime(time.time() + 86_400))
    assert await used(one) == 3 * PRICE
    limited(one, (TOTAL, 4 * PRICE - 1))
    assert all(await refusals(one, "g"))
    limited(one, (TOTAL, 4 * PRICE))
    assert cost_of((await put(one, "g"))[0]).reserved == PRICE


async def test_each_of_two_budgets_must_have_room(one: Instance) -> None:
    limited(one, (TOTAL, 3 * PRICE), (KEY, 2 * PRICE))
    assert [bool(refusal) for refusal in await refusals(one, *"abc")] == [False, False, True]
    assert (await used(one), await used(one, KEY)) == (2 * PRICE, 2 * PRICE)
    limited(one, (TOTAL, 3 * PRICE), (KEY + 1, 9 * PRICE))
    assert [bool(refusal) for refusal in await refusals(one, *"de")] == [False, True]
    assert (await used(one), await used(one, KEY), await used(one, KEY + 1)) == (3 * PRICE, 2 * PRICE, PRICE)


async def test_a_repeat_of_a_batch_with_a_lost_reply_reserves_nothing_more(one: Instance) -> None:
    limits: Limits = ((TOTAL, PRICE),)
    (task,) = await put(limited(one, *limits), "a")
    reply = await one.verbs.submit(task, limits=limits)
    assert (reply.kind, reply.entry_id) == ("new", "")
    assert await used(one) == PRICE


async def test_a_join_and_a_hit_are_free_even_if_nothing_is_left(one: Instance) -> None:
    (claim,) = await started(limited(one, (TOTAL, PRICE)), "a")
    one.task_cache.forget(claim.task.id)
    del one.parts.dispatcher.claimed[claim.task.id]
    assert (await one.client_queue.submit(priced("a"))).cached is CacheResult.COALESCED
    await end(one, claim, claim.cost.paid(PRICE))
    one.task_cache.forget(claim.task.id)
    assert (await one.client_queue.submit(priced("a"))).cached is CacheResult.HIT
    assert await used(one) == PRICE


async def test_a_joined_task_takes_no_room_from_the_next_of_its_batch(one: Instance) -> None:
    (task,) = await put(limited(one, (TOTAL, 2 * PRICE)), "a")
    joining, fresh, limits = replace(task, epoch=task.epoch + 1), replace(task, id="0" * 32), ((TOTAL, 2 * PRICE),)
    replies = await asyncio.gather(*(one.verbs.submit(each, limits=limits) for each in (joining, fresh)))
    assert [reply.kind for reply in replies] == ["known", "new"]
    assert await used(one) == 2 * PRICE


async def test_a_refused_task_is_not_stored(one: Instance) -> None:
    assert all(await refusals(limited(one, (TOTAL, 0)), "a"))
    assert await one.client_queue.get(submission("a").task_id) is None
    assert await one.connection.commands.xlen(one.keys.stream) == 0


async def test_the_end_gives_back_what_was_not_charged_and_adds_what_cost_more(one: Instance) -> None:
    first, second, third = await started(one, *"abc")
    await end(one, first, first.cost.paid(PRICE - 200))
    assert await used(one) == 3 * PRICE - 200
    await end(one, second, second.cost.paid(PRICE + 50))
    assert await used(one) == 3 * PRICE - 150
    final = await end(one, third, third.cost.unpaid(), State.FAILED)
    assert (cost_of(final).charged, cost_of(final).reserved) == (0, 0)
    assert await used(one) == 2 * PRICE - 150


async def test_a_late_finish_changes_no_budget(one: Instance) -> None:
    (claim,) = await started(one, "a")
    await end(one, claim, claim.cost.paid(PRICE))
    await one.verbs.finish(finish_item(claim.entry_id, claim.task, claim.cost.unpaid()))
    assert await used(one) == PRICE


async def test_a_failed_task_that_is_queued_again_reserves_again(one: Instance) -> None:
    (claim,) = await started(one, "a")
    await end(one, claim, claim.cost.lost("upstream_timeout"), State.FAILED)
    (task,) = await put(one, "a")
    assert (cost_of(task).reserved, cost_of(task).charged) == (PRICE, 0)
    assert await used(one) == 2 * PRICE


async def test_a_cancel_gives_back_what_was_not_sent(make_instance: MakeInstance, one: Instance) -> None:
    two = limited(make_instance(start=False), (TOTAL, 3 * PRICE))
    (claim,) = await started(one, "a")
    (waiting,) = await put(one, "b")
    cancelled = await one.cancel(waiting.id)
    assert (cost_of(cancelled).charged, await used(one)) == (0, PRICE)
    elsewhere = await two.cancel(claim.task.id)
    assert (cost_of(elsewhere).charged, cost_of(elsewhere).unsure) == (PRICE, PRICE)
    assert await used(one) == PRICE
    await end(one, claim, claim.cost.unpaid(), State.FAILED)
    assert await used(one) == PRICE


async def test_a_cancel_counts_the_call_that_began_while_it_was_on_its_way(one: Instance) -> None:
    await put(one, "a")
    (claim,) = await one.parts.leases.hold(await one.verbs.read_entries("i", 10, 0.01))
    known = one.client_queue.canceller.known_progress(claim.task)
    claim.checkpoint = replace(claim.checkpoint, cost=claim.cost.before_call(PRICE))
    await one.worker_queue.start(claim)
    final = transitions.cancelled(claim.task, now=time.time(), ttl_s=60)
    cancelled = await one.verbs.cancel(final, claim.entry_id, known)
    assert cancelled is not None
    assert (cost_of(cancelled.task).charged, cost_of(cancelled.task).unsure) == (PRICE, PRICE)
    assert await used(one) == PRICE


async def test_a_call_beyond_the_planned_ones_is_reserved_once_or_refused(one: Instance) -> None:
    (claim,) = await started(one, "a")
    claim.checkpoint = replace(claim.checkpoint, cost=claim.cost.lost("upstream_timeout"))
    limits: Limits = ((TOTAL, 2 * PRICE),)
    assert await one.worker_queue.reserve_more(claim, PRICE, limits) is True
    assert (await used(one), claim.cost.reserved) == (2 * PRICE, 2 * PRICE)
    assert await one.worker_queue.reserve_more(claim, 1, limits) is False
    assert await used(one) == 2 * PRICE
    await end(one, claim, claim.cost.before_call(PRICE).paid(PRICE))
    assert await used(one) == 2 * PRICE


async def test_a_repeated_reservation_for_a_call_counts_once(one: Instance) -> None:
    (claim,) = await started(one, "a")
    stored = claim.stored_checkpoint, claim.stored_bytes, claim.checkpoint
    limits: Limits = ((TOTAL, 9 * PRICE),)
    assert await one.worker_queue.reserve_more(claim, PRICE, limits) is True
    claim.stored_checkpoint, claim.stored_bytes, claim.checkpoint = stored
    assert await one.worker_queue.reserve_more(claim, PRICE, limits) is True
    assert await used(one) == 2 * PRICE


async def test_no_call_is_reserved_for_a_task_that_was_cancelled(one: Instance) -> None:
    (claim,) = await started(one, "a")
    await one.client_queue.cancel(claim.task.id)
    assert await one.worker_queue.reserve_more(claim, PRICE, ((TOTAL, 9 * PRICE),)) is None
    assert claim.lost
    assert await used(one) == PRICE


async def test_a_call_that_a_dead_instance_made_is_charged_as_unsure(make_instance: MakeInstance) -> None:
    one = limited(make_instance(lease_s=0.3), (TOTAL, 3 * PRICE))
    await one.client_queue.submit(priced("a"))
    claim = await one.claim()
    claim.checkpoint = replace(claim.checkpoint, cost=claim.cost.before_call(PRICE))
    assert await one.worker_queue.start(claim) is StartResult.STARTED
    await one.crash()
    two = make_instance(lease_s=0.3)
    taken = await two.claim()
    assert (taken.cost.charged, taken.cost.unsure, taken.cost.reserved) == (PRICE, PRICE, PRICE)
    assert taken.cost.rest_for(PRICE) == PRICE
    await end(two, taken, taken.cost, State.FAILED)
    assert await used(two) == PRICE


async def test_a_stopped_owner_that_finishes_first_is_charged_for_both_calls(make_instance: MakeInstance) -> None:
    one = limited(make_instance(start=False), (TOTAL, 3 * PRICE))
    await one.verbs.create_group()
    (claim,) = await started(one, "a")
    two = make_instance(start=False)
    (taken,) = await two.parts.takeover.take({claim.entry_id: 60.0}, min_idle_s=0.0)
    assert await two.worker_queue.reserve_more(taken, PRICE, ((TOTAL, 3 * PRICE),)) is True
    taken.checkpoint = replace(taken.checkpoint, cost=taken.cost.before_call(PRICE))
    assert await two.worker_queue.start(taken) is StartResult.STARTED
    final = await end(one, claim, claim.cost.paid(PRICE))
    assert (cost_of(final).charged, cost_of(final).unsure, final.possibly_billed_twice) == (2 * PRICE, 2 * PRICE, 1)
    assert await used(one) == 2 * PRICE
    again = await end(two, taken, taken.cost.unpaid())
    assert again.cost == final.cost
    assert await used(one) == 2 * PRICE


async def test_a_task_without_its_entry_passes_on_what_it_has_cost(one: Instance) -> None:
    (claim,) = await started(one, "a")
    await one.connection.commands.xdel(one.keys.stream, claim.entry_id)
    one.task_cache.forget(claim.task.id)
    del one.parts.dispatcher.claimed[claim.task.id]
    (task,) = await put(one, "a")
    assert (cost_of(task).charged, cost_of(task).unsure, cost_of(task).reserved) == (PRICE, PRICE, 2 * PRICE)
    assert await used(one) == 2 * PRICE


async def test_reused_images_are_not_priced_but_saved(one: Instance) -> None:
    async def reuse(_task_id: str, family: RequestFamily, finished: Sequence[Task]) -> ReusedImages:
        images = max((task.images for task in finished), key=len)[: family.request.n]
        return ReusedImages(tuple(replace(image, reused=True) for image in images))

    def priced_images(n: int) -> Submission:
        return replace(family_submission("a", n), cost=Cost(n * 100))

    await one.client_queue.submit(priced_images(2), reuse)
    (claim,) = await one.parts.leases.hold(await one.verbs.read_entries("i", 10, 0.01))
    await one.worker_queue.start(claim)
    images = [IMAGE, replace(IMAGE, index=1)]
    claim.checkpoint = replace(claim.checkpoint, cost=claim.cost.before_call(200).paid(200))
    task = replace(claim.task, cost=claim.cost.ended())
    await one.worker_queue.finish(claim, transitions.completed(task, images, [], now=time.time(), ttl_s=60))
    whole = (await one.client_queue.submit(priced_images(1), reuse)).task
    assert (cost_of(whole).estimated, cost_of(whole).saved, cost_of(whole).charged) == (0, 100, 0)
    part = (await one.client_queue.submit(priced_images(5), reuse)).task
    assert (cost_of(part).estimated, cost_of(part).saved, cost_of(part).reserved) == (300, 200, 300)
    assert await used(one) == 500


async def test_a_task_with_an_unknown_price_is_refused_under_a_budget_only(one: Instance) -> None:
    with pytest.raises(PriceUnknown):
        await one.client_queue.submit(priced("a", price=None))
    assert await used(one) == 0
    limited(one)
    assert (await one.client_queue.submit(priced("a", price=None))).cached is CacheResult.MISS
    one.task_cache.forget(submission("a").task_id)
    limited(one, (TOTAL, 10**9))
    assert (await one.client_queue.submit(priced("a", price=None))).cached is CacheResult.COALESCED


async def test_two_instances_with_twenty_submits_at_once_accept_exactly_the_budget(make_instance: MakeInstance) -> None:
    instances = [limited(make_instance(start=False), (TOTAL, 100 * PRICE), (KEY, 90 * PRICE)) for _ in range(2)]
    kinds: Counter[str] = Counter()

    async def submit_some(number: int) -> None:
        for index in range(10):
            try:
                await instances[number % 2].client_queue.submit(priced(f"{number} {index}"))
            except BudgetExceeded:
                kinds["refused"] += 1
            else:
                kinds["accepted"] += 1

    await asyncio.gather(*map(submit_some, range(20)))
    assert kinds == {"accepted": 90, "refused": 110}
    assert (await used(instances[0]), await used(instances[0], KEY)) == (90 * PRICE, 90 * PRICE)


async def test_budgets_expire_some_days_later(one: Instance) -> None:
    await put(one, "a")
    key = one.keys.budgets(day_of(one.client_queue.clock()))
    assert 7 * 86_400 < await one.connection.commands.ttl(key) <= 8 * 86_400
    await eventually(lambda: one.verbs.budgets.used(day_of(one.client_queue.clock()), TOTAL) == PRICE)


async def test_budgets_that_redis_has_lost_are_written_back(one: Instance) -> None:
    limited(one, (TOTAL, 3 * PRICE), (KEY, 9 * PRICE))
    (claim, _) = await started(one, "a", "b")
    await one.verbs.restore_budgets()
    assert await used(one) == 2 * PRICE
    key = one.keys.budgets(day_of(one.client_queue.clock()))
    await one.connection.commands.delete(key)
    assert await one.verbs.restore_budgets() == 1
    assert (await used(one), await used(one, KEY)) == (2 * PRICE, 2 * PRICE)
    assert await one.connection.commands.ttl(key) > 0
    await end(one, claim, claim.cost.unpaid(), State.FAILED)
    assert await one.verbs.restore_budgets() == 0
    assert (await used(one), await used(one, KEY)) == (PRICE, PRICE)


async def test_a_call_of_a_lost_claim_is_charged_and_so_is_that_of_its_new_owner(make_instance: MakeInstance) -> None:
    one = limited(make_instance(), (TOTAL, 9 * PRICE), (KEY, 9 * PRICE))
    charged: list[int] = []
    one.parts.leases.lost_claims.on_charged = lambda _task, amount: charged.append(amount)
    (claim,) = await started(one, "a")
    theirs = replace(claim.checkpoint, owner="them", cost=None)
    await one.connection.commands.set(one.keys.checkpoint(claim.task.id), theirs.encode(claim.entry_id))
    assert await one.parts.leases.lost_claims.record(claim) == 1
    assert (await used(one), await used(one, KEY), charged) == (2 * PRICE, 2 * PRICE, [PRICE])
    final = await end(one, claim, claim.cost.paid(PRICE))
    assert (cost_of(final).charged, final.possibly_billed_twice) == (PRICE, 1)
    assert (await used(one), await used(one, KEY)) == (2 * PRICE, 2 * PRICE)


async def test_a_paid_call_of_a_task_that_failed_here_and_ended_elsewhere_is_recorded(one: Instance) -> None:
    (claim,) = await started(limited(one, (TOTAL, 9 * PRICE)), "a")
    other = Claim(claim.entry_id, claim.task, claim.checkpoint)
    await end(one, other, claim.cost.paid(PRICE))
    final = await end(one, claim, claim.cost.paid(PRICE, "upstream_bad_response"), State.FAILED)
    assert (final.state, await used(one)) == (State.COMPLETED, 2 * PRICE)
    assert (await one.read(final.id)).possibly_billed_twice == 1


@pytest.mark.parametrize("after", ["", "cancelled", "continued"])
async def test_a_call_of_a_lost_claim_is_charged_once_everywhere_if_the_reply_about_it_is_lost(
    make_instance: MakeInstance, monkeypatch: pytest.MonkeyPatch, after: str
) -> None:
    one = limited(make_instance(), (TOTAL, 9 * PRICE))
    charged: list[int] = []
    lost_claims, redis = one.parts.leases.lost_claims, one.connection.commands
    lost_claims.on_charged = lambda _task, amount: charged.append(amount)
    (claim,) = await started(one, "a")
    task_id, theirs = claim.task.id, replace(claim.checkpoint, owner="them", cost=None)
    await redis.set(one.keys.checkpoint(task_id), theirs.encode(claim.entry_id))
    evalsha, lost = one.connection.multiplexer.evalsha, [QueueUnavailable()]

    async def lose_reply(script: Script, keys: Sequence[str], args: Sequence[Arg]) -> Any:
        reply = await evalsha(script, keys, args)
        if "Raises the count" in script.text and lost:
            raise lost.pop()
        return reply

    monkeypatch.setattr(one.connection.multiplexer, "evalsha", lose_reply)
    with pytest.raises(QueueUnavailable):
        await lost_claims.abandon([claim])
    if after == "cancelled":
        record = await one.stored(one.keys.record(task_id))
        await redis.set(one.keys.record(task_id), record.replace(b"pending", b"cancelled", 1), keepttl=True)
    elif after == "continued":
        further = replace(theirs, starts=theirs.starts + 1)
        await redis.set(one.keys.checkpoint(task_id), further.encode(claim.entry_id))
    for _ in range(2):
        await lost_claims.abandon([])
    assert (await used(one), charged, one.connection.meter.ambiguous) == (2 * PRICE, [PRICE], 1)
    await lost_claims.abandon([claim])
    assert (await used(one), charged, one.connection.meter.ambiguous) == (2 * PRICE, [PRICE], 1)


async def test_both_results_of_a_task_that_two_servers_completed_are_charged_once_each(one: Instance) -> None:
    (claim,) = await started(one, "a")
    final = await end(one, claim, claim.cost.paid(PRICE))
    key, now = one.keys.record(final.id), time.time()
    theirs = (await one.stored(key)).replace(final.counted_in.encode(), b"other-1-1")
    await one.connection.commands.set(key, theirs, keepttl=True)
    for _ in range(2):
        assert await one.verbs.restore_results([final], now) == [RestoredResult.OTHER]
        assert await used(one) == 2 * PRICE
    assert (await one.read(final.id)).possibly_billed_twice == 1


async def test_a_call_before_the_start_of_two_owners_is_charged_once(one: Instance) -> None:
    (claim,) = await started(limited(one, (TOTAL, 9 * PRICE)), "a")
    lost = claim.cost.lost("upstream_timeout")
    claim.checkpoint = replace(claim.checkpoint, ambiguous_calls=1, cost=lost.before_call(PRICE))
    assert await one.worker_queue.start(claim) is StartResult.STARTED
    theirs = replace(claim.checkpoint, owner="them")
    await one.connection.commands.set(one.keys.checkpoint(claim.task.id), theirs.encode(claim.entry_id))
    assert await one.parts.leases.lost_claims.record(claim) == 2
    assert await used(one) == 2 * PRICE  # what the task has reserved, and the call here


async def test_a_read_of_budgets_beside_a_submit_counts_nothing_twice(make_instance: MakeInstance) -> None:
    one = limited(make_instance(), (TOTAL, 1_000 * PRICE))
    day = day_of(one.client_queue.clock())

    async def read_after(turns: int) -> None:
        for _ in range(turns):
            await asyncio.sleep(0)
        await one.verbs.read_budgets(day)

    for number in range(1, 401):
        await asyncio.gather(put(one, number), *map(read_after, range(6)))
        assert one.verbs.budgets.used(day, TOTAL) == number * PRICE
    assert await used(one) == 400 * PRICE


async def test_a_finish_after_a_total_loss_takes_nothing_back(one: Instance) -> None:
    (claim,) = await started(one, "a")
    await one.connection.commands.delete(one.keys.record(claim.task.id), one.keys.stream)
    await one.verbs.create_group()
    await end(one, claim, claim.cost.unpaid(), State.FAILED)
    assert await used(one) == PRICE


async def test_budgets_of_another_type_are_moved_aside(one: Instance) -> None:
    key = one.keys.budgets(day_of(one.client_queue.clock()))
    await one.connection.commands.lpush(key, "foreign")
    (task,) = await put(one, "a")
    assert cost_of(task).reserved == PRICE
    assert await used(one) == PRICE
    assert await one.connection.commands.exists(f"{key}:aside")


async def test_a_submit_that_fails_half_way_reserves_nothing(one: Instance) -> None:
    await one.connection.commands.delete(one.keys.stream)
    await one.connection.commands.set(one.keys.stream, "foreign")
    (task,) = await put(one, "a")
    assert (cost_of(task).reserved, await used(one)) == (PRICE, PRICE)


async def test_tasks_in_the_line_of_a_client_are_held_and_settled_as_others(make_instance: MakeInstance) -> None:
    one = limited(make_instance(start=False, window=1), (TOTAL, 3 * PRICE))
    await one.verbs.create_group()
    tasks = [(await one.client_queue.submit(priced(name, "client"))).task for name in "abc"]
    with pytest.raises(BudgetExceeded):
        await one.client_queue.submit(priced("d", "client"))
    cancelled = await one.cancel(tasks[1].id)
    assert (cost_of(cancelled).charged, await used(one)) == (0, 2 * PRICE)
    for charged in (PRICE - 1, PRICE):
        (claim,) = await one.parts.leases.hold(await one.verbs.read_entries("i", 10, 0.01))
        assert await one.worker_queue.start(claim) is StartResult.STARTED
        await end(one, claim, claim.cost.paid(charged))
    assert await used(one) == 2 * PRICE - 1


async def test_another_clients_equal_submit_does_not_refuse_this_one(one: Instance) -> None:
    one.client_queue.limits = BudgetLimits(((KEY + 1, PRICE),), {"poor": ((KEY, 0),)})
    clients = ("poor", "rich", "poor")
    poor, *others = await asyncio.gather(
        *(one.client_queue.submit(priced("a", client)) for client in clients), return_exceptions=True
    )
    assert isinstance(poor, BudgetExceeded)
    assert [not isinstance(each, BaseException) and each.cached for each in others] == [
        CacheResult.MISS,
        CacheResult.COALESCED,
    ]
    assert (await used(one, KEY), await used(one, KEY + 1)) == (0, PRICE)
