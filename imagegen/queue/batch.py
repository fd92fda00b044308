"""Owns group commit: calls of one event-loop turn go to Redis as one, and each caller gets its own answer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

Item = TypeVar("Item")
Answer = TypeVar("Answer")

MAX_ITEMS = 200
MAX_IN_FLIGHT = 4
MAX_AT_ONCE = MAX_ITEMS * MAX_IN_FLIGHT
"""Items on their way together. Redis takes the sends in any order, as each goes over a connection of its own."""


class Batcher(Generic[Item, Answer]):
    """Collects items until the turn ends, then sends them together; while `max_in_flight` sends run, more collect.

    send: gets the items and the event-loop time by which it must have answered; returns one answer an item, in order.
    deadline_s: from the first item's arrival, over waiting and sending.
    """

    def __init__(
        self,
        send: Callable[[list[Item], float], Awaitable[Sequence[Answer]]],
        *,
        deadline_s: float,
        max_items: int = MAX_ITEMS,
        max_in_flight: int = MAX_IN_FLIGHT,
    ) -> None:
        self._send = send
        self._deadline_s = deadline_s
        self._max_items = max_items
        self._max_in_flight = max_in_flight
        self._waiting: list[tuple[Item, asyncio.Future[Answer]]] = []
        self._first_at = 0.0
        self._scheduled = False
        self._running: set[asyncio.Task[None]] = set()

    def __call__(self, item: Item) -> asyncio.Future[Answer]:
        """Puts an item in; the future brings its answer, or the error of the whole send."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Answer] = loop.create_future()
        if not self._waiting:
            self._first_at = loop.time()
        self._waiting.append((item, answer))
        if not self._scheduled:
            self._schedule(loop)
        return answer

    def _schedule(self, loop: asyncio.AbstractEventLoop) -> None:
        """Has what waits sent in the next turn, when all that this turn brings is there."""
        if len(self._running) < self._max_in_flight:
            self._scheduled = True
            sending = loop.create_task(self._run())
            self._running.add(sending)
            sending.add_done_callback(self._sent)

    def _sent(self, sending: asyncio.Task[None]) -> None:
        self._running.discard(sending)
        if self._waiting and not self._scheduled:
            self._schedule(sending.get_loop())

    async def _run(self) -> None:
        self._scheduled = False
        batch, self._waiting = self._waiting[: self._max_items], self._waiting[self._max_items :]
        deadline = self._first_at + self._deadline_s
        if self._waiting:
            self._schedule(asyncio.get_running_loop())
        try:
            answers = await self._send([item for item, _ in batch], deadline)
        except BaseException as error:
            for _, future in batch:
                if not future.done():
                    future.set_exception(error if isinstance(error, Exception) else asyncio.CancelledError())
                    future.exception()
            if not isinstance(error, Exception):
                raise
            return
        for (_, future), answer in zip(batch, answers, strict=True):
            if not future.done():
                future.set_result(answer)
