"""Webhooks of clients that join a task: on the same instance, on another one, and on a cache hit."""

from __future__ import annotations

import asyncio

import pytest

from imagegen.errors import InvalidRequest
from imagegen.queue.client_queue import CacheResult
from imagegen.tasks.task import State
from imagegen.tasks.webhook import MAX_WEBHOOKS, DeliveryStatus
from tests.conftest import Instance, MakeInstance
from tests.queue.finishing import end
from tests.queue.webhook_tasks import acquainted, deliver, finish, hook, submit_hooks, waiting
from tests.support import eventually, submission

pytestmark = pytest.mark.usefixtures("prompt_peers")


@pytest.mark.parametrize("running", [True, False])
async def test_the_finishing_instance_delivers_all_joined_webhooks(make_instance: MakeInstance, running: bool) -> None:
    one, two = await acquainted(make_instance)
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
    one, two = await acquainted(make_instance)
    task = await submit_hooks(one, "a")
    await submit_hooks(two, "a", hook())
    seen = await two.task(task.id)
    assert [delivery.webhook for delivery in seen.deliveries] == [hook()]
    claim = await one.claim()
    await one.worker_queue.start(claim)
    await end(one, claim)
    assert (await deliver(one))[1].webhook == hook()


async def test_a_cancel_notifies_webhooks_that_joined_elsewhere(make_instance: MakeInstance) -> None:
    one, two = await acquainted(make_instance)
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
    one, two = await acquainted(make_instance)
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
    one, two = await acquainted(make_instance)
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
