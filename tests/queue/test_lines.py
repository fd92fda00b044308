"""Lines of clients: who has many tasks does not delay the others, and no task is lost or run twice."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from random import Random

import pytest
from msgspec.structs import replace

from imagegen.errors import QueueFull
from imagegen.queue import client_queue, line_mover
from imagegen.queue.claim import Claim, StartResult
from imagegen.queue.client_queue import CacheResult
from imagegen.queue.eta import QueuePosition
from imagegen.queue.verbs import read
from imagegen.queue.verbs.list_lines import ListedLine
from imagegen.queue.verbs.list_waiting import WaitingEntryIds
from imagegen.queue.verbs.refill_lines import StoppedLine
from imagegen.tasks import transitions
from imagegen.tasks.image import StoredImage
from imagegen.tasks.submission import Submission
from imagegen.tasks.task import IN_LINE, State, Task, TaskError
from imagegen.tasks.webhook import Webhook
from tests.conftest import Instance, MakeInstance
from tests.support import eventually, submission

IMAGE = StoredImage(0, "image/png", 10, 8, 8, "a" * 64)


def submission_of(client: str, name: object) -> Submission:
    return replace(submission(f"{client}{name}"), client=client)


async def put(instance: Instance, client: str, count: int, first: int = 0) -> list[Task]:
    submissions = [submission_of(client, number) for number in range(first, first + count)]
    return [each.task for each in await asyncio.gather(*map(instance.client_queue.submit, submissions))]


async def in_stream(instance: Instance) -> int:
    return await instance.connection.commands.xlen(instance.keys.stream)


async def in_line(instance: Instance, client: str = "a") -> int:
    return await instance.connection.commands.llen(instance.keys.line(client))


async def start_one(instance: Instance, within_s: float = 0.5) -> Claim | None:
    """Start the next task; None if no task comes. A claim that comes later is the next one."""
    waiting: list[asyncio.Task[Claim | None]] = vars(instance).setdefault("claiming", [])
    claiming = waiting.pop() if waiting else asyncio.create_task(instance.worker_queue.claim())
    done, _ = await asyncio.wait([claiming], timeout=within_s)
    if not done:
        waiting.append(claiming)
        return None
    claim = claiming.result()
    assert claim is not None
    while (result := await instance.worker_queue.start(claim)) is StartResult.INHERITED:
        pass
    if result is StartResult.LOST:
        instance.worker_queue.drop(claim)
        return await start_one(instance, within_s)
    return claim


async def start_each(instance: Instance, count: int) -> list[Claim]:
    """Start as many tasks; fail if fewer come."""
    started = [claim for _ in range(count) if (claim := await start_one(instance))]
    assert len(started) == count
    return started


async def finish(instance: Instance, claim: Claim) -> Task:
    final = transitions.completed(claim.task, [IMAGE], [], now=time.time(), ttl_s=60)
    return await instance.worker_queue.finish(claim, final)


async def run(instance: Instance, started: list[str], until: int) -> None:
    """Run tasks, one at once, until a number of them has been started."""
    while len(started) < until and (claim := await start_one(instance)) is not None:
        started.append(claim.task.id)
        await finish(instance, claim)


async def run_all(*instances: Instance) -> list[str]:
    """Run tasks on every slot until no task comes, and return them in order."""
    started: list[str] = []
    slots = [run(instance, started, 10**6) for instance in instances for _ in range(instance.worker_queue.slots)]
    await asyncio.gather(*slots)
    return started


async def is_at_rest(instance: Instance) -> bool:
    redis, keys = instance.connection.commands, instance.keys
    pending = await redis.xpending(keys.stream, "pool")
    return (await redis.xlen(keys.stream), pending["pending"], await redis.exists(keys.lines)) == (0, 0, 0)


async def test_a_clients_further_tasks_wait_in_its_line_and_run_in_order(make_instance: MakeInstance) -> None:
    one = make_instance(slots=2)
    tasks = await put(one, "a", 12)
    assert (await in_stream(one), await in_line(one)) == (4, 8)
    assert [task.entry_id == IN_LINE for task in tasks] == [False] * 4 + [True] * 8
    assert {task.state for task in tasks} == {State.PENDING}
    started = await run_all(one)
    assert started == [task.id for task in tasks]
    assert await is_at_rest(one)
    assert (len(one.parts.lines), one.parts.lines.waiting) == (0, 0)


async def test_a_window_below_the_slots_limits_only_clients_with_a_key(make_instance: MakeInstance) -> None:
    one = make_instance(window=3)
    await put(one, "a", 6)
    assert await in_stream(one) == 3
    await asyncio.gather(*(one.client_queue.submit(submission(number)) for number in range(20)))
    assert await in_stream(one) == 23


@pytest.mark.parametrize("slots", [1, 5])
async def test_a_thousand_tasks_of_one_client_delay_anothers_by_one_service_time(
    make_instance: MakeInstance, slots: int
) -> None:
    one = make_instance(slots=slots, max_queue=5_000)
    await put(one, "a", 1000)
    running = await start_each(one, slots)
    (task,) = await put(one, "b", 1)
    others = await put(one, "c", 10)
    rounds = []
    for _ in range(5):
        await asyncio.gather(*(finish(one, claim) for claim in running))
        running = await start_each(one, slots)
        rounds.append([claim.task.id for claim in running])
    assert task.id in {*rounds[0], *rounds[1]}
    assert {other.id for other in others} & {*rounds[0], *rounds[1], *rounds[2]}


async def test_ten_clients_with_unequal_numbers_of_tasks_get_equal_shares(make_instance: MakeInstance) -> None:
    one = make_instance(max_queue=5_000)
    clients = {f"k{number}": 30 + 30 * number for number in range(10)}
    names = {task.id: client for client, count in clients.items() for task in await put(one, client, count)}
    started: list[str] = []
    done: Counter[str] = Counter()
    while done["k0"] < clients["k0"]:
        await run(one, started, len(started) + 1)
        done[names[started[-1]]] += 1
    shares = list(done.values())
    jain = sum(shares) ** 2 / (len(clients) * sum(share * share for share in shares))
    assert jain >= 0.98


async def test_tasks_run_on_an_instance_that_did_not_submit_them(make_instance: MakeInstance) -> None:
    one, two = make_instance(slots=1), make_instance(slots=1)
    await eventually(lambda: not one.notifier.alone and not two.notifier.alone)
    tasks = await put(one, "a", 30)
    await eventually(lambda: len(two.parts.lines) == 1)
    tasks += await put(two, "a", 10, first=30)
    assert await in_stream(one) <= 4
    one.worker_queue.quiet()
    started: list[str] = []
    await asyncio.wait_for(_drained(two, started, len(tasks)), 20)
    assert sorted(started) == sorted(task.id for task in tasks)
    await eventually(lambda: is_at_rest(two))


async def _drained(instance: Instance, started: list[str], count: int) -> None:
    while len(started) < count:
        await run(instance, started, count)


@pytest.mark.parametrize("peers", [True, False], ids=["with a peer", "alone"])
async def test_all_lines_drain_after_the_instance_that_submitted_them_was_killed(
    make_instance: MakeInstance, *, peers: bool
) -> None:
    one, two = make_instance(lease_s=0.5, slots=1), make_instance(lease_s=0.5, slots=1, start=peers)
    if peers:
        await eventually(lambda: not one.notifier.alone and not two.notifier.alone)
    tasks = await put(one, "a", 8) + await put(one, "b", 8)
    claim = await start_one(one)
    await one.crash()
    if not peers:
        two.start()
    started: list[str] = []
    await asyncio.wait_for(_drained(two, started, len(tasks)), 25)
    assert sorted(started) == sorted(task.id for task in tasks)
    assert claim is not None
    await eventually(lambda: is_at_rest(two))


async def test_a_line_moves_again_though_the_end_of_its_tasks_was_lost(make_instance: MakeInstance) -> None:
    one = make_instance(slots=1)
    tasks = await put(one, "a", 6)
    await one.crash()
    redis = one.connection.commands
    await redis.xtrim(one.keys.stream, maxlen=0)  # no task of the client is left that could move its line
    two = make_instance(slots=1)
    started: list[str] = []
    await asyncio.wait_for(_drained(two, started, 4), 20)
    assert started == [task.id for task in tasks[2:]]


async def test_lines_that_are_due_about_now_are_checked_by_one_count_of_the_stream(
    make_instance: MakeInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(line_mover, "CHECK_S", 2.0)
    one, checked = make_instance(slots=1), list[Sequence[str]]()
    list_lines = one.verbs.list_lines

    async def recorded(clients: Sequence[str]) -> list[ListedLine]:
        checked.append(clients)
        return await list_lines(clients)

    monkeypatch.setattr(one.verbs, "list_lines", recorded)
    for client in "abc":
        await put(one, client, 3)
    await eventually(lambda: list("abc") in checked)


async def test_lines_are_checked_again_soon_after_a_slow_count_of_the_stream(
    make_instance: MakeInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(line_mover, "COUNT_PAUSE", 1e9)
    monkeypatch.setattr(line_mover, "MAX_COUNT_PAUSE_S", 0.1)
    one, counts = make_instance(slots=1), list[Counter[str]]()
    await put(one, "a", 3)
    count_entries = one.verbs.count_entries

    async def recorded() -> Counter[str]:
        counts.append(await count_entries())
        return counts[-1]

    monkeypatch.setattr(one.verbs, "count_entries", recorded)
    one.parts.mover.on_doubt("a")
    await eventually(lambda: counts)
    one.parts.mover.on_doubt("a")
    await eventually(lambda: counts[1:])


async def test_a_line_that_stops_while_the_stream_is_counted_is_checked_once_more(
    make_instance: MakeInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(line_mover, "CHECK_S", 60.0)
    one = make_instance(slots=1)
    count, counted = one.verbs.count_entries, list[Counter[str]]()

    async def count_and_stop() -> Counter[str]:
        counted.append(await count())
        if len(counted) == 1:
            await one.connection.commands.xtrim(one.keys.stream, maxlen=0)
            one.verbs.lines.on_doubt("a")
        return counted[-1]

    monkeypatch.setattr(one.verbs, "count_entries", count_and_stop)
    await put(one, "a", 6)
    one.verbs.lines.on_doubt("a")

    async def is_moved() -> bool:
        return (await in_stream(one), await in_line(one)) == (2, 2)

    await eventually(is_moved)
    assert [counts["a"] for counts in counted] == [2, 0]


async def test_entries_of_a_client_are_counted_over_all_pages_of_the_stream(make_instance: MakeInstance) -> None:
    one = make_instance(window=10)
    await put(one, "a", 12)
    await asyncio.gather(*(one.client_queue.submit(submission(number)) for number in range(600)))
    await put(one, "b", 3)
    assert await one.verbs.count_entries() == {"a": 10, "b": 3}


async def test_long_lines_are_listed_in_several_short_scripts(make_instance: MakeInstance) -> None:
    one = make_instance(slots=1)
    for client in "abc":
        await put(one, client, 102)
    redis, text = one.connection.commands, "x" * 3_000
    for client in "abc":
        for _ in range(300):
            await redis.rpush(one.keys.line(client), f"1 1 ab {'0' * 32}\n{{}}\n{text}")
    listed = await one.verbs.list_lines(list("abc"))
    assert [(line.client, line.length) for line in listed] == [("a", 400)]
    assert 100 <= len(listed[0].task_ids) <= 250


async def test_a_line_that_moved_since_it_was_listed_is_not_moved_once_more(make_instance: MakeInstance) -> None:
    one = make_instance(slots=1)
    tasks = await put(one, "a", 8)
    claim = await start_one(one)
    assert claim is not None
    await finish(one, claim)
    stale, right = (StoppedLine("a", 2, task.id) for task in tasks[2:4])
    (kept,) = await one.verbs.refill_lines([stale])
    assert (kept.moved, await in_stream(one), await in_line(one)) == ((), 2, 5)
    (moved,) = await one.verbs.refill_lines([right])
    assert [task_id for task_id, _ in moved.moved] == [task.id for task in tasks[3:5]]


async def test_a_cancelled_task_of_a_line_never_runs_and_delays_no_other(make_instance: MakeInstance) -> None:
    one = make_instance(slots=1)
    tasks = await put(one, "a", 6)
    for task in tasks[2:5]:
        cancelled = await one.cancel(task.id)
        assert cancelled is not None
        assert cancelled.state is State.CANCELLED
    assert await run_all(one) == [tasks[0].id, tasks[1].id, tasks[5].id]
    assert await is_at_rest(one)


async def test_the_cancel_of_a_task_in_the_stream_moves_the_next_one(make_instance: MakeInstance) -> None:
    one = make_instance(slots=1)
    tasks = await put(one, "a", 3)
    await one.client_queue.cancel(tasks[0].id)
    assert (await in_stream(one), await in_line(one)) == (2, 0)
    assert await run_all(one) == [tasks[1].id, tasks[2].id]


async def test_a_task_of_a_line_that_was_cancelled_and_submitted_again_runs_once(make_instance: MakeInstance) -> None:
    one = make_instance(slots=1)
    tasks = await put(one, "a", 4)
    await one.client_queue.cancel(tasks[2].id)
    again = await one.client_queue.submit(submission_of("a", 2))
    assert again.cached is CacheResult.MISS
    assert again.task.sequence > tasks[2].sequence
    assert await run_all(one) == [tasks[0].id, tasks[1].id, tasks[3].id, tasks[2].id]


async def test_a_task_in_a_line_is_joined_and_cancelled_on_another_instance(make_instance: MakeInstance) -> None:
    one, two = make_instance(slots=1), make_instance(slots=1, start=False)
    tasks = await put(one, "a", 4)
    joined = await two.client_queue.submit(submission_of("a", 3))
    assert joined.cached is CacheResult.COALESCED
    assert joined.task.epoch == tasks[3].epoch
    cancelled = await two.cancel(tasks[3].id)
    assert cancelled is not None
    assert cancelled.request_json == tasks[3].request_json
    assert await run_all(one) == [task.id for task in tasks[:3]]


async def test_a_cancel_reads_a_long_line_in_pages_and_only_where_the_request_is_not_in_memory(
    make_instance: MakeInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read, "PAGE_ELEMENTS", 4)
    one, two = make_instance(slots=1), make_instance(slots=1, start=False)
    tasks = await put(one, "a", 14)
    assert await in_line(one) == 12

    async def reads_of_cancel(instance: Instance, task: Task) -> int:
        commands = instance.connection.meter.commands
        before = commands["read"]
        cancelled = await instance.cancel(task.id)
        assert cancelled is not None
        assert cancelled.request_json == task.request_json
        return commands["read"] - before

    of_record = 1
    assert await reads_of_cancel(two, tasks[13]) == of_record + 2
    assert await reads_of_cancel(two, tasks[2]) == of_record + 3 * 2
    assert await reads_of_cancel(one, tasks[3]) <= of_record


async def test_webhooks_that_were_added_to_a_task_of_a_line_are_kept(make_instance: MakeInstance) -> None:
    one = make_instance(slots=1)
    tasks = await put(one, "a", 3)
    hooked = replace(submission_of("a", 2), webhooks=(Webhook("https://example.com/hook", "https://example.com"),))
    await one.client_queue.add_webhooks(hooked, await one.client_queue.submit(hooked))
    assert await run_all(one) == [task.id for task in tasks]
    assert await one.connection.commands.zcard(one.keys.outbox) == 1


@pytest.mark.parametrize("lost", ["line", "record", "both"])
async def test_a_task_is_queued_again_once_after_redis_lost_its_line_or_record(
    make_instance: MakeInstance, lost: str
) -> None:
    one = make_instance(slots=1)
    tasks = await put(one, "a", 5)
    redis = one.connection.commands
    if lost != "record":
        await redis.delete(one.keys.line("a"))
    if lost != "line":
        await redis.delete(*(one.keys.record(task.id) for task in tasks[2:]))
    one.parts.recovery.notice("a test", publish=True)
    started: list[str] = []
    await asyncio.wait_for(_drained(one, started, len(tasks)), 20)
    await run(one, started, len(tasks) + 1)
    assert sorted(started) == sorted(task.id for task in tasks)


async def test_a_lost_line_is_noticed_when_it_is_read(make_instance: MakeInstance) -> None:
    one = make_instance(slots=1)
    tasks = await put(one, "a", 5)
    await one.connection.commands.delete(one.keys.line("a"))
    started: list[str] = []
    await asyncio.wait_for(_drained(one, started, len(tasks)), 20)
    assert sorted(started) == sorted(task.id for task in tasks)


async def test_a_repeat_queues_a_task_again_if_its_line_is_lost(make_instance: MakeInstance) -> None:
    one = make_instance(slots=1)
    tasks = await put(one, "a", 3)
    await one.crash()
    await one.connection.commands.delete(one.keys.line("a"))
    two = make_instance(slots=1)
    again = await two.client_queue.submit(submission_of("a", 2))
    assert again.cached is CacheResult.MISS
    started: list[str] = []
    await run(two, started, 3)
    assert sorted(started) == sorted(task.id for task in tasks)


async def test_a_task_that_waits_in_a_line_until_its_deadline_fails(make_instance: MakeInstance) -> None:
    one = make_instance(slots=1, deadline_s=0.3)
    tasks = await put(one, "a", 4)

    async def has_failed() -> bool:
        return (await one.task(tasks[3].id)).state is State.FAILED

    await eventually(has_failed)
    failed = await one.task(tasks[3].id)
    assert failed.error is not None
    assert failed.error.code == "upstream_timeout"


async def test_positions_count_the_stream_the_own_line_and_as_many_of_each_other_line(
    make_instance: MakeInstance,
) -> None:
    one = make_instance(slots=1, start=False)
    await one.verbs.create_group()
    await one.client_queue.refresh_positions()
    a, b = await put(one, "a", 6), await put(one, "b", 4)

    async def positions(tasks: Sequence[Task]) -> list[int | None]:
        return [(await one.client_queue.position(await one.task(task.id))).position for task in tasks]

    assert await positions(a) == [1, 2, 6, 8, 9, 10]
    assert await positions(b) == [3, 4, 6, 8]
    await one.client_queue.cancel(a[2].id)
    assert await positions(a[3:]) == [6, 8, 9]
    assert await one.client_queue.position(await one.task(a[2].id)) == QueuePosition()


async def test_positions_are_right_after_a_restart(make_instance: MakeInstance) -> None:
    one = make_instance(slots=1)
    tasks = await put(one, "a", 6)
    await one.crash()
    two = make_instance(slots=1)
    await eventually(lambda: len(two.parts.lines) == 1 and two.parts.lines.waiting == 4)
    place = await two.client_queue.position(await two.task(tasks[4].id))
    assert place.position == 5


@pytest.mark.parametrize(("age_per_line_s", "reads"), [(0.0, 3), (1_000.0, 1)], ids=["few lines", "many lines"])
async def test_positions_are_read_less_often_the_more_lines_there_are(
    make_instance: MakeInstance, monkeypatch: pytest.MonkeyPatch, age_per_line_s: float, reads: int
) -> None:
    monkeypatch.setattr(client_queue, "POSITIONS_MAX_AGE_S", -1.0)
    monkeypatch.setattr(client_queue, "POSITIONS_AGE_PER_LINE_S", age_per_line_s)
    one, listed = make_instance(slots=1), 0
    make_instance(slots=1)
    await eventually(lambda: one.parts.notifier.peers)
    tasks, list_waiting = await put(one, "a", 6), one.verbs.list_waiting

    async def counted() -> WaitingEntryIds:
        nonlocal listed
        listed += 1
        return await list_waiting()

    monkeypatch.setattr(one.verbs, "list_waiting", counted)
    await one.client_queue.refresh_positions()
    for _ in range(2):
        await one.client_queue.position(tasks[5])
    assert listed == reads


async def test_the_queue_takes_no_more_than_max_queue_tasks_with_those_in_lines(make_instance: MakeInstance) -> None:
    one = make_instance(slots=1, max_queue=6, start=False)
    await one.verbs.create_group()
    for number in range(6):
        await one.client_queue.submit(submission_of("a", number))
    assert (await one.parts.monitor.waiting()).depth == 6
    with pytest.raises(QueueFull):
        await one.client_queue.submit(submission_of("b", 0))


async def test_keys_of_another_type_are_moved_aside(make_instance: MakeInstance) -> None:
    one = make_instance(slots=1)
    await one.connection.commands.set(one.keys.line("a"), "foreign")
    await one.connection.commands.set(one.keys.lines, "foreign")
    tasks = await put(one, "a", 4)
    assert await run_all(one) == [task.id for task in tasks]
    assert await one.connection.commands.get(f"{one.keys.line('a')}:aside") == b"foreign"


class Disorder:
    """Random use of two instances, of which one dies now and then, by clients with more tasks than their windows."""

    def __init__(self, make_instance: MakeInstance, seed: int) -> None:
        self._make_instance = make_instance
        self.random = Random(seed)
        self.instances = [self._make(), self._make()]
        self.starts: Counter[tuple[str, int]] = Counter()
        self.cut_off: set[tuple[str, int]] = set()
        self.accepted: set[str] = set()

    def _make(self) -> Instance:
        return self._make_instance(slots=1, lease_s=0.4)

    async def submit(self) -> None:
        instance, client = self.random.choice(self.instances), self.random.choice("ab")
        names = self.random.sample(range(25), 6)
        for answer in await asyncio.gather(
            *(instance.client_queue.submit(submission_of(client, name)) for name in names)
        ):
            self.accepted.add(answer.task.id)

    async def cancel(self) -> None:
        if self.accepted:
            task_id = self.random.choice(sorted(self.accepted))
            await self.random.choice(self.instances).client_queue.cancel(task_id)

    async def run(self, *, fails: bool = False) -> bool:
        instance = self.random.choice(self.instances)
        claim = await start_one(instance, 0.05)
        if claim is None:
            return False
        self.starts[claim.task.id, claim.task.epoch] += 1
        if fails:
            error = TaskError("upstream_error", "no", retryable=True)
            await instance.worker_queue.finish(claim, transitions.failed(claim.task, error, now=time.time(), ttl_s=60))
        else:
            await finish(instance, claim)
        return True

    async def kill(self) -> None:
        """Kill an instance, perhaps while it runs a task."""
        killed = self.random.randrange(2)
        claim = await start_one(self.instances[killed], 0.05) if self.random.random() < 0.5 else None
        if claim is not None:
            self.starts[claim.task.id, claim.task.epoch] += 1
            self.cut_off.add((claim.task.id, claim.task.epoch))
        await self.instances[killed].crash()
        self.instances[killed] = self._make()

    async def are_all_final(self) -> bool:
        await self.run()
        instance = self.instances[0]
        tasks = [await instance.client_queue.read(task_id) for task_id in self.accepted]
        return all(task is not None and task.state.is_final for task in tasks)


@pytest.mark.parametrize("seed", range(3))
async def test_each_task_ends_and_starts_once_in_any_disorder(make_instance: MakeInstance, seed: int) -> None:
    disorder = Disorder(make_instance, seed)
    steps: list[Callable[[], Awaitable[object]]] = [
        disorder.submit,
        disorder.cancel,
        disorder.run,
        disorder.run,
        partial(disorder.run, fails=True),
    ]
    for step in range(60):
        await (disorder.kill() if step in (20, 40) else disorder.random.choice(steps)())
    await eventually(disorder.are_all_final, 30)
    started_twice = {task for task, count in disorder.starts.items() if count > 1}
    assert started_twice <= disorder.cut_off
    await eventually(lambda: is_at_rest(disorder.instances[0]))
