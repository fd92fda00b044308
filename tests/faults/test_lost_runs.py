"""Checkpoints of tasks that lost their owner, for long or together with the stream."""

from __future__ import annotations

import asyncio

import pytest

from imagegen.queue.claim import MAX_OUTAGE_S, Claim, StartResult
from imagegen.redis_client.embedded import EmbeddedRedis
from tests.conftest import Instance, MakeInstance
from tests.support import eventually, submission

LEASE_S = 1.5


async def claimed(instance: Instance) -> Claim:
    await instance.client_queue.submit(submission("a"))
    return await instance.claim()


async def started(instance: Instance, claim: Claim | None = None) -> Claim:
    """Return the first claim that the instance can start."""
    while True:
        claim = claim or await instance.claim()
        start = StartResult.INHERITED
        while start is StartResult.INHERITED:
            start = await instance.worker_queue.start(claim)
        if start is StartResult.STARTED:
            return claim
        instance.worker_queue.drop(claim)
        claim = None


async def test_a_checkpoint_outlives_an_outage_of_all_instances(make_instance: MakeInstance) -> None:
    one = make_instance(lease_s=LEASE_S)
    claim = await started(one, await claimed(one))
    assert await one.connection.commands.pttl(one.keys.checkpoint(claim.task.id)) > MAX_OUTAGE_S * 1_000


async def test_the_checkpoint_of_a_released_task_expires_with_its_record(make_instance: MakeInstance) -> None:
    one = make_instance(lease_s=LEASE_S)
    claim = await started(one, await claimed(one))
    one.worker_queue.quiet()
    await one.worker_queue.release([claim])
    redis, keys = one.connection.commands, one.keys
    run, record = await redis.pttl(keys.checkpoint(claim.task.id)), await redis.pttl(keys.record(claim.task.id))
    assert abs(run - record) < 5_000


async def test_a_released_task_retains_its_counts_in_a_restored_claim(
    make_instance: MakeInstance, own_redis: EmbeddedRedis
) -> None:
    before = make_instance(url=own_redis.url, slots=1, lease_s=LEASE_S)
    claim = await started(before, await claimed(before))
    before.worker_queue.quiet()
    await before.worker_queue.release([claim])
    await before.crash()
    owner = make_instance(url=own_redis.url, slots=1, lease_s=LEASE_S)
    claim = await owner.claim()
    await owner.connection.commands.delete(owner.keys.stream)
    await eventually(lambda: owner.connection.meter.written_back["running"] == 1, within_s=30)
    assert await started(owner, claim) is claim
    assert (claim.checkpoint.attempts, claim.checkpoint.ambiguous_calls) == (1, 1)


async def test_a_call_of_an_owner_lost_with_the_stream_is_recorded(
    make_instance: MakeInstance, own_redis: EmbeddedRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("imagegen.queue.change_relay.REFRESH_S", 0.2)
    monkeypatch.setattr("imagegen.queue.recovery.CHECK_AGAIN_S", 0.3)
    submitter, owner = (make_instance(url=own_redis.url, slots=1, lease_s=LEASE_S) for _ in range(2))
    await eventually(lambda: submitter.notifier.peers and owner.notifier.peers)
    claiming = asyncio.create_task(owner.claim())
    await submitter.client_queue.submit(submission("a"))
    claim = await started(owner, await asyncio.wait_for(claiming, 20))
    await owner.crash()
    redis = submitter.connection.commands
    await redis.pexpire(owner.keys.checkpoint(claim.task.id), int(MAX_OUTAGE_S * 1_000) - 1)  # as its silence does
    await redis.delete(owner.keys.stream)
    mine = await asyncio.wait_for(started(submitter), 20)
    assert mine.task.id == claim.task.id
    assert mine.checkpoint.ambiguous_calls == 1
