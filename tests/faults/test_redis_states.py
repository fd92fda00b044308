"""The queue on a Redis that is full, read-only, emptied, killed or stopped."""

from __future__ import annotations

import asyncio
import os
import signal
import time

import pytest

from imagegen.errors import QueueUnavailable
from imagegen.queue.claim import Claim, StartResult
from imagegen.redis_client.embedded import EmbeddedRedis
from imagegen.tasks import transitions
from imagegen.tasks.image import StoredImage
from imagegen.tasks.task import State, Task
from tests.conftest import Instance, MakeInstance
from tests.faults.servers import pid_of
from tests.support import Stopwatch, eventually, logged, submission

IMAGE = StoredImage(0, "image/png", 10, 8, 8, "a" * 64)


async def claimed(instance: Instance, name: str) -> Claim:
    waiting = asyncio.create_task(instance.claim())
    await instance.client_queue.submit(submission(name))
    return await asyncio.wait_for(waiting, 20)


async def finish(instance: Instance, claim: Claim) -> Task:
    final = transitions.completed(claim.task, [IMAGE], [], now=time.time(), ttl_s=60)
    return await asyncio.wait_for(instance.worker_queue.finish(claim, final), 20)


async def test_out_of_memory_refuses_submits_but_stores_paid_results(
    make_instance: MakeInstance, own_redis: EmbeddedRedis
) -> None:
    instance = make_instance(url=own_redis.url)
    redis = instance.connection.commands
    paid = await claimed(instance, "paid")
    assert await instance.worker_queue.start(paid) is StartResult.STARTED
    unpaid = await claimed(instance, "unpaid")
    await redis.config_set("maxmemory", 1)
    with pytest.raises(QueueUnavailable):
        await instance.client_queue.submit(submission("refused"))
    starting = asyncio.create_task(instance.worker_queue.start(unpaid))
    assert (await finish(instance, paid)).state is State.COMPLETED
    assert not starting.done()
    await redis.config_set("maxmemory", 0)
    assert await asyncio.wait_for(starting, 20) is StartResult.STARTED


async def test_a_read_only_redis_refuses_submits_and_costs_no_attempt(
    make_instance: MakeInstance, own_redis: EmbeddedRedis
) -> None:
    instance = make_instance(url=own_redis.url)
    redis = instance.connection.commands
    claim = await claimed(instance, "a")
    await redis.execute_command("REPLICAOF", "127.0.0.1", "1")
    with pytest.raises(QueueUnavailable):
        await instance.client_queue.submit(submission("refused"))
    starting = asyncio.create_task(instance.worker_queue.start(claim))
    with pytest.raises(QueueUnavailable):
        await instance.client_queue.submit(submission("refused again"))
    assert not starting.done()
    await redis.execute_command("REPLICAOF", "NO", "ONE")
    assert await asyncio.wait_for(starting, 20) is StartResult.STARTED
    assert claim.checkpoint.attempts == 1


async def test_a_primary_that_becomes_a_replica_is_no_deleted_stream(
    make_instance: MakeInstance, own_redis: EmbeddedRedis
) -> None:
    instance = make_instance(url=own_redis.url)
    redis = instance.connection.commands
    waiting = asyncio.create_task(instance.claim())

    async def reads_are_blocked() -> bool:
        return bool((await redis.info("clients"))["blocked_clients"])

    with logged("INFO", "{message}") as lines:
        await eventually(reads_are_blocked, within_s=20)
        await redis.execute_command("REPLICAOF", "127.0.0.1", "1")
        await eventually(lambda: any("Redis can't be used: ReadOnlyError" in line for line in lines), within_s=20)
        await redis.execute_command("REPLICAOF", "NO", "ONE")
        await eventually(lambda: any("Redis is back" in line for line in lines), within_s=20)
        await instance.client_queue.submit(submission("after"))
        assert (await asyncio.wait_for(waiting, 20)).task.id == submission("after").task_id
    assert not any("deleted" in line or "can't be read" in line for line in lines), lines


async def test_after_flushall_waiting_and_running_tasks_are_finished(
    make_instance: MakeInstance, own_redis: EmbeddedRedis
) -> None:
    instance = make_instance(url=own_redis.url)
    redis = instance.connection.commands
    running = await claimed(instance, "runs")
    await instance.worker_queue.start(running)
    waits = (await instance.client_queue.submit(submission("waits"))).task
    await redis.flushall()
    taken = await instance.claim()
    assert taken.task.id == waits.id
    assert await instance.worker_queue.start(taken) is StartResult.STARTED
    for claim in (running, taken):
        assert (await finish(instance, claim)).state is State.COMPLETED
        instance.task_cache.forget(claim.task.id)
        assert (await instance.task(claim.task.id)).state is State.COMPLETED


async def test_a_killed_redis_returns_without_a_lost_task(
    make_instance: MakeInstance, own_redis: EmbeddedRedis
) -> None:
    instance = make_instance(url=own_redis.url)
    running = await claimed(instance, "runs")
    await instance.worker_queue.start(running)
    waits = (await instance.client_queue.submit(submission("waits"))).task
    watching = asyncio.create_task(own_redis.watch())
    os.kill(pid_of(own_redis), signal.SIGKILL)
    assert (await finish(instance, running)).state is State.COMPLETED
    taken = await instance.claim()
    assert taken.task.id == waits.id
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)


async def test_a_stopped_redis_delays_no_response_and_repeats_no_entry(
    make_instance: MakeInstance, own_redis: EmbeddedRedis, service_deadline: None
) -> None:
    instance = make_instance(url=own_redis.url)
    await claimed(instance, "before")
    os.kill(pid_of(own_redis), signal.SIGSTOP)
    try:
        async with Stopwatch() as watch:
            refused = await asyncio.gather(
                *(instance.client_queue.submit(submission("now")) for _ in range(5)),
                *(instance.client_queue.get(submission(f"{i}").task_id) for i in range(5)),
                return_exceptions=True,
            )
            assert all(isinstance(error, QueueUnavailable) for error in refused)
            assert watch.elapsed_s < 8
    finally:
        os.kill(pid_of(own_redis), signal.SIGCONT)

    async def accepted() -> bool:
        try:
            await instance.client_queue.submit(submission("now"))
        except QueueUnavailable:
            return False
        return True

    await eventually(accepted)
    assert await instance.connection.commands.xlen(instance.keys.stream) == 2
