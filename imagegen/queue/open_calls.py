"""Calls of `/v1` clients that wait for a task here, or were answered here. Other instances query them.

If no instance has a call for an unfinished task, the call was lost with its instance: the client's next equal call
repeats it. So it does if an instance died at the moment at which the task was finished.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter, OrderedDict
from collections.abc import Collection
from dataclasses import dataclass, field

from imagegen.queue.notifier import Message, Notifier
from imagegen.queue.queue_verbs import QueueVerbs

QUERY, REPLY = "call_query", "call_reply"

MAX_ANSWERED = 10_000

REPLIES_S = 1.0
"""Longest wait for the replies of all instances. Instances of an earlier version do not reply."""

DELIVERY_S = 2.0
"""An instance that lived this long after the end of a task has delivered its answer."""


@dataclass(slots=True)
class _Query:
    """Query of the peers. absent: those without the call. peers: how many receive it, None if unknown."""

    absent: set[str] = field(default_factory=set)
    peers: int | None = None
    is_found: asyncio.Future[bool] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    def settle(self) -> None:
        """End the wait once no peer has the call."""
        if self.peers is not None and len(self.absent) >= self.peers and not self.is_found.done():
            self.is_found.set_result(False)


class OpenCalls:
    """Tasks that calls wait for here, and tasks that calls were answered with, by id."""

    def __init__(self, notifier: Notifier, verbs: QueueVerbs) -> None:
        self._notifier = notifier
        self._verbs = verbs
        self._open: Counter[str] = Counter()
        self._answered: OrderedDict[str, None] = OrderedDict()
        self._queries: dict[str, _Query] = {}
        notifier.handlers[QUERY] = self._on_query
        notifier.handlers[REPLY] = self._on_reply

    def begin(self, task_id: str) -> None:
        """Record a call that waits for a task."""
        self._open[task_id] += 1

    def end(self, task_id: str, *, is_answered: bool) -> None:
        """Record the end of a call. is_answered: the client has a response, which may show that the task runs."""
        self._open[task_id] -= 1
        if self._open[task_id] <= 0:
            del self._open[task_id]
        if is_answered:
            self._answered[task_id] = None
            self._answered.move_to_end(task_id)
            while len(self._answered) > MAX_ANSWERED:
                self._answered.popitem(last=False)

    def is_answered_here(self, task_id: str) -> bool:
        """Return whether a call was answered here with a task."""
        return task_id in self._answered

    async def died_without_delivery(self, finished_at: float, living: Collection[str]) -> bool:
        """Return whether an instance died before it can have delivered the answer of a task that finished then.

        The consumer of an instance that was stopped is removed at once, that of a killed one after a minute. This costs
        one command. finished_at: Unix time. living: the other instances that live. Raises QueueUnavailable.
        """
        now, known = self._verbs.clock(), {self._notifier.instance, *living}
        dead = [consumer for consumer in await self._verbs.consumers() if consumer.name not in known]
        return any(now - consumer.idle_s < finished_at + DELIVERY_S for consumer in dead)

    async def living_without(self, task_id: str) -> Collection[str] | None:
        """Return the other instances, if none of them has a call for a task; None if one may have it.

        A killed instance receives no query, so its reply is not awaited.
        """
        token, query = secrets.token_hex(8), _Query()
        self._queries[token] = query
        try:
            async with asyncio.timeout(REPLIES_S):
                query.peers = await self._notifier.request(QUERY, id=task_id, token=token)
                if query.peers is None:
                    return None
                query.settle()
                return None if await query.is_found else query.absent
        except TimeoutError:
            return None
        finally:
            del self._queries[token]

    def _on_query(self, message: Message) -> None:
        task_id = message.get("id")
        found = task_id in self._open or task_id in self._answered
        self._notifier.publish(REPLY, token=message.get("token"), found=found)

    def _on_reply(self, message: Message) -> None:
        query = self._queries.get(str(message.get("token")))
        if query is None or query.is_found.done():
            return
        if message.get("found") is not False:
            query.is_found.set_result(True)
            return
        query.absent.add(str(message.get("from")))
        query.settle()
