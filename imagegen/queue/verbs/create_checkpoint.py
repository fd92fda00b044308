"""Verb `create_checkpoint`: batched first checkpoints, one script if there are several, else plain commands."""

from __future__ import annotations

import asyncio
from types import NoneType
from typing import Any

from msgspec import Struct

from imagegen.queue.verbs.context import VerbContext
from imagegen.redis_client.lua import load_script
from imagegen.redis_client.multiplexer import Batcher, CommandBatch
from imagegen.redis_client.replies import items_of

_SCRIPT = load_script(__package__, "create_checkpoint")

MIN_SCRIPT_TASKS = 3
"""From this size a batch is one script: it costs one command more, and a third of the time."""


class _NewCheckpoint(Struct, frozen=True, gc=False):
    task_id: str
    value: bytes


class CreateCheckpoint:
    """Batcher of first checkpoints. A reply is the checkpoint that is already there, None if ours was written."""

    def __init__(self, context: VerbContext) -> None:
        self._context, self._prefix = context, context.keys.checkpoint("")
        self._batcher = Batcher[_NewCheckpoint, bytes | None](context.multiplexer, self._encode, self._decode)

    def __call__(self, task_id: str, value: bytes) -> asyncio.Future[bytes | None]:
        """Write a checkpoint with the next batch, unless there is one."""
        return self._batcher(_NewCheckpoint(task_id, value))

    def _encode(self, items: list[_NewCheckpoint]) -> CommandBatch:
        keys = [self._prefix + item.task_id for item in items]
        ttl_ms = self._context.checkpoint_ttl_ms
        if len(items) >= MIN_SCRIPT_TASKS:
            return _SCRIPT.batch(keys, [ttl_ms, *(item.value for item in items)])
        options = ("NX", "GET", "PX", ttl_ms)
        return CommandBatch([("SET", key, item.value, *options) for key, item in zip(keys, items, strict=True)])

    def _decode(self, items: list[_NewCheckpoint], results: list[Any]) -> list[bytes | None]:
        is_script = len(items) >= MIN_SCRIPT_TASKS
        existing: list[bytes | None] = items_of(results[0] if is_script else results, bytes, NoneType)
        self._context.count("start", len(items) + is_script)  # a SET each
        return [None if value == item.value else value for value, item in zip(existing, items, strict=True)]
