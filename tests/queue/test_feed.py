"""Tests of the feed: what waiting clients get, and how many of them go on in one turn of the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from imagegen.queue.feed import Feed, Subscription
from imagegen.tasks import transitions
from imagegen.tasks.image import StoredImage
from imagegen.tasks.task import Task, WaitReason
from imagegen.turn_queue import PER_TURN
from tests.support import Turns

CLIENTS = 20 * PER_TURN


def pending(name: str = "a") -> Task:
    return Task(name * 32, 1_000, 1_000, "d", "m", b"{}", 0.0, reason=WaitReason.QUEUED)


def sent(task: Task) -> Task:
    return transitions.progressed(transitions.started(task, attempts=1, starts=1, now=1.0), 10)


def done(task: Task) -> Task:
    return transitions.completed(sent(task), [StoredImage(0)], [], now=2.0, ttl_s=60)


async def most_in_one_turn(subscriptions: Sequence[Subscription], cause: Callable[[], None]) -> int:
    """Return how many waits ended in the turn with the most of them, after all have ended."""
    ended: list[int] = []

    async def wait(subscription: Subscription) -> None:
        ended.append(len(await subscription.changes(20.0)))

    waits = [asyncio.create_task(wait(subscription)) for subscription in subscriptions]
    await asyncio.sleep(0)
    turns = Turns(lambda: len(ended))
    cause()
    await asyncio.gather(*waits)
    return turns.most()


async def test_reordered_changes_do_not_hide_the_end() -> None:
    feed, task = Feed(), pending()
    with feed.subscribe([task.id]) as subscription:
        feed.publish(done(task))
        feed.publish(sent(task))
        assert await subscription.changes(1.0) == [done(task)]
        assert await subscription.changes(0.01) == []


async def test_a_client_that_takes_nothing_keeps_the_latest_change_of_each_task() -> None:
    feed, task, other = Feed(), pending("a"), pending("b")
    with feed.subscribe([task.id, other.id]) as subscription:
        for number in range(100):
            feed.publish(transitions.progressed(sent(task), 10 + number % 80))
            feed.publish(sent(other))
        feed.publish(done(task))
        assert await subscription.changes(1.0) == [done(task), sent(other)]


async def test_a_change_goes_to_few_of_its_clients_in_one_turn() -> None:
    feed, task = Feed(), pending()
    subscriptions = [feed.subscribe([task.id]) for _ in range(CLIENTS)]
    for subscription in subscriptions:
        feed.add(subscription)
    assert await most_in_one_turn(subscriptions, lambda: feed.publish(done(task))) <= PER_TURN
    assert await most_in_one_turn(subscriptions, feed.wake_all) <= PER_TURN


async def test_clients_of_many_changed_tasks_take_more_of_a_turn() -> None:
    feed, tasks = Feed(), [pending(name) for name in "abcdefgh"]
    subscriptions = [feed.subscribe(task.id for task in tasks) for _ in range(40)]
    for subscription in subscriptions:
        feed.add(subscription)

    def publish() -> None:
        for task in tasks:
            feed.publish(sent(task))

    assert await most_in_one_turn(subscriptions, publish) <= PER_TURN / len(tasks)


async def test_a_wait_for_the_end_of_a_task_ends_with_it_alone() -> None:
    feed, task, woken = Feed(), pending(), 0
    with feed.await_end(task.id) as subscription:
        feed.publish(sent(task))
        assert await subscription.changes(0.05) == [sent(task)]
        waiting = asyncio.create_task(subscription.changes(20.0))
        await asyncio.sleep(0)
        feed.publish(sent(task))
        for _ in range(5):
            await asyncio.sleep(0)
            woken += waiting.done()
        feed.publish(done(task))
        assert (woken, await waiting) == (0, [done(task)])
