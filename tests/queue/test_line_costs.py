"""Cost of lines of clients in Redis commands."""

from __future__ import annotations

import asyncio

import pytest
from msgspec.structs import replace

from imagegen.queue.claim import StartResult
from imagegen.queue.verbs.refill_lines import StoppedLine
from imagegen.tasks.submission import Submission
from imagegen.tasks.task import IN_LINE, Task
from tests.conftest import Instance, MakeInstance
from tests.queue.command_counts import CommandCount, finished
from tests.support import submission


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
        for line, moved in zip(stopped, (await one.verbs.refill_lines(stopped))[0], strict=True):
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
    begin_and_end = 5  # RPUSH, SADD and EXISTS; LPOP and SREM
    assert counts[2] - counts[0] <= 20 * most + begin_and_end
