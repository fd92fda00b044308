"""Delivery logs in Redis: what they show on each instance, how they are written and read, and when they expire."""

from __future__ import annotations

import asyncio

import pytest
from msgspec.structs import replace as changed

from imagegen.queue import outbox as outbox_module
from imagegen.queue.codec import (
    UnreadableRecord,
    decode_delivery_log,
    decode_record,
    encode_delivery_log,
    final_record,
    with_delivery_log,
)
from imagegen.tasks.task import State, Task
from imagegen.tasks.webhook import Delivery, DeliveryStatus
from tests.conftest import Instance, MakeInstance
from tests.queue.finishing import end
from tests.queue.webhook_tasks import acquainted, deliver, finish, hook, submit_hooks, waiting
from tests.support import eventually, submission

pytestmark = pytest.mark.usefixtures("prompt_peers")


async def test_another_instance_reads_the_delivery_status(make_instance: MakeInstance) -> None:
    one, two = await acquainted(make_instance)
    await submit_hooks(one, "a", hook())
    final = await finish(one)
    assert (await two.task(final.id)).deliveries[0].pending
    await deliver(one)
    await eventually(lambda: is_delivered(two, final.id))


async def is_delivered(instance: Instance, task_id: str) -> bool:
    return (await instance.task(task_id)).deliveries[0].status is DeliveryStatus.DELIVERED


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
