"""The queue during failures of Redis or of its network."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import pytest
from redis.exceptions import AuthenticationError

from imagegen.errors import QueueUnavailable
from imagegen.queue.claim import Claim, StartResult
from imagegen.queue.client_queue import CacheResult
from imagegen.redis_client import redis_errors, redis_health
from imagegen.tasks import transitions
from imagegen.tasks.image import StoredImage
from imagegen.tasks.task import State, Task
from tests.conftest import Instance, MakeInstance
from tests.faults.proxy import FaultProxy
from tests.queue.webhook_tasks import check_outbox, deliver, finish_and_settle, hook, submit_hooks
from tests.support import Stopwatch, eventually, logged, submission

pytestmark = pytest.mark.usefixtures("service_deadline")

IMAGE = StoredImage(0, "image/png", 10, 8, 8, "a" * 64)


async def finish(instance: Instance, claim: Claim) -> Task:
    return await instance.worker_queue.finish(
        claim, transitions.completed(claim.task, [IMAGE], [], now=time.time(), ttl_s=60)
    )


async def run_one(instance: Instance) -> Task:
    claim = await instance.claim()
    while (start := await instance.worker_queue.start(claim)) is StartResult.INHERITED:
        pass
    assert start is StartResult.STARTED
    return await finish(instance, claim)


async def test_a_thousand_identical_submits_with_lost_replies_are_one_task(
    make_instance: MakeInstance, proxy: FaultProxy
) -> None:
    proxy.drop_some(0.05, seed=7)
    instances = [make_instance(start=False, url=proxy.url) for _ in range(2)]
    await instances[0].verbs.create_group()

    async def submit(number: int) -> CacheResult:
        return (await instances[number % 2].client_queue.submit(submission("one"))).cached

    async def insistently(number: int) -> CacheResult:
        while True:
            try:
                return await submit(number)
            except QueueUnavailable:
                continue

    for round_start in range(0, 1000, 100):
        await asyncio.gather(*(insistently(round_start + i) for i in range(100)))
        for instance in instances:
            instance.task_cache.forget(submission("one").task_id)
    assert await instances[0].connection.commands.xlen(instances[0].keys.stream) == 1


async def test_lost_replies_of_every_write_leave_every_task_finished_once(
    make_instance: MakeInstance, proxy: FaultProxy
) -> None:
    proxy.drop_some(0.1, seed=11)
    instance = make_instance(url=proxy.url, lease_s=2.0)
    finished: list[Task] = []

    async def loop() -> None:
        while True:
            finished.append(await run_one(instance))

    loops = [asyncio.create_task(loop()) for _ in range(5)]
    for number in range(60):
        while True:
            try:
                await instance.client_queue.submit(submission(number))
                break
            except QueueUnavailable:
                continue
    await eventually(lambda: len({task.id for task in finished}) == 60, within_s=20)
    for running in loops:
        running.cancel()
    await asyncio.gather(*loops, return_exceptions=True)
    assert proxy.dropped > 0
    assert all(task.state is State.COMPLETED for task in finished)
    proxy.drop_reply = lambda _request: False

    async def at_rest() -> bool:
        redis = instance.connection.commands
        pending = await redis.xpending(instance.keys.stream, "pool")
        return await redis.xlen(instance.keys.stream) == 0 and pending["pending"] == 0

    await eventually(at_rest)


async def test_the_webhook_of_a_result_with_a_lost_reply_is_delivered_at_once(
    make_instance: MakeInstance, proxy: FaultProxy
) -> None:
    instance = make_instance(url=proxy.url)
    await finish_and_settle(instance, "before", hook())  # so that Redis knows the script
    await check_outbox(instance)
    task = await submit_hooks(instance, "a", hook())
    claim = await instance.claim()
    while await instance.worker_queue.start(claim) is StartResult.INHERITED:
        pass
    await submit_hooks(instance, "a", hook("of a later client"))
    is_finish = (b"EVALSHA", instance.keys.outbox.encode(), claim.entry_id.encode())
    proxy.drop_reply = lambda chunk: all(part in chunk for part in is_finish) and proxy.dropped == 0
    await finish(instance, claim)
    assert proxy.dropped == 1
    delivered = [await deliver(instance), await deliver(instance)]
    assert [ended.id for ended, _ in delivered] == [task.id] * 2
    assert {delivery.webhook for _, delivery in delivered} == {hook(), hook("of a later client")}


@pytest.mark.parametrize("fault", ["black_hole", "refuse"])
async def test_a_submit_is_refused_in_time_while_redis_does_not_answer(
    make_instance: MakeInstance, proxy: FaultProxy, fault: str
) -> None:
    instance = make_instance(url=proxy.url)
    await instance.client_queue.submit(submission("before"))
    setattr(proxy, fault, True)
    if fault == "refuse":
        proxy.cut()
    async with Stopwatch() as watch:
        with pytest.raises(QueueUnavailable):
            await instance.client_queue.submit(submission("now"))
        assert watch.elapsed_s < 8


async def test_finished_tasks_are_served_while_redis_is_down(make_instance: MakeInstance, proxy: FaultProxy) -> None:
    instance = make_instance(url=proxy.url)
    await instance.client_queue.submit(submission("a"))
    final = await run_one(instance)
    proxy.refuse = True
    proxy.cut(reset=True)
    assert (await instance.task(final.id)).state is State.COMPLETED
    assert (await instance.client_queue.submit(submission("a"))).cached is CacheResult.HIT


async def test_a_result_waits_for_redis_and_is_stored(make_instance: MakeInstance, proxy: FaultProxy) -> None:
    instance = make_instance(url=proxy.url)
    await instance.client_queue.submit(submission("a"))
    claim = await instance.claim()
    await instance.worker_queue.start(claim)
    proxy.refuse = True
    proxy.cut()
    finishing = asyncio.create_task(finish(instance, claim))
    await eventually(lambda: instance.connection.health.down_since is not None)
    proxy.refuse = False
    assert (await asyncio.wait_for(finishing, 20)).state is State.COMPLETED


async def test_the_first_task_is_claimed_soon_after_redis_returns(
    make_instance: MakeInstance, proxy: FaultProxy
) -> None:
    instance = make_instance(url=proxy.url)
    waiting = asyncio.create_task(instance.claim())
    await instance.client_queue.submit(submission("first"))
    await waiting
    waiting = asyncio.create_task(instance.claim(60))
    proxy.refuse = True
    proxy.cut()
    await eventually(lambda: instance.connection.health.down_since is not None)
    proxy.refuse = False

    async def submitted() -> bool:
        try:
            await instance.client_queue.submit(submission("second"))
        except QueueUnavailable:
            return False
        return True

    async with Stopwatch() as watch:
        await eventually(submitted)
        assert (await asyncio.wait_for(waiting, 20)).task.id == submission("second").task_id
        assert watch.elapsed_s < 5.0


async def test_entries_that_were_delivered_into_a_cut_connection_are_fetched(
    make_instance: MakeInstance, proxy: FaultProxy
) -> None:
    instance = make_instance(url=proxy.url)
    proxy.drop_reply = lambda request: b"XREADGROUP" in request
    waiting = asyncio.create_task(instance.claim(60))
    await instance.client_queue.submit(submission("a"))
    await eventually(lambda: proxy.dropped > 0)
    proxy.drop_reply = lambda _request: False
    assert (await asyncio.wait_for(waiting, 20)).task.id == submission("a").task_id


async def test_an_outage_is_two_log_lines(make_instance: MakeInstance, proxy: FaultProxy) -> None:
    with logged("INFO", "{message}") as lines:
        instance = make_instance(url=proxy.url)
        waiting = asyncio.create_task(instance.claim())
        await instance.client_queue.submit(submission("a"))
        await waiting
        proxy.refuse = True
        proxy.cut()
        for number in range(20):
            with pytest.raises(QueueUnavailable):
                await instance.client_queue.submit(submission(number))
        proxy.refuse = False
        await eventually(instance.connection.is_reachable)
    assert [line for line in lines if "Redis" in line] == [lines[0], lines[-1]]
    assert len(lines) == 2


@pytest.fixture
def lines() -> Iterator[list[str]]:
    """Lines of the log from INFO on."""
    with logged("INFO", "{message}") as lines:
        yield lines


async def test_many_short_outages_are_a_few_lines_and_a_longer_one_has_their_count(
    lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    health = redis_health.Health()
    for _ in range(100):
        health.failed(OSError("one connection too many"))
        health.succeeded()
    assert len(lines) == 2 * redis_health.MAX_OUTAGES
    monkeypatch.setattr(redis_health, "LONG_S", 0.0)
    health.failed(OSError("a long one"))
    assert "(97 shorter outages before are not in the log)" in lines[-1]


async def test_an_outage_that_becomes_a_refusal_says_what_to_do(lines: list[str]) -> None:
    health = redis_health.Health()
    health.failed(OSError("Connection closed by server"))
    for _ in range(5):
        health.failed(AuthenticationError("invalid username-password pair"))
    assert [redis_errors.LOGIN_REMEDY in line for line in lines] == [False, True]


async def test_scripts_are_loaded_again_after_a_script_flush(make_instance: MakeInstance) -> None:
    instance = make_instance()
    await instance.client_queue.submit(submission("a"))
    await instance.connection.commands.script_flush()
    await instance.client_queue.submit(submission("b"))
    assert (await run_one(instance)).state is State.COMPLETED


async def test_a_task_starts_in_five_seconds_with_silent_connections(
    make_instance: MakeInstance, proxy: FaultProxy
) -> None:
    instance = make_instance(url=proxy.url)
    waiting = asyncio.create_task(instance.claim())
    await instance.client_queue.submit(submission("first"))
    await waiting
    waiting = asyncio.create_task(instance.claim(60))
    await eventually(lambda: instance.connection.blocking_reads.under_way and instance.connection.subscriptions.active)
    proxy.silence()
    async with Stopwatch() as watch:
        while True:
            try:
                await instance.client_queue.submit(submission("second"))
                break
            except QueueUnavailable:
                continue
        claim = await asyncio.wait_for(waiting, 20)
        assert claim.task.id == submission("second").task_id
        assert watch.elapsed_s < 5.0


async def test_a_silent_blocked_read_is_replaced_for_an_overdue_entry(
    make_instance: MakeInstance, proxy: FaultProxy
) -> None:
    instance = make_instance(url=proxy.url)
    await eventually(lambda: instance.connection.subscriptions.active)
    waiting = asyncio.create_task(instance.claim(60))
    await eventually(lambda: instance.connection.blocking_reads.under_way)
    proxy.silence()
    instance.connection.multiplexer.abort()  # all other connections are renewed at once
    for multiplexer in instance.connection._rare:
        multiplexer.abort()
    async with Stopwatch() as watch:
        await instance.client_queue.submit(submission("overdue"))
        claim = await asyncio.wait_for(waiting, 20)
        assert claim.task.id == submission("overdue").task_id
        assert watch.elapsed_s < 5.0
