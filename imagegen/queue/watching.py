"""Owns what instances tell each other of tasks: an owner publishes the changes of those that somebody watches."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence

from loguru import logger

from imagegen.errors import ApiError, QueueUnavailable
from imagegen.queue.batch import MAX_ITEMS
from imagegen.queue.control import Message, ids_of
from imagegen.queue.estimate import entry_order
from imagegen.queue.feed import Feed
from imagegen.queue.reads import TRUST_S, Reads
from imagegen.queue.records import NewerRecord, UnreadableRecord, decode_record, seen_record
from imagegen.tasks.task import Task

REFRESH_S = 8.0
"""How often what is watched or may be finished elsewhere is read, in case a message was lost: one command for all."""

POLL_S = 1.0
"""The shortest time between two reads of what is waited for, where Redis refuses the channel; it doubles each time."""

MAX_WATCHED = 20_000
DOUBTFUL_AT_ONCE = MAX_ITEMS * 5


class Watching:
    """Joins memory, feed and control channel.

    on_unstarted: awaited with waiting tasks whose entries may be gone.
    """

    def __init__(self, reads: Reads, feed: Feed, last_delivered: Callable[[], Awaitable[str]]) -> None:
        memory, holdings, control = reads.memory, reads.holdings, reads.control
        self._reads = reads
        self._memory = memory
        self._feed = feed
        self._control = control
        self._holdings = holdings
        self._last_delivered = last_delivered
        self.on_unstarted: Callable[[Sequence[Task]], Awaitable[None]] = _do_nothing
        self._watched: dict[str, None] = {}
        self._polled: set[str] = set()
        self._poll_every = self._polls_left = 1
        memory.on_change = self._changed
        feed.on_first = self._watch
        control.on |= {"watch": self._heard_watch, "change": self._heard_change, "fresh": self._heard_fresh}
        control.on |= {"hello": self._heard_hello}
        control.on_join.append(lambda: self._watch(feed.ids))

    async def refresh_forever(self) -> None:
        """Reads again what is waited for here and runs elsewhere, while there is an elsewhere; and what was submitted
        here and may have been finished elsewhere, so that it does not stay in memory."""
        while True:
            await self._rest()
            await self.check_alone()
            foreign = self._foreign()
            doubtful = self._reads.doubtful()[:DOUBTFUL_AT_ONCE]
            found = await asyncio.gather(*map(self._reads.read, {*foreign, *doubtful}), return_exceptions=True)
            for task in found:
                if isinstance(task, Task):
                    self._feed.publish(task)
                elif task is not None and not isinstance(task, ApiError):
                    raise task
            for task_id in doubtful:
                self._memory.look_later(task_id)
            try:
                await self._check_entries([task for task in found if isinstance(task, Task)])
            except QueueUnavailable:
                logger.debug("Entries of waiting tasks can't be checked now")

    async def _rest(self) -> None:
        """Wait for REFRESH_S. If no channel carries changes, read what is waited for meanwhile, ever less often."""
        end = time.monotonic() + REFRESH_S
        while self._control.silent and end - time.monotonic() > POLL_S:
            await asyncio.sleep(POLL_S)
            foreign = set(self._foreign())
            fresh = foreign - self._polled
            self._polls_left -= 1
            if foreign and (fresh or self._polls_left <= 0):
                self._poll_every = 1 if fresh else min(self._poll_every * 2, round(REFRESH_S / POLL_S))
                self._polls_left = self._poll_every
                for task in await asyncio.gather(*map(self._reads.read, foreign), return_exceptions=True):
                    if isinstance(task, Task):
                        self._feed.publish(task)
            self._polled = foreign
        await asyncio.sleep(max(end - time.monotonic(), 0.0))

    def _foreign(self) -> list[str]:
        """Return the tasks that are waited for here and may change elsewhere."""
        return [task_id for task_id in self._feed.ids if self._reads.own(task_id) is None]

    async def check_alone(self) -> None:
        """Check that no other instance takes what waits here, if none is known: its greeting may be lost.

        The group delivers entries in order, so one command returns which of them were delivered to any instance.
        """
        now = self._reads.clock()
        tasks = self._reads.unclaimed() if self._control.alone else []
        waiting = [task for task in tasks[:DOUBTFUL_AT_ONCE] if task.created_at < now - TRUST_S + REFRESH_S]
        if not waiting:
            self._reads.checked_at = now
            return
        try:
            if not any(map(self._passed, waiting)):
                await self._ask_delivered()
        except QueueUnavailable:
            return
        if any(map(self._passed, waiting)):
            self._control.doubt()
        else:
            self._reads.checked_at = now

    async def _check_entries(self, tasks: Sequence[Task]) -> None:
        """Check the entries of tasks that should have been started, and were not."""
        live, missing = self._memory.live, self._reads.missing
        unstarted = [live[task.id] for task in tasks if task.id in live and task.sequence == task.generation]
        if any(not self._passed(task) for task in unstarted):
            await self._ask_delivered()
        suspects = [task for task in unstarted if task.id in missing or self._passed(task)]
        missing.clear()
        await self.on_unstarted([task for task in suspects if task.id not in self._holdings.claimed])

    def _passed(self, task: Task) -> bool:
        """Return whether a task's entry does not wait any more, as far as is known."""
        delivered = not task.entry_id or entry_order(task.entry_id) <= self._holdings.delivered
        return delivered or self._holdings.nothing_waits

    async def _ask_delivered(self) -> None:
        delivered = entry_order(await self._last_delivered())
        self._holdings.delivered = max(self._holdings.delivered, delivered)

    def _changed(self, task: Task) -> None:
        """A task of ours changed."""
        self._feed.publish(task)
        if task.id in self._watched:
            self._tell(task)
            if task.state.final:
                self._watched.pop(task.id, None)

    def _tell(self, task: Task) -> None:
        self._control.tell("change", record=seen_record(task).decode())

    def _watch(self, ids: Iterable[str]) -> None:
        foreign = [task_id for task_id in ids if task_id not in self._holdings.claimed]
        if foreign:
            self._control.tell("watch", ids=foreign)

    def _heard_hello(self, _message: Message) -> None:
        self._watch(self._feed.ids)

    def _heard_watch(self, message: Message) -> None:
        for task_id in ids_of(message):
            if finished := self._memory.finished(task_id):
                self._tell(finished)
                continue
            self._watched[task_id] = None
            if len(self._watched) > MAX_WATCHED:
                del self._watched[next(iter(self._watched))]
            if claim := self._holdings.claimed.get(task_id):
                self._tell(claim.task)

    def _heard_change(self, message: Message) -> None:
        try:
            _, task = decode_record(str(message.get("record")).encode())
        except (NewerRecord, UnreadableRecord) as error:
            logger.debug("A change that another instance told can't be read: {}", error)
            return
        if task.state.final:
            self._holdings.lose(task)
            self._watched.pop(task.id, None)
        if task.id not in self._holdings.claimed:
            self._memory.heard(task)
        self._feed.publish(task)

    def _heard_fresh(self, message: Message) -> None:
        for task_id in ids_of(message):
            if task_id not in self._holdings.claimed:
                self._memory.forget(task_id)


async def _do_nothing(_tasks: Sequence[Task]) -> None:
    return
