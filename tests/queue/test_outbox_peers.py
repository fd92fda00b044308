"""Webhooks of another instance in the outbox: left alone, taken over, released and renewed."""

from __future__ import annotations

import asyncio
import time

import pytest

from imagegen.queue import outbox as outbox_module
from imagegen.queue.verbs.read import TaskRows
from tests.conftest import MakeInstance
from tests.queue.webhook_tasks import (
    acquainted,
    check_outbox,
    deliver,
    fail_once,
    finish,
    hook,
    nothing_comes,
    submit_hooks,
    waiting,
)
from tests.support import LoopTime, eventually, submission

pytestmark = pytest.mark.usefixtures("prompt_peers")


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
    monkeypatch.setattr(outbox_module, "PEER_REPLY_S", 10.0)
    one = make_instance()
    await submit_hooks(one, "a", hook())
    await finish(one)
    two = make_instance()
    await eventually(lambda: not two.notifier.alone)
    await LoopTime().move(10)
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
    done, _ = await asyncio.wait(takers, timeout=20, return_when=asyncio.FIRST_COMPLETED)
    assert len(done) == 1
    for other in others:
        await check_outbox(other)
    assert sum(taker.done() for taker in takers) == 1


async def test_a_stopping_instance_releases_its_deliveries(make_instance: MakeInstance) -> None:
    one, two = await acquainted(make_instance)
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


@pytest.mark.parametrize("is_finished", [False, True])
async def test_a_webhook_that_is_tried_again_outlives_its_instance_and_a_new_generation(
    make_instance: MakeInstance, is_finished: bool
) -> None:
    one = make_instance()
    task = await submit_hooks(one, "a", hook())
    first = await finish(one)
    await fail_once(one, due_in_s=0.5)
    await one.client_queue.replace(submission("a"), first, keep=True)
    if is_finished:
        assert (await finish(one)).epoch > first.epoch
    await one.crash()
    two = make_instance()
    delivered, delivery = await deliver(two)
    assert (delivered.id, delivered.epoch, delivery.webhook) == (task.id, first.epoch, hook())
    assert await waiting(two) == {}
    assert await two.connection.commands.exists(two.keys.end(f"{first.id}:{first.epoch}")) == 0
