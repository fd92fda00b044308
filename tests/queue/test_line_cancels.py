"""Cancels of tasks that wait in a line."""

from __future__ import annotations

import pytest

from imagegen.queue.client_queue import CacheResult
from imagegen.queue.verbs import read
from imagegen.tasks.task import State, Task
from tests.conftest import Instance, MakeInstance
from tests.queue.line_tasks import in_line, in_stream, is_at_rest, put, run_all, submission_of


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


async def test_a_cancel_reads_a_long_line_in_parts_and_only_where_the_request_is_not_in_memory(
    make_instance: MakeInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read, "MAX_READ_BYTES", 1)
    one, two = make_instance(slots=1), make_instance(slots=1, start=False)
    tasks = await put(one, "a", 48)
    assert await in_line(one) == 46

    async def reads_of_cancel(instance: Instance, task: Task) -> int:
        commands = instance.connection.meter.commands
        before = commands["read"]
        cancelled = await instance.cancel(task.id)
        assert cancelled is not None
        assert cancelled.request_json == task.request_json
        return commands["read"] - before

    of_record = 1
    assert await reads_of_cancel(two, tasks[47]) == of_record + 2
    assert await reads_of_cancel(two, tasks[2]) == of_record + 3 * 2
    assert await reads_of_cancel(one, tasks[3]) <= of_record
