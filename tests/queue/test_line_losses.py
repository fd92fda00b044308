"""Lines after an instance was killed, or after Redis lost a line, a record or an end."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from imagegen.queue.client_queue import CacheResult
from imagegen.tasks.task import IN_LINE
from tests.conftest import MakeInstance
from tests.queue.line_tasks import drained, in_line, is_at_rest, put, run, run_all, start_one, submission_of
from tests.support import eventually


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
    await asyncio.wait_for(drained(two, started, len(tasks)), 25)
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
    await asyncio.wait_for(drained(two, started, 4), 20)
    assert started == [task.id for task in tasks[2:]]


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
    await asyncio.wait_for(drained(one, started, len(tasks)), 20)
    await run(one, started, len(tasks) + 1)
    assert sorted(started) == sorted(task.id for task in tasks)


async def test_a_lost_line_is_noticed_when_it_is_read(make_instance: MakeInstance) -> None:
    one = make_instance(slots=1)
    tasks = await put(one, "a", 5)
    await one.connection.commands.delete(one.keys.line("a"))
    started: list[str] = []
    await asyncio.wait_for(drained(one, started, len(tasks)), 20)
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


async def test_keys_of_another_type_are_moved_aside(make_instance: MakeInstance) -> None:
    one = make_instance(slots=1)
    await one.connection.commands.set(one.keys.line("a"), "foreign")
    await one.connection.commands.set(one.keys.lines, "foreign")
    tasks = await put(one, "a", 4)
    assert await run_all(one) == [task.id for task in tasks]
    assert await one.connection.commands.get(f"{one.keys.line('a')}:aside") == b"foreign"


async def test_a_long_line_is_read_in_parts_after_redis_lost_some_of_it(make_instance: MakeInstance) -> None:
    one = make_instance(slots=1)
    redis, line = one.connection.commands, one.keys.line("a")
    prompts = ["x" * 20_000 + str(number) for number in range(160)]
    await asyncio.gather(*(one.client_queue.submit(submission_of("a", prompt)) for prompt in prompts))
    waiting = await in_line(one)
    assert waiting > 150
    await redis.ltrim(line, 70, -1)
    await redis.config_set("slowlog-log-slower-than", 0)
    await redis.config_set("slowlog-max-len", 20_000)
    recovered = asyncio.Event()
    one.parts.recovery.on_restored = recovered.set
    one.parts.recovery.notice("a test", publish=True)
    await asyncio.wait_for(recovered.wait(), 20)
    assert await in_line(one) == waiting
    commands: list[Any] = [row["command"] for row in await redis.slowlog_get(20_000)]
    read = [command.split() for command in commands if command.startswith(b"LRANGE")]
    parts = [int(last) - int(first) for _, _, first, last in read]
    assert parts
    assert all(0 <= part < 100 for part in parts), parts
    elements: list[Any] = await redis.lrange(line, 0, -1)
    assert len({element.split(b"\n")[0] for element in elements}) == waiting


async def test_a_task_that_would_wait_in_a_line_is_not_accepted_while_the_stream_is_lost(
    make_instance: MakeInstance,
) -> None:
    """An instance may run the same task, and has not written its record back yet: a new one would be paid again."""
    one, redis_calls = make_instance(slots=1, start=False), list[str]()
    await one.verbs.create_group()
    tasks = await put(one, "a", 3)
    redis, keys = one.connection.commands, one.keys
    await redis.delete(keys.stream, keys.line("a"), *(keys.record(task.id) for task in tasks))
    one.task_cache.forget(tasks[2].id)

    async def recover() -> None:
        redis_calls.append("recover")
        assert not await redis.exists(keys.record(tasks[2].id), keys.line("a"))
        await one.verbs.create_group()

    one.verbs.submit.on_loss = recover
    again = (await put(one, "a", 1, first=2))[0]
    assert (redis_calls, again.entry_id, await in_line(one)) == (["recover"], IN_LINE, 1)
