"""Feed of the changes of tasks to the clients that wait here; each client resumes in its turn."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Self

from imagegen.tasks.task import Task
from imagegen.turn_queue import TurnQueue


class Subscription:
    """Latest changes of some tasks; a context manager. A waiting client costs one small object, and no command.

    awaits_end: only the end of a task ends a wait; the changes before it are returned with it.
    """

    __slots__ = ("_awaits_end", "_changed", "_feed", "_is_ready", "_news", "ids", "is_due")

    def __init__(self, feed: Feed, ids: Iterable[str], *, awaits_end: bool = False) -> None:
        self._feed = feed
        self._awaits_end = awaits_end
        self.ids = frozenset(ids)
        self._news: dict[str, Task] = {}
        self._is_ready = False
        self._changed = asyncio.Event()
        self.is_due = False

    def __enter__(self) -> Self:
        self._feed.add(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._feed.remove(self)

    @property
    def cost(self) -> int:
        """Number of tasks that the client is sent when it resumes."""
        return len(self._news) or len(self.ids)

    def wake(self) -> None:
        """End the current wait without a change, when it is this client's turn."""
        self._feed.wake_in_turn(self)

    def resume(self) -> None:
        """End the current wait, since it is this client's turn."""
        self.is_due = False
        self._changed.set()

    def notify(self, task: Task) -> None:
        """Store a change; changes of another instance's task may arrive out of order."""
        previous = self._news.get(task.id)
        if previous is None or previous.sequence < task.sequence:
            self._news[task.id] = task
            if task.state.is_final or not self._awaits_end:
                self._is_ready = True
                self._feed.wake_in_turn(self)

    async def turn(self) -> None:
        """Wait for this client's turn, before work that thousands of clients may request at once."""
        self._changed.clear()
        self._feed.wake_in_turn(self)
        await self._changed.wait()

    async def changes(self, within_s: float) -> list[Task]:
        """Return the changes since the last call after waiting for the first, at most `within_s` seconds."""
        if not self._is_ready:
            self._changed.clear()
            try:
                async with asyncio.timeout(within_s):
                    await self._changed.wait()
            except TimeoutError:
                pass
        news, self._news, self._is_ready = list(self._news.values()), {}, False
        return news


class Feed:
    """Subscriptions of clients by task id. on_first_subscriber: called with ids that had no subscriber before."""

    def __init__(self) -> None:
        self.waiters: dict[str, set[Subscription]] = {}
        self.on_first_subscriber: Callable[[Iterable[str]], None] = lambda _ids: None
        self._turns = TurnQueue()

    def subscribe(self, ids: Iterable[str]) -> Subscription:
        return Subscription(self, ids)

    def await_end(self, task_id: str) -> Subscription:
        """Return a subscription to a task; its waits end when the task ends."""
        return Subscription(self, [task_id], awaits_end=True)

    def wake_all(self) -> None:
        """End every wait, at the end of the service."""
        for waiters in self.waiters.values():
            for waiter in waiters:
                waiter.wake()

    def publish(self, task: Task) -> None:
        """Publish a change of a task, from here or from another instance."""
        for waiter in self.waiters.get(task.id, ()):
            waiter.notify(task)

    def wake_in_turn(self, waiter: Subscription) -> None:
        """Resume a client in its turn, after those that are due already."""
        if not waiter.is_due:
            waiter.is_due = True
            self._turns.add(waiter)

    @property
    def ids(self) -> Iterable[str]:
        """Tasks with a subscriber."""
        return self.waiters.keys()

    @property
    def count(self) -> int:
        return sum(map(len, self.waiters.values()))

    def add(self, waiter: Subscription) -> None:
        first = [task_id for task_id in waiter.ids if task_id not in self.waiters]
        for task_id in waiter.ids:
            self.waiters.setdefault(task_id, set()).add(waiter)
        if first:
            self.on_first_subscriber(first)

    def remove(self, waiter: Subscription) -> None:
        for task_id in waiter.ids:
            waiters = self.waiters.get(task_id)
            if waiters is not None:
                waiters.discard(waiter)
                if not waiters:
                    del self.waiters[task_id]
