"""Owns the telling of changes inside this process: who waits for which task, and what they have not seen yet."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Self

from imagegen.tasks.task import Task


class Subscription:
    """Changes of some tasks, the newest of each; use it as a context manager.

    A waiter costs one small object, and no command.
    """

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
        """Ends the wait that is under way, without news."""
        self._changed.set()

    def tell(self, task: Task) -> None:
        """News; what was told of another instance's task may come in another order than it happened."""
        known = self._news.get(task.id)
        if known is None or known.sequence < task.sequence:
            self._news[task.id] = task
            self._changed.set()

    async def changes(self, within_s: float) -> list[Task]:
        """What changed since the last call, waiting for the first; empty after `within_s` without news."""
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
    """on_first: called with ids that somebody begins to wait for."""

    def __init__(self) -> None:
        self._waiters: dict[str, set[Subscription]] = {}
        self.on_first_subscriber: Callable[[Iterable[str]], None] = lambda _ids: None

    def subscribe(self, ids: Iterable[str]) -> Subscription:
        return Subscription(self, ids)

    def wake_all(self) -> None:
        """Ends every wait, at the end of the service."""
        for waiters in self._waiters.values():
            for waiter in waiters:
                waiter.wake()

    def publish(self, task: Task) -> None:
        """A task changed, here or on another instance."""
        for waiter in self._waiters.get(task.id, ()):
            waiter.tell(task)

    @property
    def ids(self) -> Iterable[str]:
        """The tasks that somebody waits for."""
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
