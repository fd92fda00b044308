"""Publication of task changes inside this process to the clients that wait for them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Self

from imagegen.tasks.task import Task


class Subscription:
    """Latest changes of some tasks; a context manager. A waiting client costs one small object, and no command."""

    __slots__ = ("_changed", "_feed", "_news", "ids")

    def __init__(self, feed: Feed, ids: Iterable[str]) -> None:
        self._feed = feed
        self.ids = frozenset(ids)
        self._news: dict[str, Task] = {}
        self._changed = asyncio.Event()

    def __enter__(self) -> Self:
        self._feed.add(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._feed.remove(self)

    def wake(self) -> None:
        """End the current wait without a change."""
        self._changed.set()

    def notify(self, task: Task) -> None:
        """Store a change; changes of another instance's task may arrive out of order."""
        previous = self._news.get(task.id)
        if previous is None or previous.sequence < task.sequence:
            self._news[task.id] = task
            self._changed.set()

    async def changes(self, within_s: float) -> list[Task]:
        """Return the changes since the last call after waiting for the first; empty after `within_s` without one."""
        if not self._news:
            self._changed.clear()
            try:
                async with asyncio.timeout(within_s):
                    await self._changed.wait()
            except TimeoutError:
                return []
        news, self._news = list(self._news.values()), {}
        return news


class Feed:
    """Subscriptions by task id. on_first_subscriber: called with ids that had no subscriber before."""

    def __init__(self) -> None:
        self._waiters: dict[str, set[Subscription]] = {}
        self.on_first_subscriber: Callable[[Iterable[str]], None] = lambda _ids: None

    def subscribe(self, ids: Iterable[str]) -> Subscription:
        return Subscription(self, ids)

    def wake_all(self) -> None:
        """End every wait, at the end of the service."""
        for waiters in self._waiters.values():
            for waiter in waiters:
                waiter.wake()

    def publish(self, task: Task) -> None:
        """Publish a change of a task, from here or from another instance."""
        for waiter in self._waiters.get(task.id, ()):
            waiter.notify(task)

    @property
    def ids(self) -> Iterable[str]:
        """Tasks with a subscriber."""
        return self._waiters.keys()

    @property
    def count(self) -> int:
        return sum(map(len, self._waiters.values()))

    def add(self, waiter: Subscription) -> None:
        first = [task_id for task_id in waiter.ids if task_id not in self._waiters]
        for task_id in waiter.ids:
            self._waiters.setdefault(task_id, set()).add(waiter)
        if first:
            self.on_first_subscriber(first)

    def remove(self, waiter: Subscription) -> None:
        for task_id in waiter.ids:
            waiters = self._waiters.get(task_id)
            if waiters is not None:
                waiters.discard(waiter)
                if not waiters:
                    del self._waiters[task_id]
