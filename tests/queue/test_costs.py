"""Cost of each verb in Redis commands: the meter against the counters of a real server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Self

import pytest
from msgspec.structs import replace

from imagegen.accounts.counts import Counts, RowName
from imagegen.accounts.usage_store import UsageStore
from imagegen.errors import BudgetExceeded, QueueFull
from imagegen.queue.claim import Claim, StartResult
from imagegen.queue.client_queue import CacheResult
from imagegen.queue.monitor import BacklogSize, QueueMonitor
from imagegen.queue.verbs.refill_lines import StoppedLine
from imagegen.queue.verbs.release import release_item
from imagegen.tasks import transitions
from imagegen.tasks.cost import Cost
from imagegen.tasks.family import RequestFamily, ReusedImages
from imagegen.tasks.image import StoredImage
from imagegen.tasks.provider_job import AcceptedJob, JobHandle
from imagegen.tasks.retry import Retry
from imagegen.tasks.submission import Submission
from imagegen.tasks.task import IN_LINE, Task, TaskError, WaitReason
from tests.conftest import Instance, MakeInstance
from tests.support import eventually, family_submission, submission

IMAGE = StoredImage(0, "image/png", 10, 8, 8, "a" * 64)
NOT_COUNTED = {"info", "ping", "hello", "auth", "select", "config", "client", "script"}


async def server_count(instance: Instance) -> int:
    """Return the number of commands that the server ran, without NOSCRIPT replies and those Upstash does not bill."""
    stats = await instance.connection.commands.info("commandstats")
    return sum(
        row["calls"] - (row["failed_calls"] if name == "cmdstat_evalsha" else 0)
        for name, row in stats.items()
        if name.removeprefix("cmdstat_").split("|")[0] not in NOT_COUNTED
    )


class CommandCount:
    """Commands within a block; metered: by our meters, counted: by the server."""

    def __init__(self, *instances: Instance) -> None:
        self._instances = instances

    def _meters(self) -> int:
        return sum(instance.connection.meter.commands.total() for instance in self._instances)

    async def __aenter__(self) -> Self:
        self._before = self._meters(), await server_count(self._instances[0])
        return self

    async def __aexit__(self, *_: object) -> None:
        self.metered = self._meters() - self._before[0]
        self.counted = await server_count(self._instances[0]) - self._before[1]


@pytest.fixture
async def one(make_instance: MakeInstance) -> Instance:
    """Return an instance without background loops and with its consumer group."""
    instance = make_instance(start=False, max_queue=3)
    await instance.verbs.create_group()
    return instance


async def put(instance: Instance, *names: object) -> list[Task]:
    return [
        answer.task for answer in await asyncio.gather(*(instance.client_queue.submit(submission(n)) for n in names))
    ]


async def claim(instance: Instance) -> list[Claim]:
    entries = await instance.verbs.read_entries("i", 10, 0.01)
    return await instance.parts.leases.hold(entries)


async def started(instance: Instance, *names: object) -> list[Claim]:
    await put(instance, *names)
    claims = await claim(instance)
    for each in claims:
        assert await instance.worker_queue.start(each) is StartResult.STARTED
    return claims


def completed(task: Task) -> Task:
    return transitions.completed(task, [IMAGE], [], now=time.time(), ttl_s=60)


async def finished(instance: Instance, *claims: Claim) -> None:
    await asyncio.gather(*(instance.worker_queue.finish(each, completed(each.task)) for each in claims))


Verb = Callable[..., Awaitable[object]]


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


def submissions_of(client: str, *names: object) -> list[Submission]:
    return [replace(submission(f"{client}{name}"), client=client) for name in names]


async def put_for(instance: Instance, client: str, *names: object, together: bool = True) -> list[Task]:
    if together:
        return [
            each.task
            for each in await asyncio.gather(*map(instance.client_queue.submit, submissions_of(client, *names)))
        ]
    return [(await instance.client_queue.submit(each)).task for each in submissions_of(client, *names)]


async def run_one_by_one(instance: Instance, count: int) -> None:
    for _ in range(count):
        entries = await instance.verbs.read_entries("i", 1, 0.01)
        (each,) = await instance.parts.leases.hold(entries)
        assert await instance.worker_queue.start(each) is StartResult.STARTED
        await finished(instance, each)


async def test_the_meter_counts_the_commands_of_lines(make_instance: MakeInstance) -> None:
    one = make_instance(start=False, slots=1)
    await one.verbs.create_group()
    async with CommandCount(one) as commands:
        tasks = await put_for(one, "a", *range(8))
        tasks += await put_for(one, "b", *range(4), together=False)
        await one.client_queue.cancel(tasks[0].id)
        await one.client_queue.cancel(tasks[5].id)
        one.task_cache.forget(tasks[6].id)
        assert (await put_for(one, "a", 6))[0].entry_id == IN_LINE
        await one.parts.mover.read_all()
        listed = await one.parts.mover.read(["a", "b", "c"])
        assert await one.verbs.count_entries() == {"a": 2, "b": 2}
        stopped = [StoppedLine(line.client, 1, line.task_ids[0]) for line in listed if line.length]
        for line, moved in zip(stopped, await one.verbs.refill_lines(stopped), strict=True):
            one.verbs.lines.left(line.client, moved)
        await run_one_by_one(one, 10)
    assert commands.metered == commands.counted


@pytest.mark.parametrize(("together", "most"), [(True, 2.0), (False, 3.0)], ids=["together", "one by one"])
async def test_a_task_in_a_line_costs_two_commands_more_and_another_task_none(
    make_instance: MakeInstance, *, together: bool, most: float
) -> None:
    counts = []
    for client, slots in (("", 1), ("many slots", 50), ("one slot", 1)):
        instance = make_instance(start=False, slots=slots, window=100)
        await instance.verbs.create_group()
        async with CommandCount(instance) as commands:
            await put_for(instance, client, *range(22), together=together)
            await run_one_by_one(instance, 22)
        counts.append(commands.counted)
    assert counts[1] == counts[0]
    begin_and_end = 4  # RPUSH and SADD; LPOP and SREM
    assert counts[2] - counts[0] <= 20 * most + begin_and_end


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


async def test_attempts_waits_and_outcomes_are_counted(make_instance: MakeInstance) -> None:
    instance = make_instance(start=False)
    await instance.verbs.create_group()
    await put(instance, "a")
    instance.parts.dispatcher.put(*await claim(instance))
    each = await instance.claim()
    assert await instance.worker_queue.start(each) is StartResult.STARTED
    assert instance.parts.monitor.local_status().in_flight == 1
    await instance.worker_queue.retry(each, Retry(60.0, WaitReason.RETRYING))
    assert instance.parts.monitor.local_status().retrying == 1
    assert await instance.worker_queue.start(each) is StartResult.STARTED
    await finished(instance, each)
    await put(instance, "a")
    meter = instance.connection.meter
    assert {outcome: histogram.count for outcome, histogram in meter.attempts.items()} == {"retry": 1, "completed": 1}
    assert meter.waits.count == 1
    assert meter.finished_by_state() == {"completed": 1, "failed": 0, "cancelled": 0}
    assert (meter.submits["MISS"], meter.submits["HIT"]) == (1, 1)
    assert (meter.images, meter.image_bytes) == (1, 10)


async def test_takeovers_and_possible_double_payments_are_counted(make_instance: MakeInstance) -> None:
    one = make_instance(lease_s=0.3)
    await one.client_queue.submit(submission("a"))
    each = await one.claim()
    assert await one.worker_queue.start(each) is StartResult.STARTED
    await one.crash()
    two = make_instance(lease_s=0.3)
    await two.claim()
    meter = two.connection.meter
    assert (meter.takeovers, meter.ambiguous) == (1, 1)


async def test_a_call_that_shutdown_interrupts_is_ambiguous(make_instance: MakeInstance) -> None:
    instance = make_instance(start=False)
    await instance.verbs.create_group()
    await started(instance, "a")
    await put(instance, "b")
    await claim(instance)
    await instance.worker_queue.release(list(instance.parts.dispatcher.held.values()))
    assert instance.connection.meter.ambiguous == 1
