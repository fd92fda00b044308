"""Lines of clients: who has many tasks does not delay the others; order, shares and positions."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence

import pytest
from msgspec.structs import replace

from imagegen.errors import QueueFull
from imagegen.queue import client_queue, line_mover
from imagegen.queue.claim import Claim
from imagegen.queue.eta import QueuePosition
from imagegen.queue.verbs.list_lines import ListedLine
from imagegen.queue.verbs.list_waiting import WaitingEntryIds
from imagegen.queue.verbs.refill_lines import StoppedLine
from imagegen.tasks.task import IN_LINE, State, Task
from imagegen.tasks.webhook import Webhook
from tests.conftest import Instance, MakeInstance
from tests.queue.line_tasks import (
    drained,
    finish,
    in_line,
    in_stream,
    is_at_rest,
    put,
    run,
    run_all,
    start_one,
    submission_of,
)
from tests.support import eventually, submission


async def start_each(instance: Instance, count: int) -> list[Claim]:
    """Start as many tasks; fail if fewer come."""
    started = [claim for _ in range(count) if (claim := await start_one(instance))]
    assert len(started) == count
    return started


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
    await asyncio.wait_for(drained(two, started, len(tasks)), 20)
    assert sorted(started) == sorted(task.id for task in tasks)
    await eventually(lambda: is_at_rest(two))


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
    (kept,), _ = await one.verbs.refill_lines([stale])
    assert (kept.moved, await in_stream(one), await in_line(one)) == ((), 2, 5)
    (moved,), _ = await one.verbs.refill_lines([right])
    assert [task_id for task_id, _ in moved.moved] == [task.id for task in tasks[3:5]]


async def test_webhooks_that_were_added_to_a_task_of_a_line_are_kept(make_instance: MakeInstance) -> None:
    one = make_instance(slots=1)
    tasks = await put(one, "a", 3)
    hooked = replace(submission_of("a", 2), webhooks=(Webhook("https://example.com/hook", "https://example.com"),))
    await one.client_queue.add_webhooks(hooked, await one.client_queue.submit(hooked))
    assert await run_all(one) == [task.id for task in tasks]
    assert await one.connection.commands.zcard(one.keys.outbox) == 1


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


async def test_a_position_waits_for_the_read_of_positions_that_is_under_way(
    make_instance: MakeInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = make_instance(slots=1)
    tasks = await put(one, "a", 6)
    await one.crash()
    two, may_list = make_instance(slots=1, start=False), asyncio.Event()
    list_waiting = two.verbs.list_waiting

    async def held() -> WaitingEntryIds:
        await may_list.wait()
        return await list_waiting()

    monkeypatch.setattr(two.verbs, "list_waiting", held)
    two.start()
    await eventually(lambda: len(two.parts.lines) == 1 and two.parts.lines.waiting == 4)
    position = asyncio.create_task(two.client_queue.position(await two.task(tasks[4].id)))
    await two.task(tasks[4].id)
    may_list.set()
    assert (await position).position == 5


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
        await one.client_queue.submit(submission_of("a", 6))


async def test_a_key_that_fills_the_queue_keeps_no_other_one_from_its_share(make_instance: MakeInstance) -> None:
    one = make_instance(slots=1, max_queue=6, start=False)
    await one.verbs.create_group()
    await put(one, "a", 6)
    results = await asyncio.gather(
        *(one.client_queue.submit(submission_of(client, number)) for number in range(3) for client in "ab"),
        return_exceptions=True,
    )
    assert [type(result) is QueueFull for result in results] == [False, False, False, False, False, True]
    assert (await in_stream(one), await in_line(one)) == (4, 4)
    await put(one, "c", 2)
    with pytest.raises(QueueFull):
        await one.client_queue.submit(submission_of("d", 0))
