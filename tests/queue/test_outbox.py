"""Webhooks in Redis: in the task record and the outbox, until they are delivered."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from imagegen.queue import delivery_lines as lines_module
from imagegen.queue import outbox as outbox_module
from imagegen.tasks.task import State
from imagegen.tasks.webhook import DeliveryStatus, Webhook
from tests.conftest import Instance, MakeInstance
from tests.queue.webhook_tasks import (
    acquainted,
    check_outbox,
    counted,
    deliver,
    fail_once,
    finish,
    finish_and_settle,
    hook,
    nothing_comes,
    submit_hooks,
    waiting,
)
from tests.support import eventually, submission

pytestmark = pytest.mark.usefixtures("prompt_peers")


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
    one, two = await acquainted(make_instance)
    task = await submit_hooks(one, "a", hook())
    assert (await two.cancel(task.id)).state is State.CANCELLED
    delivered, _ = await deliver(two)
    assert delivered.state is State.CANCELLED
    assert await waiting(one) == {}
    assert await nothing_comes(one, 0.05)


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
