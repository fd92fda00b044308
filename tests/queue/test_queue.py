"""Tests of the life of a task in Redis: submitted, coalesced, claimed, retried, finished and expired."""

from __future__ import annotations

import asyncio

import pytest
from msgspec.structs import replace

from imagegen.errors import InternalError, QueueFull
from imagegen.queue.claim import StartResult
from imagegen.queue.client_queue import CacheResult
from imagegen.tasks.retry import Retry
from imagegen.tasks.task import State, WaitReason
from tests.conftest import MakeInstance
from tests.queue.finishing import IMAGE, at_rest, run_one
from tests.support import submission


async def test_a_submitted_task_is_claimed_started_and_finished(make_instance: MakeInstance) -> None:
    instance = make_instance()
    submitted = await instance.client_queue.submit(submission("a"))
    assert submitted.cached is CacheResult.MISS
    assert submitted.task.state is State.PENDING
    final = await run_one(instance)
    assert final.state is State.COMPLETED
    assert (await instance.task(final.id)).images == (IMAGE,)
    assert await at_rest(instance)


async def test_fifty_concurrent_identical_submits_are_one_entry(make_instance: MakeInstance) -> None:
    instance = make_instance()
    answers = await asyncio.gather(*(instance.client_queue.submit(submission("a")) for _ in range(50)))
    assert [answer.cached for answer in answers].count(CacheResult.MISS) == 1
    assert {answer.cached for answer in answers} == {CacheResult.MISS, CacheResult.COALESCED}
    assert await instance.connection.commands.xlen(instance.keys.stream) == 1


async def test_identical_submits_on_two_instances_are_one_entry(make_instance: MakeInstance) -> None:
    one, two = make_instance(), make_instance()
    answers = await asyncio.gather(*(i.client_queue.submit(submission("a")) for i in (one, two) for _ in range(25)))
    assert [answer.cached for answer in answers].count(CacheResult.MISS) == 1
    assert await one.connection.commands.xlen(one.keys.stream) == 1


async def test_a_finished_task_is_a_hit_on_every_instance(make_instance: MakeInstance) -> None:
    one, two = make_instance(), make_instance(start=False)
    await one.client_queue.submit(submission("a"))
    await run_one(one)
    for instance in (one, two, two):
        answer = await instance.client_queue.submit(submission("a"))
        assert answer.cached is CacheResult.HIT
        assert answer.task.images == (IMAGE,)
    assert await at_rest(one)


async def test_a_resubmitted_task_has_a_higher_sequence_and_no_attempts(make_instance: MakeInstance) -> None:
    instance = make_instance()
    await instance.client_queue.submit(submission("a"))
    failed = await run_one(instance, "failed")
    again = await instance.client_queue.submit(submission("a"))
    assert again.cached is CacheResult.MISS
    assert again.task.sequence > failed.sequence
    claim = await instance.claim()
    assert await instance.worker_queue.start(claim) is StartResult.INHERITED
    assert await instance.worker_queue.start(claim) is StartResult.STARTED
    assert claim.checkpoint.attempts == 1


async def test_another_request_under_the_same_id_is_never_served(make_instance: MakeInstance) -> None:
    one, two = make_instance(), make_instance(start=False)
    await one.client_queue.submit(submission("a"))
    for instance in (one, two):
        with pytest.raises(InternalError):
            await instance.client_queue.submit(replace(submission("a"), digest="b" * 32))
    assert await one.connection.commands.xlen(one.keys.stream) == 1


async def test_the_queue_takes_no_more_than_max_queue_waiting_tasks(make_instance: MakeInstance) -> None:
    instance = make_instance(max_queue=3, start=False)
    await instance.verbs.create_group()
    for i in range(3):
        await instance.client_queue.submit(submission(i))
    with pytest.raises(QueueFull):
        await instance.client_queue.submit(submission("one too many"))
    assert (await instance.client_queue.submit(submission(0))).cached is CacheResult.COALESCED
    assert await instance.client_queue.get(submission("one too many").task_id) is None


async def test_a_full_queue_takes_tasks_again_when_some_are_claimed(make_instance: MakeInstance) -> None:
    instance = make_instance(max_queue=2, start=False)
    await instance.verbs.create_group()
    for i in range(2):
        await instance.client_queue.submit(submission(i))
    instance.start()
    await run_one(instance)
    assert (await instance.client_queue.submit(submission("next"))).cached is CacheResult.MISS


async def test_an_unknown_or_malformed_id_has_no_task(make_instance: MakeInstance) -> None:
    instance = make_instance(start=False)
    for odd in ("0" * 32, "a1b2c3d4e5f6g7h8i9j0", "", "../x", "A" * 32):
        assert await instance.client_queue.get(odd) is None


async def test_a_retry_keeps_its_claim_and_is_offered_again(make_instance: MakeInstance) -> None:
    instance = make_instance()
    await instance.client_queue.submit(submission("a"))
    claim = await instance.claim()
    await instance.worker_queue.start(claim)
    before = claim.task.sequence
    await instance.worker_queue.retry(claim, Retry(0.01, WaitReason.RETRYING))
    assert await instance.claim() is claim
    assert await instance.worker_queue.start(claim) is StartResult.STARTED
    assert claim.checkpoint.attempts == 2
    assert claim.task.sequence > before


async def test_waiting_for_a_rate_limit_counts_no_attempt(make_instance: MakeInstance) -> None:
    instance = make_instance()
    await instance.client_queue.submit(submission("a"))
    claim = await instance.claim()
    await instance.worker_queue.start(claim)
    await instance.worker_queue.retry(claim, Retry(0.01, WaitReason.UPSTREAM_RATE_LIMITED, counts_as_attempt=False))
    assert claim.task.attempts == 0
    await instance.claim()
    await instance.worker_queue.start(claim)
    assert claim.task.attempts == 1


async def test_every_key_but_the_stream_and_the_mark_of_the_server_expires(make_instance: MakeInstance) -> None:
    instance = make_instance()
    for name in ("a", "b"):
        await instance.client_queue.submit(submission(name))
    await run_one(instance)
    claim = await instance.claim()
    await instance.worker_queue.start(claim)
    redis = instance.connection.commands
    for key in await redis.keys(f"{{{instance.keys.prefix}}}:*"):
        if key not in (instance.keys.stream.encode(), instance.keys.server.encode()):
            assert await redis.pttl(key) > 0


async def test_only_the_first_entries_of_a_long_queue_are_read(make_instance: MakeInstance) -> None:
    one, two = make_instance(start=False, max_queue=5_000), make_instance(start=False, max_queue=5_000)
    await one.verbs.create_group()
    submissions = [submission(number) for number in range(1_500)]
    for first in range(0, 1_500, 100):
        await asyncio.gather(*map(one.client_queue.submit, submissions[first : first + 100]))
    last = await one.task(submissions[-1].task_id)
    waiting = await two.verbs.list_waiting()
    assert (len(waiting.ids), waiting.behind, waiting.last) == (200, 1_300, last.entry_id)
    await two.client_queue.refresh_positions()
    assert len(two.parts.dispatcher.estimates.waiting) == 1_500
    assert (await two.client_queue.position(last)).position == 1_500
