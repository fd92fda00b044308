"""Owns what instances tell each other of tasks: an owner publishes the changes of those that somebody watches."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from loguru import logger

from imagegen.errors import ApiError
from imagegen.queue.batch import MAX_ITEMS
from imagegen.queue.control import Message, ids_of
from imagegen.queue.feed import Feed
from imagegen.queue.reads import Reads
from imagegen.queue.records import NewerRecord, UnreadableRecord, decode_record, seen_record
from imagegen.tasks.task import Task

REFRESH_S = 10.0
"""How often what is watched or may be finished elsewhere is read, in case a message was lost: one command for all."""

MAX_WATCHED = 20_000
DOUBTFUL_AT_ONCE = MAX_ITEMS * 5


class Watching:
    """Joins memory, feed and control channel."""

    def __init__(self, reads: Reads, feed: Feed) -> None:
        memory, holdings, control = reads.memory, reads.holdings, reads.control
        self._reads = reads
        self._memory = memory
        self._feed = feed
        self._control = control
        self._holdings = holdings
        self._watched: dict[str, None] = {}
        memory.on_change = self._changed
        feed.on_first = self._watch
        control.on |= {"watch": self._heard_watch, "change": self._heard_change, "fresh": self._heard_fresh}
        control.on |= {"hello": self._heard_hello}
        control.on_join.append(lambda: self._watch(feed.ids))

    async def refresh_forever(self) -> None:
        """Reads again what is waited for here and runs elsewhere, while there is an elsewhere; and what was submitted
        here and may have been finished elsewhere, so that it does not stay in memory."""
        while True:
            await asyncio.sleep(REFRESH_S)
            foreign = [] if self._control.alone else [i for i in self._feed.ids if i not in self._holdings.claimed]
            doubtful = self._reads.doubtful()[:DOUBTFUL_AT_ONCE]
            for found in await asyncio.gather(*map(self._reads.read, {*foreign, *doubtful}), return_exceptions=True):
                if isinstance(found, Task):
                    self._feed.publish(found)
                elif found is not None and not isinstance(found, ApiError):
                    raise found
            for task_id in doubtful:
                self._memory.look_later(task_id)

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
