"""Depth and oldest age of the queue, which cost no command or few."""

from __future__ import annotations

import asyncio

from imagegen.queue.monitor import BacklogSize
from tests.conftest import MakeInstance
from tests.queue.command_counts import put
from tests.support import eventually, submission


async def test_a_free_loop_proves_an_empty_queue_without_a_command(make_instance: MakeInstance) -> None:
    instance = make_instance(start=False)
    instance.notifier.add_peer("other")
    waits = asyncio.create_task(instance.worker_queue.claim())
    await eventually(lambda: instance.parts.monitor.local_status().free == 1)
    before = instance.connection.meter.commands["stats"]
    assert await instance.parts.monitor.waiting() == BacklogSize(0, 0.0)
    assert instance.connection.meter.commands["stats"] == before
    waits.cancel()


async def test_a_free_slot_hides_no_waiting_task(make_instance: MakeInstance) -> None:
    instance = make_instance(start=False)
    waits = asyncio.create_task(instance.worker_queue.claim())
    await instance.client_queue.submit(submission("a"))
    assert instance.parts.monitor.local_status().free == 1
    assert (await instance.parts.monitor.waiting()).depth == 1
    waits.cancel()


async def test_a_single_instance_computes_depth_and_age_without_a_command(make_instance: MakeInstance) -> None:
    instance = make_instance(start=False)
    await put(instance, "a", "b")
    before = instance.connection.meter.commands.total()
    waiting = await instance.parts.monitor.waiting()
    assert waiting.depth == 2
    assert 0.0 <= waiting.oldest_age_s < 60.0
    assert instance.connection.meter.commands.total() == before


async def test_the_depth_is_rarely_read_from_redis(make_instance: MakeInstance) -> None:
    one, two = make_instance(start=False), make_instance(start=False)
    await put(two, "a")
    one.notifier.add_peer("two")
    looks = await asyncio.gather(*(one.parts.monitor.waiting() for _ in range(20)))
    assert {waiting.depth for waiting in looks} == {1}
    assert one.connection.meter.commands["stats"] == 3


async def test_the_last_depth_is_reported_during_an_outage(make_instance: MakeInstance) -> None:
    instance = make_instance(start=False, url="redis://127.0.0.1:1")
    instance.notifier.add_peer("two")
    assert await instance.parts.monitor.waiting() == BacklogSize(0, 0.0)
    assert await instance.parts.monitor.dead_letters() == 0
    assert not instance.parts.monitor.local_status().redis_up
    assert instance.connection.meter.commands.total() == 0
