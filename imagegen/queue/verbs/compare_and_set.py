"""Verb `compare_and_set`: batched writes of checkpoints that no other call has changed meanwhile."""

from __future__ import annotations

import asyncio
from typing import Any

from msgspec import Struct

from imagegen.queue.verbs.context import VerbContext
from imagegen.redis_client.lua import load_script
from imagegen.redis_client.multiplexer import Batcher, CommandBatch
from imagegen.redis_client.replies import items_of

SCRIPT = load_script(__package__, "compare_and_set")


class CompareAndSetItem(Struct, frozen=True, gc=False):
    """A checkpoint to write in place of the expected one; purpose: the meter's label of its commands."""

    task_id: str
    expected: bytes
    value: bytes
    purpose: str = "start"


class CompareAndSet:
    """Batcher of checkpoint writes. A reply is `b''` if it was written, else the checkpoint that is there."""

    def __init__(self, context: VerbContext) -> None:
        self._context = context
        self._batcher = Batcher[CompareAndSetItem, bytes](context.multiplexer, self._encode, self._decode)

    def __call__(self, item: CompareAndSetItem) -> asyncio.Future[bytes]:
        """Write a checkpoint with the next batch, if the expected one is still there."""
        return self._batcher(item)

    def _encode(self, items: list[CompareAndSetItem]) -> CommandBatch:
        args: list[Any] = [self._context.checkpoint_ttl_ms]
        for item in items:
            args += (item.expected, item.value)
        return SCRIPT.batch([self._context.keys.checkpoint(item.task_id) for item in items], args)

    def _decode(self, items: list[CompareAndSetItem], results: list[Any]) -> list[bytes]:
        existing: list[bytes] = items_of(results[0], bytes)
        self._context.count(items[0].purpose, 1)
        for item, value in zip(items, existing, strict=True):
            self._context.count(item.purpose, compare_and_set_cost(value))
        return existing


def compare_and_set_cost(existing: bytes) -> int:
    """Return the commands for one key, without the script call: GET, and SET if it was written."""
    return 1 if existing else 2
