"""Clients of one task: each may leave it, and the last one's cancel ends it."""

from __future__ import annotations

import pytest
from msgspec.structs import replace
from support import eventually, submission

from imagegen.queue import joined_clients
from imagegen.queue.verbs import join
from imagegen.tasks.retry import Retry
from imagegen.tasks.task import State, WaitReason


async def submit(instance, client, name="a"):
    """Submit as the web layer does; return the task."""
    for _ in range(3):
        submitted = await instance.client_queue.submit(replace(submission(name), submitter=client))
        if submitted.cached != "COALESCED" or await instance.client_queue.join(submitted.task, client):
            break
    return submitted.task


async def leaves(instance, client, task):
    """Cancel by a client; return whether the task went on without it."""
    reply = await instance.client_queue.cancel_by(client, task.id)
    assert reply.left == (not reply.task.state.is_final)
    assert reply.left or reply.task.state is State.CANCELLED
    return reply.left


@pytest.fixture
def pair(make_instance):
    """Return two instances of which none claims."""
    return make_instance(start=False), make_instance(start=False)


async def test_the_last_of_three_clients_ends_the_task_whichever_instance_they_use(pair) -> None:
    one, two = pair
    await one.verbs.create_group()
    task = await submit(one, "a")
    await submit(two, "b")
    await submit(one, "c")
    assert await leaves(two, "a", task)
    assert await leaves(two, "a", task), "a second cancel counts for nothing"
    assert await leaves(one, "c", task)
    assert not await leaves(two, "b", task)


async def test_the_only_client_ends_the_task_and_a_stranger_does_not(pair) -> None:
    one, two = pair
    await one.verbs.create_group()
    task = await submit(one, "a")
    assert await leaves(two, "stranger", task)
    assert await leaves(one, "stranger", task)
    assert not await leaves(two, "a", task)


async def test_a_client_that_left_and_submits_again_counts_again(make_instance) -> None:
    one, two = make_instance(), make_instance(start=False)
    task = await submit(one, "a")
    await submit(one, "b")
    for _ in range(2):
        assert await leaves(one, "a", task)
        await submit(one, "a")
    assert await leaves(two, "b", task)
    await submit(two, "b")
    assert await leaves(one, "a", task)
    assert not await leaves(one, "b", task)


async def test_an_instance_is_told_who_left_on_another_one(make_instance) -> None:
    one, two = make_instance(), make_instance()
    await eventually(lambda: not two.notifier.alone and not one.notifier.alone)
    task = await submit(one, "a")
    await submit(one, "b")
    assert await leaves(two, "a", task)
    await eventually(lambda: not one.client_queue._joined._known[task.id].clients)
    await submit(one, "a")
    assert await leaves(two, "b", task)
    assert not await leaves(two, "a", task)


async def test_a_new_epoch_has_its_own_clients(pair) -> None:
    one, two = pair
    await one.verbs.create_group()
    task = await submit(one, "a")
    await submit(one, "b")
    await one.client_queue.cancel(task.id)
    again = await submit(two, "b")
    assert again.epoch > task.epoch
    assert not await leaves(two, "b", again)


async def test_a_running_or_retried_task_is_left_as_a_waiting_one(make_instance) -> None:
    one, two = make_instance(), make_instance(start=False)
    task = await submit(one, "a")
    await submit(one, "b")
    claim = await one.worker_queue.claim()
    await one.worker_queue.start(claim)
    assert await leaves(two, "a", task)
    await one.worker_queue.retry(claim, Retry(60.0, WaitReason.RETRYING))
    await submit(two, "a")
    assert await leaves(one, "b", task)
    assert not claim.lost
    assert not await leaves(one, "a", task)
    assert claim.lost


async def test_a_task_in_a_line_is_left_too(make_instance) -> None:
    one = make_instance(start=False, window=1)
    await one.verbs.create_group()
    mine = [replace(submission(name), client="key", submitter="a") for name in ("first", "in line")]
    tasks = [(await one.client_queue.submit(each)).task for each in mine]
    assert tasks[1].entry_id == "line"
    assert await one.client_queue.join(tasks[1], "b")
    assert await leaves(one, "a", tasks[1])
    assert not await leaves(one, "b", tasks[1])


async def test_a_task_of_an_earlier_version_has_only_the_clients_that_joined_since(pair) -> None:
    one, two = pair
    await one.verbs.create_group()
    task = await submit(one, "")
    assert await one.client_queue.join(task, "b")
    assert await leaves(two, "a", task)
    assert not await leaves(two, "b", task)
    alone = await submit(one, "", "alone")
    assert not await leaves(two, "a", alone)


async def test_a_client_can_not_join_a_task_that_was_cancelled_meanwhile(pair) -> None:
    one, two = pair
    await one.verbs.create_group()
    task = await submit(one, "a")
    await two.client_queue.cancel(task.id)
    assert not await one.client_queue.join(task, "b")
    again = await submit(one, "b")
    assert (again.state, again.epoch > task.epoch) == (State.PENDING, True)


async def test_clients_beyond_the_most_keep_the_task_until_it_is_cancelled_for_all(pair, monkeypatch) -> None:
    monkeypatch.setattr(join, "MAX_BYTES", 8)
    one, two = pair
    await one.verbs.create_group()
    task = await submit(one, "a")
    for number in range(9):
        await submit(one, f"c{number}")
    value = await one.connection.commands.get(one.parts.keys.joined(task.id))
    assert value.partition(b" ")[2] == b"a c0 c1 *"
    for client in ("a", "c0", "c1", "c7"):
        assert await leaves(two, client, task)
    assert (await two.client_queue.cancel(task.id)).state is State.CANCELLED


async def test_the_memory_of_clients_is_bounded(make_instance, monkeypatch) -> None:
    monkeypatch.setattr(joined_clients, "MAX_REMEMBERED", 3)
    one = make_instance()
    for number in range(5):
        await submit(one, "a", number)
        await submit(one, "b", number)
    assert len(one.client_queue._joined._known) == 3


async def test_a_repeat_of_the_same_client_costs_no_command_and_another_client_one_script(make_instance) -> None:
    instance = make_instance()
    task = await submit(instance, "a")
    await instance.worker_queue.claim()
    sent = instance.connection.meter.commands

    async def cost(client):
        before = sent["submit"]
        await submit(instance, client)
        return sent["submit"] - before

    assert await cost("a") == 0
    assert await cost("b") == 4
    assert await cost("b") == 0
    assert await cost("a") == 0
    assert await leaves(instance, "b", task)
    assert await cost("a") == 3
    assert await cost("a") == 0
