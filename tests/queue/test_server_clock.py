"""Ages and deadlines by the clock of the Redis server, independent of the local clock."""

from __future__ import annotations

import time

import pytest
from msgspec.structs import replace

from imagegen.queue.codec import encode_entry
from imagegen.redis_client.connection import ServerClock
from imagegen.tasks.retry import RetryPolicy
from imagegen.worker.attempt_limits import AttemptLimits
from tests.conftest import MakeInstance
from tests.support import submission


def test_the_server_clock_ignores_jumps_of_the_local_clock() -> None:
    now = {"wall": 1_000.0, "monotonic": 5.0}
    clock = ServerClock(wall=lambda: now["wall"], monotonic=lambda: now["monotonic"])
    now["wall"], now["monotonic"] = 4_600.0, 6.0
    assert clock() == 1_001.0
    clock.learn(1_002.0)
    assert clock() == 1_001.0
    clock.learn(9_000.0)
    now["monotonic"] = 7.0
    assert clock() == 9_001.0


def test_a_time_before_a_jump_to_the_future_is_as_long_ago_as_before() -> None:
    now = {"monotonic": 5.0}
    clock = ServerClock(wall=lambda: 10_000.0, monotonic=lambda: now["monotonic"])
    clock.learn(1_000.0)  # the first time is no jump
    assert clock.after_jumps(900.0) == 900.0
    clock.learn(4_600.0)
    assert clock() - clock.after_jumps(900.0) == 100.0
    assert clock.after_jumps(4_600.0) == 4_600.0
    now["monotonic"] = 15.0
    clock.learn(1_010.0)
    assert clock() - clock.after_jumps(900.0) == 110.0
    assert clock.after_jumps(1_010.0) == 1_010.0


@pytest.mark.parametrize("off_by_s", [3_600.0, -3_600.0])
async def test_a_submitters_wrong_clock_changes_no_tasks_age(make_instance: MakeInstance, off_by_s: float) -> None:
    one, two = make_instance(start=False), make_instance(start=False)
    await one.verbs.create_group()
    one.connection.clock._offset += off_by_s
    task = (await one.client_queue.submit(submission("a"))).task
    assert abs(task.created_at - time.time()) < 60.0
    assert abs(one.connection.clock() - time.time()) < 60.0
    (claim,) = await two.parts.leases.hold(await two.verbs.read_entries(two.parts.dispatcher.instance, 1, 0.01))
    assert abs(claim.task.created_at - time.time()) < 60.0
    assert (
        AttemptLimits(RetryPolicy(3, 1.0), 600.0).exhausted(claim.task, claim.checkpoint, two.connection.clock())
        is None
    )


async def test_a_new_connection_reads_the_server_time(make_instance: MakeInstance) -> None:
    instance = make_instance(start=False)
    instance.connection.clock._offset += 3_600.0
    await instance.connection.multiplexer.execute("PING")
    assert abs(instance.connection.clock() - time.time()) < 60.0


async def test_a_task_that_was_released_keeps_its_age(make_instance: MakeInstance) -> None:
    instance = make_instance()
    await instance.client_queue.submit(submission("a"))
    claim = await instance.claim()
    claim.task = replace(claim.task, created_at=claim.task.created_at - 500.0)
    assert b'"queued":' in encode_entry(claim.task)
    instance.task_cache.forget(claim.task.id)
    await instance.worker_queue.release([claim])
    instance.task_cache.forget(claim.task.id)
    again = await instance.claim()
    assert again.task.created_at == claim.task.created_at
