"""Verb `submit`: batched calls of submit.lua, which enqueues tasks or returns the records in their way."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Literal

from msgspec import Struct

from imagegen.queue.codec import VERSION, encode_entry, encode_task
from imagegen.queue.depth import DepthEstimate
from imagegen.queue.verbs.context import VerbContext
from imagegen.redis_client.batcher import Batcher
from imagegen.redis_client.keys import GROUP
from imagegen.redis_client.lua import load_script
from imagegen.redis_client.multiplexer import CommandBatch
from imagegen.tasks.task import Task

_SCRIPT = load_script(__package__, "submit")

_MEASURE_COST = 2
"""XPENDING and XLEN."""

_NEW_COST, _AGAIN_COST, _EXISTING_COST, _EXISTING_WHILE_FULL_COST = 2, 5, 3, 1

_UNFINISHED = (b"pending", b"processing")
"""States in which the script looks up whether the entry is still in the stream."""


class SubmitItem(Struct, frozen=True, gc=False):
    """A pending task in its stored form; replaced_epoch: of a task to replace, finished or without an entry."""

    task_id: str
    epoch: int
    digest: str
    entry: bytes
    record: bytes
    replaced_epoch: int | None


class SubmitReply(Struct, frozen=True, gc=False):
    """kind: see submit.lua; existing: the record that is in Redis, empty if the task was enqueued."""

    kind: Literal["new", "again", "known", "full", "collision", "newer", "gone"]
    entry_id: str
    epoch: int
    existing: bytes


def submit_item(task: Task, replaced_epoch: int | None = None) -> SubmitItem:
    """Encode a pending task."""
    record = encode_task(task, with_request=False)
    return SubmitItem(task.id, task.epoch, task.digest, encode_entry(task), record, replaced_epoch)


class Submit:
    """Batcher of submits. It measures the depth of the queue when the estimate is stale.

    Args:
        on_added: called after each batch that enqueued a task.
    """

    def __init__(self, context: VerbContext, depth: DepthEstimate, on_added: Callable[[], None]) -> None:
        self._context = context
        self._depth = depth
        self._on_added = on_added
        self._batcher = Batcher[SubmitItem, SubmitReply](
            context.multiplexer, self._encode, self._decode, lambda item: len(item.entry)
        )

    def __call__(self, item: SubmitItem) -> asyncio.Future[SubmitReply]:
        """Submit a task with the next batch."""
        return self._batcher(item)

    def _encode(self, items: list[SubmitItem]) -> CommandBatch:
        depth, keys = self._depth, [self._context.keys.stream]
        measure = depth.limit if depth.stale else ""
        args: list[Any] = [GROUP, depth.capacity, measure, self._context.record_ttl_ms]
        for item in items:
            keys.append(self._context.keys.record(item.task_id))
            args += (item.epoch, item.digest, item.entry, item.record, item.replaced_epoch or "", VERSION)
        return _SCRIPT.asked(keys, args)

    def _decode(self, _items: list[SubmitItem], results: list[Any]) -> list[SubmitReply]:
        depth, ((measured, rows),) = self._depth, results
        replies = [
            SubmitReply(kind.decode(), entry.decode(), int(epoch or 0), existing)
            for kind, entry, epoch, existing in rows
        ]
        added = sum(bool(reply.entry_id) for reply in replies)
        if replies and (entry_id := replies[-1].entry_id):
            self._context.connection.clock.learn(int(entry_id.partition("-")[0]) / 1000)
        was_measured = measured >= 0
        capacity = depth.limit - measured if was_measured else depth.capacity
        self._context.count("submit", submit_cost(replies, capacity) + was_measured * _MEASURE_COST)
        depth.submitted(added, measured if was_measured else None)
        if added:
            self._on_added()
        return replies


def submit_cost(replies: Sequence[SubmitReply], capacity: int) -> int:
    """Return the commands of one script call; capacity: of the queue, before the first task."""
    commands = 1
    for reply in replies:
        if reply.kind == "again":
            commands += _AGAIN_COST
        elif reply.entry_id:
            commands += _NEW_COST
        else:
            commands += _EXISTING_COST if capacity > 0 else _EXISTING_WHILE_FULL_COST
            commands += reply.kind in ("known", "gone") and reply.existing.split(b" ", 2)[1] in _UNFINISHED
        capacity -= bool(reply.entry_id)
    return commands
