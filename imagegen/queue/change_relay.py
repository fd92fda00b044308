"""Changes of tasks: published to the clients that wait here, and to the peers that wait for tasks of this instance."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence

from loguru import logger

from imagegen.errors import ApiError, QueueUnavailable
from imagegen.queue.codec import NewerRecord, UnreadableRecord, broadcast_record, decode_record
from imagegen.queue.eta import entry_order
from imagegen.queue.feed import Feed
from imagegen.queue.notifier import Message, ids_of
from imagegen.queue.task_lookup import TRUST_S, TaskLookup
from imagegen.redis_client.multiplexer import MAX_ITEMS
from imagegen.tasks.task import IN_LINE, Task

REFRESH_S = 8.0
"""Interval of reads of tasks that may change elsewhere, in case a message was lost; one command reads them all."""

POLL_S = 1.0
"""Shortest interval of reads of awaited tasks if Redis refuses the channel; it doubles with each read."""

MAX_WATCHED = 20_000
DOUBTFUL_AT_ONCE = MAX_ITEMS * 5


class ChangeRelay:
    """Connection of task cache, feed and notifier.

    watched: ids of tasks that peers wait for.
    on_unstarted: awaited with waiting tasks that may have lost their entries.
    """

    def __init__(self, lookup: TaskLookup, feed: Feed, last_delivered: Callable[[], Awaitable[str]]) -> None:
        task_cache, dispatcher, notifier = lookup.task_cache, lookup.dispatcher, lookup.notifier
        self._lookup = lookup
        self._task_cache = task_cache
        self._feed = feed
        self._notifier = notifier
        self._dispatcher = dispatcher
        self._last_delivered = last_delivered
        self.on_unstarted: Callable[[Sequence[Task]], Awaitable[None]] = _do_nothing
        self.watched: dict[str, None] = {}
        self._polled: set[str] = set()
        self._poll_every = self._polls_left = 1

    async def refresh_forever(self) -> None:
        """Read awaited tasks that run elsewhere, and tasks submitted here that a peer may have finished.

        The latter would stay in memory otherwise. Costs nothing without peers.
        """
        while True:
            await self._rest()
            await self.check_alone()
            foreign = self._foreign()
            doubtful = self._lookup.possibly_stale_ids()[:DOUBTFUL_AT_ONCE]
            results = await self._read([*{*foreign, *doubtful}])
            for task in results:
                if isinstance(task, BaseException) and not isinstance(task, ApiError):
                    raise task
            for task_id in doubtful:
                self._task_cache.move_to_end(task_id)
            try:
                await self._check_entries([task for task in results if isinstance(task, Task)])
            except QueueUnavailable:
                logger.debug("Entries of waiting tasks can't be checked now")

    async def _rest(self) -> None:
        """Wait for REFRESH_S. If no channel carries changes, read awaited tasks meanwhile, less and less often."""
        end = time.monotonic() + REFRESH_S
        while self._notifier.silent and end - time.monotonic() > POLL_S:
            await asyncio.sleep(POLL_S)
            foreign = set(self._foreign())
            fresh = foreign - self._polled
            self._polls_left -= 1
            if foreign and (fresh or self._polls_left <= 0):
                self._poll_every = 1 if fresh else min(self._poll_every * 2, round(REFRESH_S / POLL_S))
                self._polls_left = self._poll_every
                await self._read([*foreign])
            self._polled = foreign
        await asyncio.sleep(max(end - time.monotonic(), 0.0))

    async def _read(self, ids: Sequence[str]) -> list[Task | BaseException | None]:
        """Read tasks and publish them, as many at a time as one command takes; thousands at once stop the loop."""
        results: list[Task | BaseException | None] = []
        for first in range(0, len(ids), MAX_ITEMS):
            page = ids[first : first + MAX_ITEMS]
            results += await asyncio.gather(*map(self._lookup.read, page), return_exceptions=True)
            for task in results[first:]:
                if isinstance(task, Task):
                    self._feed.publish(task)
        return results

    def _foreign(self) -> list[str]:
        """Return the tasks that are waited for here and may change elsewhere."""
        return [task_id for task_id in self._feed.ids if self._lookup.authoritative_local(task_id) is None]

    async def check_alone(self) -> None:
        """Check that no unknown instance claims the tasks submitted here: its greeting may be lost.

        The group delivers entries in order, so one command returns which of them were delivered to any instance.
        """
        now = self._lookup.clock()
        tasks = self._lookup.unclaimed() if self._notifier.alone else []
        tasks = [task for task in tasks if task.entry_id != IN_LINE]
        waiting = [task for task in tasks[:DOUBTFUL_AT_ONCE] if task.created_at < now - TRUST_S + REFRESH_S]
        if not waiting:
            self._lookup.checked_at = now
            return
        try:
            if not any(map(self._passed, waiting)):
                await self._read_delivered()
        except QueueUnavailable:
            return
        if any(map(self._passed, waiting)):
            self._notifier.probe_peers()
        else:
            self._lookup.checked_at = now

    async def _check_entries(self, tasks: Sequence[Task]) -> None:
        """Check the entries of tasks that should have been started, and were not."""
        live, missing = self._task_cache.live, self._lookup.missing
        cached = [live[task.id] for task in tasks if task.id in live and task.sequence == task.epoch]
        unstarted = [task for task in cached if task.entry_id != IN_LINE]
        if any(not self._passed(task) for task in unstarted):
            await self._read_delivered()
        suspects = [task for task in unstarted if task.id in missing or self._passed(task)]
        missing.clear()
        await self.on_unstarted([task for task in suspects if task.id not in self._dispatcher.claimed])

    def _passed(self, task: Task) -> bool:
        """Return whether a task's entry was delivered, or no entry waits."""
        delivered = not task.entry_id or entry_order(task.entry_id) <= self._dispatcher.delivered
        return delivered or self._dispatcher.nothing_waits

    async def _read_delivered(self) -> None:
        delivered = entry_order(await self._last_delivered())
        self._dispatcher.delivered = max(self._dispatcher.delivered, delivered)

    def on_task_changed(self, task: Task) -> None:
        """Publish a task of this instance that changed."""
        self._feed.publish(task)
        if task.id in self.watched:
            self._publish(task)
            if task.state.is_final:
                self.watched.pop(task.id, None)

    def _publish(self, task: Task) -> None:
        self._notifier.publish("change", record=broadcast_record(task).decode())

    def request_changes(self, ids: Iterable[str]) -> None:
        """Request the peers to publish changes of those tasks that do not run here."""
        foreign = [task_id for task_id in ids if task_id not in self._dispatcher.claimed]
        if foreign:
            self._notifier.publish("watch", ids=foreign)

    def on_joined(self) -> None:
        self.request_changes(self._feed.ids)

    def on_hello(self, _message: Message) -> None:
        self.request_changes(self._feed.ids)

    def on_watch(self, message: Message) -> None:
        for task_id in ids_of(message):
            if finished := self._task_cache.finished(task_id):
                self._publish(finished)
                continue
            self.watched[task_id] = None
            if len(self.watched) > MAX_WATCHED:
                del self.watched[next(iter(self.watched))]
            if claim := self._dispatcher.claimed.get(task_id):
                self._publish(claim.task)

    def on_change(self, message: Message) -> None:
        try:
            _, task = decode_record(str(message.get("record")).encode())
        except (NewerRecord, UnreadableRecord) as error:
            logger.debug("A change that another instance published can't be read: {}", error)
            return
        if task.state.is_final:
            self._dispatcher.mark_finished_elsewhere(task)
            self.watched.pop(task.id, None)
        if task.id not in self._dispatcher.claimed:
            self._task_cache.store_from_peer(task)
        self._feed.publish(task)

    def on_resubmitted(self, message: Message) -> None:
        for task_id in ids_of(message):
            if task_id not in self._dispatcher.claimed:
                self._task_cache.forget(task_id)


async def _do_nothing(_tasks: Sequence[Task]) -> None:
    return
