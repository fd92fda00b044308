"""Verb `replace_checkpoint`: batched writes of checkpoints of claims that are surely ours, one plain command each.

`compare_and_set` costs three commands. Here the reply shows afterwards if another value was there, which only a cancel
of the task can have written meanwhile: its entry is gone then, so nothing runs from the value that was written.
"""

from __future__ import annotations

import asyncio
from typing import Any

from imagegen.queue.verbs.compare_and_set import CompareAndSetItem
from imagegen.queue.verbs.context import VerbContext
from imagegen.redis_client.multiplexer import Batcher, CommandBatch


class ReplaceCheckpoint:
    """Batcher of checkpoint writes. A reply is `b''`, or the checkpoint that was there if it was another one."""

    def __init__(self, context: VerbContext) -> None:
        self._context = context
        self._batcher = Batcher[CompareAndSetItem, bytes](context.multiplexer, self._encode, self._decode)

    def __call__(self, item: CompareAndSetItem) -> asyncio.Future[bytes]:
        """Write a checkpoint with the next batch."""
        return self._batcher(item)

    def _encode(self, items: list[CompareAndSetItem]) -> CommandBatch:
        key_of, ttl_ms = self._context.keys.checkpoint, self._context.checkpoint_ttl_ms
        return CommandBatch([("SET", key_of(item.task_id), item.value, "GET", "PX", ttl_ms) for item in items])

    def _decode(self, items: list[CompareAndSetItem], results: list[Any]) -> list[bytes]:
        self._context.count("start", len(items))
        return [
            b"" if before in (None, item.expected, item.value) else before
            for before, item in zip(results, items, strict=True)
        ]
