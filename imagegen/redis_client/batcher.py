"""Group commit: items of one event-loop turn go to Redis in one batch, and each caller gets its own result."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Generic, TypeVar

from imagegen.redis_client.multiplexer import DEADLINE_S, CommandBatch, Multiplexer

Item = TypeVar("Item")
Reply = TypeVar("Reply")

MAX_ITEMS = 200
MAX_BYTES = 2**20
"""Limits of a batch. All calls share one connection, and small ones wait behind a large one."""

MAX_IN_FLIGHT = 4
MAX_AT_ONCE = MAX_ITEMS * MAX_IN_FLIGHT
"""Items in flight together."""


def batched(items: Sequence[Item], most: int, size: Callable[[Item], int] | None = None) -> Iterator[list[Item]]:
    """Yield the items in order, in batches of at most `most` items and about `MAX_BYTES` bytes."""
    batch: list[Item] = []
    total = 0
    for item in items:
        batch.append(item)
        total += size(item) if size else 0
        if len(batch) >= most or total >= MAX_BYTES:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


class Batcher(Generic[Item, Reply]):
    """Collector of the items of a turn, sent in one batch; with four batches in flight, items wait for the next.

    A result or an error is set within `DEADLINE_S` of the first item's arrival.

    Args:
        encode: returns the commands for some items.
        decode: returns one result for each item, in order, from the replies.
        size: returns the approximate bytes of an item; only needed for large ones.
    """

    def __init__(
        self,
        wire: Multiplexer,
        encode: Callable[[list[Item]], CommandBatch],
        decode: Callable[[list[Item], list[Any]], Sequence[Reply]],
        size: Callable[[Item], int] | None = None,
    ) -> None:
        self._wire = wire
        self._encode = encode
        self._decode = decode
        self._size = size
        self._waiting: list[tuple[Item, asyncio.Future[Reply], float]] = []
        self._in_flight = 0

    def __call__(self, item: Item) -> asyncio.Future[Reply]:
        """Add an item. Return a future of its result, or of the error of the whole batch."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Reply] = loop.create_future()
        if not self._waiting and self._in_flight < MAX_IN_FLIGHT:
            self._wire.on_turn_end(self._flush)
        self._waiting.append((item, answer, loop.time() + DEADLINE_S))
        return answer

    def _flush(self) -> None:
        while self._waiting and self._in_flight < MAX_IN_FLIGHT:
            count = self._count()
            batch, self._waiting = self._waiting[:count], self._waiting[count:]
            items, futures, deadline = [item for item, _, _ in batch], [future for _, future, _ in batch], batch[0][2]
            self._in_flight += 1
            try:
                self._wire.send(self._encode(items), partial(self._answered, items, futures), deadline)
            except Exception as error:  # noqa: BLE001 - every error goes to the callers
                self._answered(items, futures, error)

    def _count(self) -> int:
        """Return how many waiting items fit into the next batch."""
        if self._size is None:
            return MAX_ITEMS
        size = 0
        for count, (item, _, _) in enumerate(self._waiting[:MAX_ITEMS]):
            if size >= MAX_BYTES:
                return count
            size += self._size(item)
        return MAX_ITEMS

    def _answered(
        self, items: list[Item], futures: list[asyncio.Future[Reply]], replies: list[Any] | Exception
    ) -> None:
        self._in_flight -= 1
        if self._waiting:
            self._wire.on_turn_end(self._flush)
        try:
            if isinstance(replies, Exception):
                raise replies
            for future, answer in zip(futures, self._decode(items, replies), strict=True):
                if not future.done():
                    future.set_result(answer)
        except Exception as error:  # noqa: BLE001
            for future in futures:
                if not future.done():
                    future.set_exception(error)
                    future.exception()
