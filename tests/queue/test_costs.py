"""Cost of each verb in Redis commands: the meter against the counters of the server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

import pytest
from msgspec.structs import replace

from imagegen.accounts.counts import Counts, RowName
from imagegen.accounts.usage_store import UsageStore
from imagegen.errors import BudgetExceeded, QueueFull
from imagegen.queue.claim import StartResult
from imagegen.queue.client_queue import CacheResult
from imagegen.queue.monitor import QueueMonitor
from imagegen.queue.verbs.release import release_item
from imagegen.tasks import transitions
from imagegen.tasks.cost import Cost
from imagegen.tasks.family import RequestFamily, ReusedImages
from imagegen.tasks.provider_job import AcceptedJob, JobHandle
from imagegen.tasks.retry import Retry
from imagegen.tasks.submission import Submission
from imagegen.tasks.task import Task, TaskError, WaitReason
from tests.conftest import Instance, MakeInstance
from tests.queue.command_counts import CommandCount, claim, finished, put, started
from tests.support import eventually, family_submission, submission

Verb = Callable[..., Awaitable[object]]


@pytest.fixture
async def one(make_instance: MakeInstance) -> Instance:
    """Return an instance without background loops and with its consumer group."""
    instance = make_instance(start=False, max_queue=3)
    await instance.verbs.create_group()
    return instance


async def submit_new(instance: Instance) -> None:
    await put(instance, "a", "b")


async def submit_known(instance: Instance) -> None:
    (task,) = await put(instance, "a")
    assert (await instance.verbs.submit(replace(task, epoch=task.epoch + 1))).kind == "known"


async def submit_repeated(instance: Instance) -> None:
    (task,) = await put(instance, "a")
    assert (await instance.verbs.submit(task)).kind == "new"


async def submit_again(instance: Instance) -> None:
    (each,) = await started(instance, "a")
    error = TaskError("upstream_error", "no", retryable=True)
    await instance.worker_queue.finish(each, transitions.failed(each.task, error, now=time.time(), ttl_s=60))
    await put(instance, "a")


async def submit_over_the_limit(instance: Instance) -> None:
    await put(instance, "a", "b", "c")
    with pytest.raises(QueueFull):
        await put(instance, "d")


async def submit_with_siblings(instance: Instance) -> None:
    async def reuse(_task_id: str, family: RequestFamily, finished: Sequence[Task]) -> ReusedImages:
        images = finished[0].images[: family.request.n]
        return ReusedImages(tuple(replace(image, reused=True) for image in images))

    submissions = [family_submission(prompt, 2) for prompt in ("a", "b")]
    await asyncio.gather(*(instance.client_queue.submit(each, reuse) for each in submissions))
    claims = await claim(instance)
    await asyncio.gather(*map(instance.worker_queue.start, claims))
    await finished(instance, *claims)
    assert (await instance.client_queue.submit(family_submission("a", 1), reuse)).cached is CacheResult.HIT
    (task,) = [(await instance.client_queue.submit(family_submission("a", 4), reuse)).task]
    assert len(task.images) == 1
    for n in (1, 2, 4):
        instance.task_cache.forget(family_submission("a", n).task_id)
        known = await instance.client_queue.submit(family_submission("a", n), reuse)
        assert known.cached in (CacheResult.HIT, CacheResult.COALESCED)
    await put(instance, "c", "d")
    with pytest.raises(QueueFull):
        await instance.client_queue.submit(family_submission("e", 1), reuse)


async def start_and_finish(instance: Instance) -> None:
    await finished(instance, *await started(instance, "a", "b"))


async def finish_late(instance: Instance) -> None:
    (each,) = await started(instance, "a")
    await finished(instance, each)
    await finished(instance, each)


async def retry(instance: Instance) -> None:
    (each,) = await started(instance, "a")
    await instance.worker_queue.retry(each, Retry(60.0, WaitReason.RETRYING))
    assert await instance.worker_queue.start(each) is StartResult.STARTED


async def cancel(instance: Instance) -> None:
    (task,) = await put(instance, "a")
    await instance.client_queue.cancel(task.id)


async def keep_a_handle(instance: Instance) -> None:
    (each,) = await started(instance, "a")
    before = instance.connection.meter.commands.total()
    each.checkpoint = each.checkpoint.with_job(AcceptedJob(JobHandle("fal", "1"), (0,)))
    assert await instance.worker_queue.record_job(each, each.checkpoint)
    assert instance.connection.meter.commands.total() == before + 1


async def take_given(instance: Instance) -> None:
    entry_ids = [each.entry_id for each in await started(instance, "a", "b")]
    assert len(await instance.verbs.take_given("i", "other", entry_ids)) == 2
    assert await instance.verbs.take_given("i", "other", entry_ids) == []


async def take_found_job(instance: Instance) -> None:
    a, b = await started(instance, "a", "b")
    b.checkpoint = b.checkpoint.with_job(AcceptedJob(JobHandle("replicate", "of_b"), (0,)))
    assert await instance.worker_queue.record_job(b, b.checkpoint)
    take = instance.worker_queue.take_found_job
    of_b, new = (JobHandle("replicate", name, accepted_at=time.time()) for name in ("of_b", "new"))
    assert [await take(a, of_b), await take(a, new), await take(a, new), await take(b, new)] == [
        False,
        True,
        True,
        False,
    ]
    assert await take(a, JobHandle("replicate", "old", accepted_at=time.time() - 3_600))


async def cancel_a_job(instance: Instance) -> None:
    async def confirm(_handle: JobHandle) -> bool:
        return True

    instance.client_queue.canceller.cancel_upstream = confirm
    instance.client_queue.limits.of_others = ((0, 1400),)
    await instance.client_queue.submit(priced("a"))
    (each,) = await claim(instance)
    each.checkpoint = replace(each.checkpoint, cost=each.cost.before_call(700))
    await instance.worker_queue.start(each)
    each.checkpoint = each.checkpoint.with_job(AcceptedJob(JobHandle("fal", "1"), (0,)))
    await instance.worker_queue.record_job(each, each.checkpoint)
    assert (await instance.cancel(each.task.id)).cancelled_upstream


async def join_and_leave(instance: Instance) -> None:
    (task,) = await put(instance, "a")
    for client in ("one", "two", "two"):
        assert await instance.client_queue.join(task, client)
    for client in ("two", "two", "stranger"):
        assert (await instance.client_queue.cancel_by(client, task.id)).left
    assert not (await instance.client_queue.cancel_by("one", task.id)).left
    assert not await instance.client_queue.join(task, "two")


def priced(name: object) -> Submission:
    return replace(submission(name), cost=Cost(700))


async def submit_under_a_budget(instance: Instance) -> None:
    instance.client_queue.limits.of_others = ((0, 1400),)
    submits = (instance.client_queue.submit(priced(name)) for name in ("a", "b", "c"))
    *_, refusal = await asyncio.gather(*submits, return_exceptions=True)
    assert isinstance(refusal, BudgetExceeded)
    await instance.client_queue.cancel(submission("b").task_id)
    (each,) = await claim(instance)
    each.checkpoint = replace(each.checkpoint, cost=each.cost.before_call(700))
    await instance.worker_queue.start(each)
    assert await instance.worker_queue.reserve_more(each, 700, ((0, 1400),))
    assert not await instance.worker_queue.reserve_more(each, 700, ((0, 1400),))
    await finished(instance, each)


async def renew(instance: Instance) -> None:
    await started(instance, "a", "b")
    await instance.verbs.renew(instance.parts.monitor.instance, [])
    entries = [(row.entry_id, row.consumer) for row in await instance.verbs.pending_entries()]
    await instance.verbs.renew("i", [("0" * 32, entry_id) for entry_id, _ in entries])
    await instance.verbs.renew("i", [("", entry_id) for entry_id, _ in entries])


async def take_over(instance: Instance) -> None:
    await started(instance, "a")
    rows = await instance.verbs.pending_entries()
    assert await instance.verbs.claim_expired("other", [row.entry_id for row in rows], 0.0)
    await instance.verbs.read_checkpoints(["0" * 32])


async def release(instance: Instance) -> None:
    (each,) = await started(instance, "a")
    await put(instance, "b")
    (fresh,) = await claim(instance)
    assert await instance.verbs.release("i", [release_item(each), release_item(fresh)], leaving=True) == 2
    again = await claim(instance)
    assert await instance.verbs.release("i", [release_item(each) for each in again], leaving=True) == 2


async def read(instance: Instance) -> None:
    await asyncio.gather(instance.client_queue.get("0" * 32), instance.client_queue.get("1" * 32))
    await instance.client_queue.refresh_positions()


async def dead_letter(instance: Instance) -> None:
    entry_id = await instance.connection.commands.xadd(instance.keys.stream, {"v": "x"})
    instance.connection.meter.redis_commands_sent("other", 1)
    assert await claim(instance) == []
    assert instance.connection.meter.dead_letters == 1
    assert not await instance.connection.commands.xrange(instance.keys.stream, entry_id, entry_id)
    instance.connection.meter.redis_commands_sent("other", 1)


async def look(instance: Instance) -> None:
    backlog: QueueMonitor = instance.parts.monitor
    instance.notifier.add_peer("other")
    await started(instance, "a")
    await put(instance, "b")
    assert (await backlog.waiting()).depth == 1
    assert await backlog.dead_letters() == 0


async def report_usage(instance: Instance) -> None:
    store, rows = UsageStore(instance.connection, instance.keys), {RowName("ann", "m"): Counts(spent=708)}
    assert await store.add(20_000, "writer", rows, below=1, mark=1) == 0
    assert await store.add(20_000, "writer", rows, below=2, mark=2) == 1
    assert await store.add(20_000, "writer", rows, below=2, mark=2) == 2
    assert await store.mark(20_000, "writer") == 2
    parts = [part.rows for day in (20_000, 20_001) async for part in store.read(day)]
    assert parts == [{RowName("ann", "m"): Counts(spent=1416)}, {}]
    await instance.verbs.read_budgets(20_000)


VERBS = [submit_new, submit_known, submit_repeated, submit_again, submit_over_the_limit, start_and_finish, finish_late]

VERBS += [
    submit_under_a_budget,
    submit_with_siblings,
    retry,
    cancel,
    cancel_a_job,
    keep_a_handle,
    join_and_leave,
    renew,
    take_over,
    take_given,
    take_found_job,
    release,
    read,
    dead_letter,
    report_usage,
    look,
]


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.__name__)
async def test_the_meter_counts_the_commands_of_a_verb(one: Instance, verb: Verb) -> None:
    async with CommandCount(one) as commands:
        await verb(one)
    assert commands.metered == commands.counted


async def test_a_budget_costs_one_command_for_each_batch_of_submits(make_instance: MakeInstance) -> None:
    one = make_instance(start=False)
    await one.verbs.create_group()
    one.client_queue.limits.of_others = ((0, 10**9), (5, 10**9))

    async def commands_of(*names: object) -> int:
        submissions = [replace(priced(name), cost=Cost(700)) for name in names]
        async with CommandCount(one) as commands:
            await asyncio.gather(*map(one.client_queue.submit, submissions))
        return commands.counted

    assert await commands_of("first") == 1 + 2 + 2  # the life of the budgets, once
    assert await commands_of("second") == 1 + 2 + 1
    assert await commands_of("third", "fourth") == 1 + 2 * 2 + 1
    claims = await claim(one)
    for each in claims:
        each.checkpoint = replace(each.checkpoint, cost=each.cost.before_call(700).paid(700))
        await one.worker_queue.start(each)
    async with CommandCount(one) as commands:
        await finished(one, *claims)
    assert commands.counted == 2 + 2 * len(claims)


async def test_the_meters_of_two_busy_instances_are_within_3_percent(make_instance: MakeInstance) -> None:
    one, two = make_instance(lease_s=0.3), make_instance(lease_s=0.3)
    await eventually(lambda: not one.notifier.alone and not two.notifier.alone)

    async def run(instance: Instance) -> None:
        while (each := await instance.worker_queue.claim()) is not None:
            await instance.worker_queue.start(each)
            await asyncio.sleep(0.01)
            await finished(instance, each)

    async with CommandCount(one, two) as commands:
        loops = [asyncio.create_task(run(instance)) for instance in (one, two) for _ in range(2)]
        tasks = [task for instance in (one, two) for task in await put(instance, *range(60))]
        for task in tasks:
            await eventually(partial(_is_final, two, task.id))
        for loop in loops:
            loop.cancel()
        await asyncio.gather(*loops, return_exceptions=True)
    assert commands.counted > 60 * 4
    assert abs(commands.metered - commands.counted) <= 0.03 * commands.counted
    assert one.connection.meter.tasks.total() + two.connection.meter.tasks.total() == 60


async def _is_final(instance: Instance, task_id: str) -> bool:
    task = await instance.client_queue.get(task_id)
    return task is not None and task.state.is_final
