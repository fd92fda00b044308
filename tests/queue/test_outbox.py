"""Webhooks in Redis: in the task record, the outbox and the delivery log, and their owning instance."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from msgspec.structs import replace as changed

from imagegen.errors import InvalidRequest
from imagegen.queue import delivery_lines as lines_module
from imagegen.queue import outbox as outbox_module
from imagegen.queue.claim import Claim, StartResult
from imagegen.queue.client_queue import CacheResult
from imagegen.queue.codec import (
    UnreadableRecord,
    decode_delivery_log,
    decode_record,
    encode_delivery_log,
    final_record,
    with_delivery_log,
)
from imagegen.queue.verbs.read import TaskRows
from imagegen.tasks import transitions
from imagegen.tasks.image import StoredImage
from imagegen.tasks.submission import Submission
from imagegen.tasks.task import State, Task, TaskError
from imagegen.tasks.webhook import MAX_WEBHOOKS, Delivery, DeliveryStatus, Webhook
from tests.conftest import Instance, MakeInstance
from tests.support import eventually, submission

IMAGE = StoredImage(0, "image/png", 10, 8, 8, "a" * 64)
UNCOUNTED = {"info", "ping", "hello", "client", "client|setinfo", "script", "script|load", "monitor"}


@pytest.fixture(autouse=True)
def prompt_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox_module, "PEER_REPLY_S", 0.3)


def hook(path: str = "a", **changes: Any) -> Webhook:
    return replace(Webhook(f"https://hooks.example.com/{path}", "http://here"), **changes)


def with_webhooks(name: object, *webhooks: Webhook) -> Submission:
    return changed(submission(name), webhooks=webhooks)


async def submit_hooks(instance: Instance, name: object, *webhooks: Webhook) -> Task:
    """Submit a task as a client does; join a running one."""
    submitted = with_webhooks(name, *webhooks)
    return (await instance.client_queue.add_webhooks(submitted, await instance.client_queue.submit(submitted))).task


async def finish(instance: Instance, outcome: str = "completed") -> Task:
    claim = await instance.claim()
    while await instance.worker_queue.start(claim) is StartResult.INHERITED:
        pass
    return await end(instance, claim, outcome)


async def end(instance: Instance, claim: Claim, outcome: str = "completed") -> Task:
    now = time.time()
    if outcome == "completed":
        return await instance.worker_queue.finish(
            claim, transitions.completed(claim.task, [IMAGE], [], now=now, ttl_s=60)
        )
    error = TaskError("upstream_error", "no", retryable=True)
    return await instance.worker_queue.finish(claim, transitions.failed(claim.task, error, now=now, ttl_s=60))


async def deliver(instance: Instance, status: DeliveryStatus = DeliveryStatus.DELIVERED) -> tuple[Task, Delivery]:
    task, delivery = await asyncio.wait_for(instance.parts.outbox.next(), 20)
    done = replace(delivery, status=status, attempts=delivery.attempts + 1, last_status=200)
    await instance.parts.outbox.record_attempt(task, done)
    return task, done


async def fail_once(instance: Instance, due_in_s: float) -> Delivery:
    task, delivery = await asyncio.wait_for(instance.parts.outbox.next(), 20)
    failed = replace(delivery, attempts=1, last_status=500, due_at=time.time() + due_in_s)
    await instance.parts.outbox.record_attempt(task, failed)
    return failed


async def waiting(instance: Instance) -> dict[bytes, float]:
    rows: Any = await instance.connection.commands.zrange(instance.keys.outbox, 0, -1, withscores=True)
    return dict(rows)


async def nothing_comes(instance: Instance, within_s: float = 0.3) -> bool:
    done, _ = await asyncio.wait([asyncio.create_task(instance.parts.outbox.next())], timeout=within_s)
    return not done


async def check_outbox(instance: Instance) -> None:
    """Wait until the instance has checked the outbox, after the check that may be under way."""
    enough = instance.connection.meter.commands["hooks"] + 5  # a check that takes names over counts 4

    def is_checked() -> bool:
        instance.parts.outbox.check_now()
        return instance.connection.meter.commands["hooks"] >= enough

    await eventually(is_checked)


async def commands(instance: Instance) -> Counter[str]:
    stats = await instance.connection.commands.info("commandstats")
    counts = Counter({name.removeprefix("cmdstat_"): stat["calls"] for name, stat in stats.items()})
    return Counter({name: count for name, count in counts.items() if name not in UNCOUNTED})


async def test_a_task_stays_in_the_outbox_until_its_webhook_is_delivered(make_instance: MakeInstance) -> None:
    instance = make_instance()
    await submit_hooks(instance, "a", hook())
    assert await waiting(instance) == {}
    final = await finish(instance)
    assert list(await waiting(instance)) == [f"{final.id}:{final.epoch}".encode()]
    task, delivery = await deliver(instance)
    assert (task.id, task.state, delivery.webhook) == (final.id, State.COMPLETED, hook())
    assert await waiting(instance) == {}
    seen = (await instance.task(final.id)).deliveries
    assert [(delivery.status, delivery.attempts) for delivery in seen] == [(DeliveryStatus.DELIVERED, 1)]


async def test_a_webhook_costs_at_most_three_commands(make_instance: MakeInstance) -> None:
    instance = make_instance()
    await finish_and_settle(instance, "warm", hook())
    plain = await least(instance, "plain")
    delivered = await least(instance, "delivered", hook())
    more = delivered - plain
    assert more == Counter(zadd=1, set=1, zrem=1)
    assert not plain - delivered


async def least(instance: Instance, name: str, *webhooks: Webhook) -> Counter[str]:
    """Return the least of each command over three tasks, since an interval of a background loop may end in one."""
    first, *others = [await counted(instance, f"{name} {number}", *webhooks) for number in range(3)]
    for other in others:
        first &= other
    return first


async def counted(instance: Instance, name: str, *webhooks: Webhook) -> Counter[str]:
    before = await commands(instance)
    await finish_and_settle(instance, name, *webhooks)
    return await commands(instance) - before


async def finish_and_settle(instance: Instance, name: str, *webhooks: Webhook) -> None:
    claiming = asyncio.create_task(instance.claim())
    await eventually(lambda: instance.connection.subscriptions.active)
    await submit_hooks(instance, name, *webhooks)
    claim = await asyncio.wait_for(claiming, 20)
    await instance.worker_queue.start(claim)
    await end(instance, claim)
    for _ in webhooks:
        await deliver(instance)


async def test_an_idle_outbox_costs_one_command_in_ten_minutes(make_instance: MakeInstance) -> None:
    instance = make_instance()
    before = instance.connection.meter.commands["hooks"]
    await eventually(lambda: instance.connection.meter.commands["hooks"] == before + 1)
    assert await nothing_comes(instance)
    assert instance.connection.meter.commands["hooks"] == before + 1
    assert outbox_module.CHECK_INTERVAL_S >= 600


async def test_an_unsubscribed_event_is_not_delivered(make_instance: MakeInstance) -> None:
    instance = make_instance()
    await submit_hooks(instance, "a", hook(events=("image.failed",)))
    await finish(instance)
    assert await waiting(instance) == {}
    assert await nothing_comes(instance, 0.05)


async def test_the_cancelling_instance_delivers_the_webhook(make_instance: MakeInstance) -> None:
    one, two = make_instance(), make_instance()
    task = await submit_hooks(one, "a", hook())
    assert (await two.cancel(task.id)).state is State.CANCELLED
    delivered, _ = await deliver(two)
    assert delivered.state is State.CANCELLED
    assert await waiting(one) == {}
    assert await nothing_comes(one, 0.05)


@pytest.mark.parametrize("running", [True, False])
async def test_the_finishing_instance_delivers_all_joined_webhooks(make_instance: MakeInstance, running: bool) -> None:
    one, two = make_instance(), make_instance()
    await submit_hooks(one, "a", hook("first"))
    claim = await one.claim()
    if running:
        await one.worker_queue.start(claim)
    joins = [submit_hooks(i, "a", hook(f"{n}")) for n, i in enumerate([one, two] * 3)]
    await asyncio.gather(*joins)
    if not running:
        await one.worker_queue.start(claim)
    final = await end(one, claim)
    paths = {(await deliver(one))[1].webhook.url.rpartition("/")[2] for _ in range(7)}
    assert paths == {"first", *map(str, range(6))}
    assert sorted(delivery.number for delivery in final.deliveries) == list(range(7))
    assert await waiting(one) == {}
    two.task_cache.forget(final.id)
    assert all(delivery.status is DeliveryStatus.DELIVERED for delivery in (await two.task(final.id)).deliveries)


async def test_a_webhook_may_join_a_task_without_webhooks(make_instance: MakeInstance) -> None:
    one, two = make_instance(), make_instance()
    task = await submit_hooks(one, "a")
    await submit_hooks(two, "a", hook())
    seen = await two.task(task.id)
    assert [delivery.webhook for delivery in seen.deliveries] == [hook()]
    claim = await one.claim()
    await one.worker_queue.start(claim)
    await end(one, claim)
    assert (await deliver(one))[1].webhook == hook()


async def test_a_cancel_notifies_webhooks_that_joined_elsewhere(make_instance: MakeInstance) -> None:
    one, two = make_instance(), make_instance()
    task = await submit_hooks(one, "a")
    await submit_hooks(two, "a", hook())
    await one.client_queue.cancel(task.id)
    assert (await deliver(one))[1].webhook == hook()


async def test_joined_webhooks_survive_a_takeover(make_instance: MakeInstance) -> None:
    one = make_instance()
    await submit_hooks(one, "a", hook("first"))
    claim = await one.claim()
    await one.worker_queue.start(claim)
    await submit_hooks(one, "a", hook("second"))
    one.worker_queue.quiet()
    await one.crash()
    await one.parts.release_all()
    two = make_instance()
    final = await finish(two)
    assert [delivery.webhook for delivery in final.deliveries] == [hook("first"), hook("second")]
    assert {(await deliver(two))[1].number for _ in range(2)} == {0, 1}


async def test_a_joined_webhook_is_shown_while_the_task_runs(make_instance: MakeInstance) -> None:
    instance = make_instance()
    task = await submit_hooks(instance, "a", hook("first"))
    await submit_hooks(instance, "a", hook("waits"))
    claim = await instance.claim()
    await instance.worker_queue.start(claim)
    await submit_hooks(instance, "a", hook("runs"))
    instance.worker_queue.progress(claim, 20)
    seen = await instance.task(task.id)
    assert [delivery.webhook.url[-5:] for delivery in seen.deliveries] == ["first", "waits", "/runs"]


async def test_a_webhook_on_a_cache_hit_is_delivered_at_once(make_instance: MakeInstance) -> None:
    one, two = make_instance(), make_instance()
    await submit_hooks(one, "a", hook("first"))
    final = await finish(one)
    await deliver(one)
    assert (await two.client_queue.submit(submission("a"))).cached is CacheResult.HIT
    await submit_hooks(two, "a", hook("late"))
    assert list(await waiting(two)) == [f"{final.id}:{final.epoch}:1".encode()]
    task, delivery = await deliver(two)
    assert (task.state, delivery.webhook, delivery.number) == (State.COMPLETED, hook("late"), 1)
    assert await waiting(two) == {}
    await eventually(lambda: len_of(one, final.id, 2))


async def len_of(instance: Instance, task_id: str, count: int) -> bool:
    return len((await instance.task(task_id)).deliveries) == count


async def test_a_log_includes_webhooks_that_joined_during_its_write(make_instance: MakeInstance) -> None:
    one, two = make_instance(), make_instance()
    await submit_hooks(one, "a", hook("first"))
    final = await finish(one)
    await submit_hooks(two, "a", hook("late"))
    await deliver(one)
    await deliver(two)
    for instance in (one, two):
        instance.task_cache.forget(final.id)
        assert [d.status for d in (await instance.task(final.id)).deliveries] == ["delivered", "delivered"]


async def test_the_twenty_first_webhook_is_refused_by_name(make_instance: MakeInstance) -> None:
    instance = make_instance()
    await submit_hooks(instance, "a", hook())
    results = await asyncio.gather(
        *(submit_hooks(instance, "a", hook(str(n))) for n in range(25)), return_exceptions=True
    )
    refused = [result for result in results if isinstance(result, InvalidRequest)]
    assert len(refused) == 26 - MAX_WEBHOOKS
    assert refused[0].details[0].field == "webhook"
    final = await finish(instance)
    assert len(final.deliveries) == MAX_WEBHOOKS


async def test_another_instance_reads_the_delivery_status(make_instance: MakeInstance) -> None:
    one, two = make_instance(), make_instance()
    await submit_hooks(one, "a", hook())
    final = await finish(one)
    assert (await two.task(final.id)).deliveries[0].pending
    await deliver(one)
    await eventually(lambda: is_delivered(two, final.id))


async def is_delivered(instance: Instance, task_id: str) -> bool:
    return (await instance.task(task_id)).deliveries[0].status is DeliveryStatus.DELIVERED


async def test_a_restart_resumes_remaining_deliveries_at_once(make_instance: MakeInstance) -> None:
    one = make_instance()
    await submit_hooks(one, "a", hook())
    final = await finish(one)
    failed = await fail_once(one, due_in_s=3_600)
    await one.crash()
    two = make_instance()
    task, delivery = await asyncio.wait_for(two.parts.outbox.next(), 20)
    assert (task.id, task.epoch, delivery) == (final.id, final.epoch, failed)
    assert task.images == final.images


async def test_deliveries_of_another_instance_are_left_alone(
    make_instance: MakeInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox_module, "PEER_REPLY_S", 1.0)
    one = make_instance()
    await eventually(lambda: one.notifier.on_join)
    await submit_hooks(one, "a", hook())
    await finish(one)
    two = make_instance()
    await eventually(lambda: not two.notifier.alone)
    await check_outbox(two)
    assert await nothing_comes(two, 0.01)
    assert len(await waiting(two)) == 1


async def test_a_due_delivery_is_taken_by_one_other_instance(
    make_instance: MakeInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = make_instance()
    await submit_hooks(one, "a", hook())
    await finish(one)
    others = [make_instance(), make_instance()]
    await eventually(lambda: not any(other.notifier.alone for other in others))
    await one.crash()
    redis = one.connection.commands
    await redis.zadd(one.keys.outbox, dict.fromkeys(await waiting(one), (time.time() + 0.2) * 1000), xx=True)
    for other in others:
        other.parts.outbox.check_now()
    takers = [asyncio.create_task(other.parts.outbox.next()) for other in others]
    done, _ = await asyncio.wait(takers, timeout=5, return_when=asyncio.FIRST_COMPLETED)
    assert len(done) == 1
    for other in others:
        await check_outbox(other)
    assert sum(taker.done() for taker in takers) == 1


async def test_a_stopping_instance_releases_its_deliveries(make_instance: MakeInstance) -> None:
    one, two = make_instance(), make_instance()
    await eventually(lambda: not one.notifier.alone and not two.notifier.alone)
    await submit_hooks(one, "a", hook())
    final = await finish(one)
    one.worker_queue.quiet()
    await one.crash()
    await one.parts.release_all()
    task, _ = await asyncio.wait_for(two.parts.outbox.next(), 20)
    assert task.id == final.id


async def test_a_held_delivery_is_renewed(make_instance: MakeInstance, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox_module, "RENEW_S", 0.05)
    instance = make_instance()
    await submit_hooks(instance, "a", hook())
    await finish(instance)
    (held,) = instance.parts.outbox._held.values()
    held.until = 0.0
    await eventually(lambda: held.until > time.time())
    assert next(iter((await waiting(instance)).values())) == pytest.approx(held.until * 1000, abs=2)


@pytest.mark.parametrize("name", ["junk", "a:b:c:d", "0" * 32 + ":1"])
async def test_an_outbox_item_without_its_task_is_dropped(make_instance: MakeInstance, name: str) -> None:
    instance = make_instance(start=False)
    await instance.connection.commands.zadd(instance.keys.outbox, {name: 1})
    instance.start()
    await eventually(lambda: gone(instance))


async def gone(instance: Instance) -> bool:
    return await waiting(instance) == {}


async def test_webhooks_of_an_old_epoch_are_not_called_for_a_new_one(make_instance: MakeInstance) -> None:
    one = make_instance()
    await submit_hooks(one, "a", hook())
    await finish(one, "failed")
    await one.crash()
    two = make_instance(start=False)
    await two.client_queue.submit(submission("a"))
    two.start()
    await eventually(lambda: gone(two))


async def test_a_resubmitted_task_has_a_new_delivery_log(make_instance: MakeInstance) -> None:
    instance = make_instance()
    await submit_hooks(instance, "a", hook("old"))
    first = await finish(instance, "failed")
    await deliver(instance)
    await submit_hooks(instance, "a", hook("new"))
    second = await finish(instance)
    _, delivery = await deliver(instance)
    assert second.epoch > first.epoch
    assert delivery.webhook == hook("new")
    instance.task_cache.forget(second.id)
    seen = (await instance.task(second.id)).deliveries
    assert [(delivery.webhook, delivery.status) for delivery in seen] == [(hook("new"), DeliveryStatus.DELIVERED)]


async def test_delivery_logs_and_outbox_items_expire(make_instance: MakeInstance) -> None:
    instance = make_instance()
    await submit_hooks(instance, "a", hook())
    await submit_hooks(instance, "a", hook("b"))
    redis, keys = instance.connection.commands, instance.keys
    assert 0 < await redis.pttl(keys.delivery_log(submission("a").task_id)) <= 60_000
    await finish(instance)
    for _ in range(2):
        await deliver(instance)
    assert 0 < await redis.pttl(keys.delivery_log(submission("a").task_id)) <= 60_000
    assert not await redis.exists(keys.outbox)


async def test_a_result_is_written_over_a_foreign_value(make_instance: MakeInstance) -> None:
    instance = make_instance()
    await submit_hooks(instance, "a", hook())
    claim = await instance.claim()
    await instance.worker_queue.start(claim)
    redis, keys = instance.connection.commands, instance.keys
    await redis.delete(keys.record(claim.task.id))
    await redis.rpush(keys.record(claim.task.id), "foreign")
    await redis.rpush(keys.outbox, "foreign")
    await redis.rpush(keys.delivery_log(claim.task.id), "foreign")
    final = await end(instance, claim)
    _, delivery = await asyncio.wait_for(instance.parts.outbox.next(), 20)
    assert delivery.webhook == hook()
    instance.task_cache.forget(final.id)
    assert (await instance.task(final.id)).state is State.COMPLETED


def test_records_and_logs_survive_a_round_trip() -> None:
    deliveries = (Delivery(hook(), 0), Delivery(hook("b", secret="whsec_x"), 1, attempts=1, due_at=5.0))
    task = Task("ab", 17, 17, "c0", "m", b"{}", 1.0, State.COMPLETED, deliveries=deliveries)
    assert decode_record(final_record(task))[1].deliveries == deliveries
    assert decode_delivery_log(encode_delivery_log(17, deliveries)) == (17, deliveries)
    bare = changed(task, deliveries=())
    assert with_delivery_log(bare, encode_delivery_log(17, deliveries)) == task
    for other in (encode_delivery_log(16, deliveries), b"2 17\n[]", b"junk", b"", None):
        assert with_delivery_log(bare, other) == bare
    with pytest.raises(UnreadableRecord):
        decode_delivery_log(b"1 17\n[{}]")


async def test_named_deliveries_are_read_in_bulk_and_in_order(
    make_instance: MakeInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox_module, "MAX_HELD_EACH", 20)
    count, one = 100, make_instance()
    ids = []
    for name in range(count):
        await submit_hooks(one, name, hook())
        ids.append((await finish(one)).id)
    outbox, meter = one.parts.outbox, one.connection.meter
    assert len(outbox._held) == 20
    assert len(await waiting(one)) == count
    before = meter.commands["hooks"] + meter.commands["read"]
    delivered = [(await deliver(one))[0].id for _ in range(70)]
    assert delivered == ids[:70]
    assert meter.commands["hooks"] + meter.commands["read"] - before <= 70 * 2.2
    await one.parts.release_all()
    await one.crash()
    two = make_instance()
    delivered = [(await deliver(two))[0].id for _ in range(30)]
    assert sorted(delivered) == sorted(ids[70:])
    assert await waiting(two) == {}


async def test_a_new_instance_reads_the_webhooks_of_a_dead_one_in_small_batches(
    make_instance: MakeInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox_module, "READ_AT_ONCE", 4)
    one = make_instance()
    for name in range(10):
        await submit_hooks(one, name, hook())
        await finish(one)
    await one.crash()
    two, at_once, most = make_instance(start=False), 0, 0
    read = two.verbs.read

    async def counted(task_id: str) -> TaskRows:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        rows = await read(task_id)
        at_once -= 1
        return rows

    monkeypatch.setattr(two.verbs, "read", counted)
    two.start()
    for _ in range(10):
        await deliver(two)
    assert most == 4


async def test_a_full_destination_leaves_further_deliveries_in_redis(
    make_instance: MakeInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox_module, "MAX_HELD_EACH", 1)
    monkeypatch.setattr(lines_module, "MAX_NAMES_EACH", 1)
    one = make_instance()
    for name in range(4):
        await submit_hooks(one, name, hook())
        await finish(one)
    outbox = one.parts.outbox
    assert (len(outbox._held), len(outbox._lines.until), len(await waiting(one))) == (1, 1, 4)
    for _ in range(2):
        await deliver(one)
    redis = one.connection.commands
    await redis.zadd(one.keys.outbox, dict.fromkeys(await waiting(one), 0), xx=True)
    outbox.check_now()
    for _ in range(2):
        await deliver(one)
    await eventually(lambda: gone(one))


async def test_distant_deliveries_are_evicted_for_due_ones(
    make_instance: MakeInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox_module, "MAX_HELD_EACH", 2)
    one = make_instance()
    for name in range(4):
        await submit_hooks(one, name, hook())
        await finish(one)
    for _ in range(4):
        await fail_once(one, due_in_s=600)
    assert len(one.parts.outbox._held) <= 2
    await submit_hooks(one, "new", hook())
    final = await finish(one)
    while True:
        task, delivery = await asyncio.wait_for(one.parts.outbox.next(), 20)
        if task.id == final.id:
            break
    assert delivery.due_at is None


async def test_a_foreign_outbox_value_does_not_end_the_loop(make_instance: MakeInstance) -> None:
    one = make_instance(start=False)
    redis, key = one.connection.commands, one.keys.outbox
    await redis.zadd(key, {b"\xff\xfe": 1, b"": 2, b"x" * 1000: 3})
    one.start()
    await eventually(lambda: gone(one))
    await redis.set(key, "foreign")
    one.parts.outbox.check_now()
    await submit_hooks(one, "a", hook())
    await finish(one)
    _, delivery = await asyncio.wait_for(one.parts.outbox.next(), 20)
    assert delivery.webhook == hook()
    await redis.delete(key)
    await check_outbox(one)
    assert not any(loop.done() for loop in one.loops)
