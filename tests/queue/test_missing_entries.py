"""Records of waiting tasks that name no entry, as those that pass between instances."""

from __future__ import annotations

from typing import cast

from tests.conftest import MakeInstance
from tests.support import submission


async def test_a_waiting_task_of_a_record_without_an_entry_is_shown_without_a_position(
    make_instance: MakeInstance,
) -> None:
    one, two = make_instance(slots=0), make_instance(slots=0)
    task = (await one.client_queue.submit(submission("without an entry"))).task
    redis, key = one.connection.commands, one.keys.record(task.id)
    record = cast(bytes, await redis.get(key))
    assert task.entry_id.encode() in record
    await redis.set(key, record.replace(task.entry_id.encode(), b"-", 1))
    found = await two.client_queue.get(task.id)
    assert found is not None
    assert found.entry_id == ""
    assert (await two.client_queue.position(found)).position is None
