"""Tests of entries that can not be read, results that can not be written, and a store that was emptied."""

from __future__ import annotations

import asyncio
import time

import pytest

from imagegen.queue.client_queue import CacheResult
from imagegen.queue.codec import VERSION
from imagegen.tasks import transitions
from imagegen.tasks.task import State, Task
from tests.conftest import MakeInstance
from tests.queue.finishing import IMAGE, end
from tests.support import eventually, submission


@pytest.mark.parametrize(
    "json",
    ["junk", '{"id":"x","digest":"d","model":"m","created":1,"request":' + "[" * 100_000 + "]" * 100_000 + "}"],
    ids=["junk", "nested too deep"],
)
async def test_an_unreadable_entry_goes_to_the_dead_letter_list(make_instance: MakeInstance, json: str) -> None:
    instance = make_instance()
    redis = instance.connection.commands
    waiting = asyncio.create_task(instance.claim())
    await redis.xadd(instance.keys.stream, {"v": "1", "g": "5", "d": json})
    await eventually(lambda: redis.llen(instance.keys.dead_letters))
    await instance.client_queue.submit(submission("a"))
    assert (await asyncio.wait_for(waiting, 20)).task.id == submission("a").task_id
    assert await redis.xlen(instance.keys.stream) == 1


async def test_an_entry_of_a_newer_version_is_left_alone(make_instance: MakeInstance) -> None:
    instance = make_instance()
    redis = instance.connection.commands
    waiting = asyncio.create_task(instance.claim())
    await redis.xadd(instance.keys.stream, {"v": str(VERSION + 1), "new": "things"})
    await instance.client_queue.submit(submission("a"))
    assert (await asyncio.wait_for(waiting, 20)).task.id == submission("a").task_id
    assert await redis.xlen(instance.keys.stream) == 2


async def test_a_result_is_written_after_the_store_was_emptied(make_instance: MakeInstance) -> None:
    instance = make_instance()
    await instance.client_queue.submit(submission("a"))
    claim = await instance.claim()
    await instance.worker_queue.start(claim)
    redis = instance.connection.commands
    await redis.delete(*await redis.keys(f"{{{instance.keys.prefix}}}:*"))
    await end(instance, claim)
    instance.task_cache.forget(claim.task.id)
    assert (await instance.task(claim.task.id)).state is State.COMPLETED


async def test_waiting_tasks_are_restored_after_the_store_was_emptied(make_instance: MakeInstance) -> None:
    instance = make_instance()
    redis = instance.connection.commands
    first = asyncio.create_task(instance.worker_queue.claim())
    await instance.client_queue.submit(submission("first"))
    await first
    await instance.client_queue.submit(submission("second"))
    await redis.delete(*await redis.keys(f"{{{instance.keys.prefix}}}:*"))
    second = await instance.claim()
    assert second.task.id == submission("second").task_id


async def test_a_submit_restores_a_task_without_its_entry(make_instance: MakeInstance) -> None:
    one, two = make_instance(start=False), make_instance(start=False)
    await one.client_queue.submit(submission("a"))
    await one.connection.commands.delete(one.keys.stream)
    assert (await two.client_queue.submit(submission("a"))).cached is CacheResult.MISS
    assert await one.connection.commands.xlen(one.keys.stream) == 1


async def test_submits_wait_while_a_stream_of_another_type_is_moved_aside(make_instance: MakeInstance) -> None:
    instance = make_instance()
    await instance.client_queue.submit(submission("first"))
    await instance.claim()
    for number in range(3):
        await instance.connection.commands.set(instance.keys.stream, "foreign")
        names = [f"{number} {name}" for name in range(40)]
        submits = []
        for name in names:
            submits.append(asyncio.create_task(instance.client_queue.submit(submission(name))))
            await asyncio.sleep(0)
        assert {result.cached for result in await asyncio.gather(*submits)} == {CacheResult.MISS}


async def test_an_unwritable_result_affects_no_other_task(make_instance: MakeInstance) -> None:
    instance = make_instance()
    for name in ("good", "bad"):
        await instance.client_queue.submit(submission(name))
    good, bad = [await instance.claim() for _ in range(2)]
    now = time.time()
    no_text = transitions.completed(bad.task, [IMAGE], ["\ud800"], now=now, ttl_s=60)
    fine = transitions.completed(good.task, [IMAGE], [], now=now, ttl_s=60)
    ends = [instance.worker_queue.finish(bad, no_text), instance.worker_queue.finish(good, fine)]
    failed, stored = await asyncio.gather(*ends, return_exceptions=True)
    assert isinstance(failed, UnicodeEncodeError)
    assert isinstance(stored, Task)
    assert stored.state is State.COMPLETED
