"""Clients of one task: each may leave it, and the last one's cancel ends it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import pytest
from msgspec.structs import replace

from imagegen.errors import TooManyOpenTasks
from imagegen.queue import joined_clients
from imagegen.queue.client_queue import CacheResult
from imagegen.queue.open_tasks import OpenTasks
from imagegen.queue.verbs import join
from imagegen.tasks.clients import owner_name, submitter_name
from imagegen.tasks.retry import Retry
from imagegen.tasks.task import State, Task, WaitReason
from imagegen.tasks.webhook import Webhook
from tests.conftest import Instance, MakeInstance
from tests.support import eventually, submission

Pair = tuple[Instance, Instance]
Result = TypeVar("Result")


def webhook_of(client: str) -> Webhook:
    return Webhook("https://example.com/hook", "https://images.example.com", owner=owner_name(client))


async def submit(instance: Instance, client: str, name: object = "a", *, webhook: Webhook | None = None) -> Task:
    """Submit as the web layer does; return the task."""
    webhooks = (webhook,) if webhook else ()
    sent = replace(submission(name), submitter=client, webhooks=webhooks)
    for _ in range(3):
        submitted = await instance.client_queue.submit(sent)
        if submitted.cached is not CacheResult.COALESCED:
            return submitted.task
        if await instance.client_queue.join(submitted.task, client, has_webhook=bool(webhook)):
            await instance.client_queue.add_webhooks(sent, submitted)
            return submitted.task
    raise AssertionError("the task ended three times before it was joined")


def next_call(callbacks: dict[str, Callable[[Any], None]], kind: str) -> asyncio.Event:
    """Return an event that is set when the callback of this kind has run."""
    called, callback = asyncio.Event(), callbacks[kind]

    def call(message: Any) -> None:
        callback(message)
        called.set()

    callbacks[kind] = call
    return called


async def informed(*instances: Instance) -> None:
    """Wait until each instance receives messages, and knows the others."""
    others = len(instances) - 1
    await eventually(lambda: all(each.notifier.subscribed and len(each.notifier.peers) >= others for each in instances))


async def leaves(instance: Instance, client: str, task: Task) -> bool:
    """Cancel by a client; return whether the task went on without it."""
    reply = await instance.client_queue.cancel_by(client, task.id)
    assert reply.task is not None
    assert reply.left == (not reply.task.state.is_final)
    assert reply.left or reply.task.state is State.CANCELLED
    return reply.left


@pytest.fixture
def pair(make_instance: MakeInstance) -> Pair:
    """Return two instances of which none claims."""
    return make_instance(start=False), make_instance(start=False)


async def test_the_last_of_three_clients_ends_the_task_whichever_instance_they_use(pair: Pair) -> None:
    one, two = pair
    await one.verbs.create_group()
    task = await submit(one, "a")
    await submit(two, "b")
    await submit(one, "c")
    assert await leaves(two, "a", task)
    assert await leaves(two, "a", task), "a second cancel counts for nothing"
    assert await leaves(one, "c", task)
    assert not await leaves(two, "b", task)


async def test_the_only_client_ends_the_task_and_a_stranger_does_not(pair: Pair) -> None:
    one, two = pair
    await one.verbs.create_group()
    task = await submit(one, "a")
    assert await leaves(two, "stranger", task)
    assert await leaves(one, "stranger", task)
    assert not await leaves(two, "a", task)


async def test_a_client_that_left_and_submits_again_counts_again(make_instance: MakeInstance) -> None:
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


async def test_an_instance_receives_who_left_on_another_one(make_instance: MakeInstance) -> None:
    one, two = make_instance(), make_instance()
    await informed(one, two)
    task = await submit(one, "a")
    await submit(one, "b")
    leaving = next_call(one.notifier.handlers, "left")
    assert await leaves(two, "a", task)
    await asyncio.wait_for(leaving.wait(), 20)
    await submit(one, "a")
    assert await leaves(two, "b", task)
    assert not await leaves(two, "a", task)


async def test_an_instance_without_a_peer_yet_publishes_who_left(make_instance: MakeInstance) -> None:
    one = make_instance()
    await informed(one)
    task = await submit(one, "a")
    await submit(one, "b")
    leaving = next_call(one.notifier.handlers, "left")
    assert await leaves(make_instance(start=False), "a", task)
    await asyncio.wait_for(leaving.wait(), 20)
    await submit(one, "a")
    assert await leaves(one, "b", task)


async def test_a_submitter_that_left_counts_again_on_an_instance_that_missed_it(
    make_instance: MakeInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joined_clients, "SKEW_S", 0.0)
    one, two = make_instance(), make_instance()
    await informed(one, two)
    task = await submit(one, "a")
    await submit(one, "b")
    one.notifier.handlers["left"] = lambda _message: None
    assert await leaves(two, "a", task)
    again = asyncio.Event()
    one.notifier.on_join.append(again.set)
    one.connection.subscriptions.hang_up()
    await submit(one, "a", "unrelated")
    await asyncio.wait_for(again.wait(), 20)
    await submit(one, "a")
    assert await leaves(two, "b", task)
    assert not await leaves(two, "a", task)


async def test_a_submitter_that_left_counts_again_after_a_restart(make_instance: MakeInstance) -> None:
    one = make_instance()
    await informed(one)
    task = await submit(one, "a")
    await submit(one, "b")
    assert await leaves(one, "a", task)
    await one.crash()
    last = make_instance()
    await informed(last)
    for restarted in (make_instance(start=False), last):
        await submit(restarted, "a")
        assert await leaves(restarted, "b", task)
        await submit(restarted, "b")
        assert await leaves(restarted, "a", task)
    assert not await leaves(restarted, "b", task)


async def test_a_submitter_that_left_counts_again_once_that_is_forgotten(
    make_instance: MakeInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joined_clients, "MAX_REMEMBERED", 3)
    monkeypatch.setattr(joined_clients, "SKEW_S", -60.0)
    one = make_instance()
    await informed(one)
    task = await submit(one, "a")
    await submit(one, "b")
    assert await leaves(one, "a", task)
    for number in range(4):
        await submit(one, "a", number)
        await submit(one, "b", number)
    await submit(one, "a")
    assert await leaves(one, "b", task)
    assert not await leaves(one, "a", task)


async def test_a_submitter_that_left_counts_again_where_no_messages_arrive(
    make_instance: MakeInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joined_clients, "SKEW_S", 0.0)
    one, two = make_instance(), make_instance()
    await informed(one, two)
    task = await submit(one, "a")
    await submit(one, "b")
    one.notifier.handlers["left"] = lambda _message: None
    assert await leaves(two, "a", task)
    one.notifier.silent = True
    await submit(one, "a")
    assert await leaves(two, "b", task)


async def test_a_webhook_keeps_a_task_until_its_client_has_cancelled_twice(pair: Pair) -> None:
    one, two = pair
    await one.verbs.create_group()
    a, b = map(submitter_name, "ab")
    for joins_with_it in (False, True):
        name = f"joined: {joins_with_it}"
        task = await submit(one, b if joins_with_it else a, name, webhook=None if joins_with_it else webhook_of("a"))
        await submit(two, a if joins_with_it else b, name, webhook=webhook_of("a") if joins_with_it else None)
        assert await leaves(two, a, task)
        assert await leaves(one, b, task), "its webhook is still there"
        assert await leaves(one, b, task)
        assert not await leaves(two, a, task)


async def test_the_last_client_ends_a_task_with_its_own_webhook_at_once(pair: Pair) -> None:
    one, two = pair
    await one.verbs.create_group()
    a, b = map(submitter_name, "ab")
    task = await submit(one, a, webhook=webhook_of("a"))
    assert not await leaves(two, a, task)
    task = await submit(one, a, webhook=webhook_of("a"))
    await submit(two, b, webhook=webhook_of("b"))
    assert await leaves(two, a, task)
    assert await leaves(two, a, task), "now its webhook has left too"
    await submit(two, a)
    assert await leaves(two, b, task)
    assert await leaves(one, a, task), "the webhook of the other one is still there"
    assert not await leaves(one, b, task)


async def test_a_new_epoch_has_its_own_clients(pair: Pair) -> None:
    one, two = pair
    await one.verbs.create_group()
    task = await submit(one, "a")
    await submit(one, "b")
    await one.client_queue.cancel(task.id)
    again = await submit(two, "b")
    assert again.epoch > task.epoch
    assert not await leaves(two, "b", again)


async def test_a_running_or_retried_task_is_left_as_a_waiting_one(make_instance: MakeInstance) -> None:
    one, two = make_instance(), make_instance(start=False)
    task = await submit(one, "a")
    await submit(one, "b")
    claim = await one.claim()
    await one.worker_queue.start(claim)
    assert await leaves(two, "a", task)
    await one.worker_queue.retry(claim, Retry(60.0, WaitReason.RETRYING))
    await submit(two, "a")
    assert await leaves(one, "b", task)
    assert not claim.lost
    assert not await leaves(one, "a", task)
    assert claim.lost


async def test_a_task_in_a_line_is_left_too(make_instance: MakeInstance) -> None:
    one = make_instance(start=False, window=1)
    await one.verbs.create_group()
    mine = [replace(submission(name), client="key", submitter="a") for name in ("first", "in line")]
    tasks = [(await one.client_queue.submit(each)).task for each in mine]
    assert tasks[1].entry_id == "line"
    assert await one.client_queue.join(tasks[1], "b")
    assert await leaves(one, "a", tasks[1])
    assert not await leaves(one, "b", tasks[1])


async def test_of_a_task_of_an_earlier_version_two_of_three_clients_leave(pair: Pair) -> None:
    one, two = pair
    await one.verbs.create_group()
    task = await submit(one, "")
    for client in ("b", "c"):
        assert await one.client_queue.join(task, client)
    for _ in range(2):
        assert await leaves(two, "b", task)
        assert await leaves(one, "c", task)
    assert not await leaves(two, "a", task), "the client that nobody knows"


async def test_the_unknown_submitter_of_an_earlier_version_leaves_or_ends_its_task(pair: Pair) -> None:
    one, two = pair
    await one.verbs.create_group()
    task = await submit(one, "")
    assert await one.client_queue.join(task, "b")
    assert await leaves(two, "a", task)
    assert not await leaves(two, "b", task)
    alone = await submit(one, "", "alone")
    assert not await leaves(two, "a", alone)


@pytest.mark.parametrize("known_by", ["key", "webhook"])
async def test_a_key_or_a_webhook_shows_who_submitted_a_task_of_an_earlier_version(pair: Pair, known_by: str) -> None:
    one, two = pair
    await one.verbs.create_group()
    client_id = "key:shop" if known_by == "key" else "203.0.113.1"
    client = submitter_name(client_id)
    by_key, by_webhook = {"client": "shop"}, {"webhooks": (webhook_of(client_id),)}
    sent = replace(submission("a"), **(by_key if known_by == "key" else by_webhook))
    task = (await one.client_queue.submit(sent)).task
    assert await leaves(two, "stranger", task)
    assert await one.client_queue.join(task, "b")
    assert await leaves(two, "b", task)
    assert not await leaves(two, client, task)
    again = (await two.client_queue.submit(sent)).task
    assert again.epoch > task.epoch
    assert not await leaves(one, client, again)


async def test_a_client_can_not_join_a_task_that_was_cancelled_meanwhile(pair: Pair) -> None:
    one, two = pair
    await one.verbs.create_group()
    task = await submit(one, "a")
    await two.client_queue.cancel(task.id)
    assert not await one.client_queue.join(task, "b")
    again = await submit(one, "b")
    assert (again.state, again.epoch > task.epoch) == (State.PENDING, True)


async def test_clients_beyond_the_most_keep_the_task_until_it_is_cancelled_for_all(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(join, "MAX_BYTES", 8)
    one, two = pair
    await one.verbs.create_group()
    task = await submit(one, "a")
    for number in range(9):
        await submit(one, f"c{number}")
    value = await one.stored(one.keys.joined(task.id))
    assert value.partition(b" ")[2] == b"a c0 c1 *"
    for client in ("a", "c0", "c1", "c7"):
        assert await leaves(two, client, task)
    assert (await two.cancel(task.id)).state is State.CANCELLED


async def join_commands(instance: Instance, task: Task, client: str) -> int:
    """Join; return how many commands that cost."""
    before = instance.connection.meter.commands["submit"]
    assert await instance.client_queue.join(task, client)
    return instance.connection.meter.commands["submit"] - before


async def test_the_memory_of_clients_is_bounded(make_instance: MakeInstance, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joined_clients, "MAX_REMEMBERED", 3)
    one = make_instance()
    await informed(one)
    tasks = [await submit(one, "a", number) for number in range(5)]
    for task in tasks:
        assert await join_commands(one, task, "b") == 4
    assert [await join_commands(one, tasks[number], "b") for number in (4, 0)] == [0, 3]


async def test_a_repeat_costs_no_command_and_another_client_one_script(
    make_instance: MakeInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joined_clients, "SKEW_S", -60.0)
    instance = make_instance()
    await informed(instance)
    task = await submit(instance, "a")
    assert [await join_commands(instance, task, client) for client in "abba"] == [0, 4, 0, 0]
    assert await leaves(instance, "b", task)
    assert [await join_commands(instance, task, client) for client in "aaba"] == [3, 0, 4, 0]


async def test_a_repeat_on_an_instance_that_was_there_before_the_task_costs_no_script(
    make_instance: MakeInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joined_clients, "SKEW_S", -60.0)
    one, two = make_instance(), make_instance()
    await informed(one, two)
    task = await submit(one, "a")
    assert [await join_commands(two, task, client) for client in "abb"] == [0, 4, 0]


async def test_an_equal_submit_continues_when_the_first_one_is_cancelled(make_instance: MakeInstance) -> None:
    instance = make_instance(start=False)
    await instance.verbs.create_group()
    first = asyncio.create_task(submit(instance, "a"))
    await asyncio.sleep(0)
    others = [asyncio.create_task(submit(instance, client)) for client in "bc"]
    await asyncio.sleep(0)
    first.cancel()
    tasks = await asyncio.wait_for(asyncio.gather(*others), 20)
    assert first.cancelled()
    assert len({(task.id, task.epoch) for task in tasks}) == 1
    assert (await instance.read(tasks[0].id)).state is State.PENDING


class OneLimited(OpenTasks):
    """Limits of open tasks of which one client has reached its own, which shows once `refused` is set."""

    def __init__(self) -> None:
        self.refused = asyncio.Event()

    async def counted(self, client: str, task_id: str, store: Callable[[], Awaitable[tuple[Result, bool]]]) -> Result:
        if client == "limited":
            await self.refused.wait()
            raise TooManyOpenTasks
        return (await store())[0]


async def test_an_equal_submit_continues_if_the_first_client_has_too_many_tasks(make_instance: MakeInstance) -> None:
    instance = make_instance(start=False)
    await instance.verbs.create_group()
    limits = instance.client_queue.open_tasks = OneLimited()
    first = asyncio.create_task(instance.client_queue.submit(replace(submission("a"), client="limited")))
    await asyncio.sleep(0)
    other = asyncio.create_task(instance.client_queue.submit(replace(submission("a"), client="free")))
    await asyncio.sleep(0)
    limits.refused.set()
    with pytest.raises(TooManyOpenTasks):
        await first
    assert (await other).task.client == "free"
