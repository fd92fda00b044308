"""Verb `submit`: batched calls of submit.lua, which enqueues tasks or returns the records in their way."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Literal

from msgspec import Struct

from imagegen.errors import QueueUnavailable
from imagegen.queue.codec import VERSION, encode_entry, encode_task, version_of
from imagegen.queue.lines import ClientLines, Line
from imagegen.queue.verbs.budget_counters import BUDGETS_TTL_S, NO_CHANGE, Limits, budget_keys, release, reservation
from imagegen.queue.verbs.context import VerbContext
from imagegen.queue.verbs.line_args import NO_LINES, add_line_args, clients_with_lines
from imagegen.queue.verbs.move_aside import move_aside
from imagegen.redis_client.keys import GROUP
from imagegen.redis_client.lua import load_script
from imagegen.redis_client.multiplexer import MAX_AT_ONCE, Batcher, CommandBatch
from imagegen.redis_client.redis_errors import OtherServer, ResponseError, wrong_type
from imagegen.tasks.cost import Cost
from imagegen.tasks.task import IN_LINE, Task

_SCRIPT = load_script(__package__, "lines", "line_args", "judge", "budget", "submit")

_MEASURE_COST = 2
"""XPENDING and XLEN."""

_ENQUEUE_COST = 2
"""XADD and SET; a task that waits in a line costs SET, and one RPUSH for all of its line."""

_EXISTING_COST, _EXISTING_WHILE_FULL_COST = 3, 1
"""XADD, SET and XDEL; or GET, over a budget too. Nothing if the records of the batch are read first."""

_OWN_IMAGES = "images"

_UNFINISHED = (b"pending", b"processing")
"""States in which the script looks up whether the entry is still in the stream."""


class SubmitItem(Struct, frozen=True, gc=False):
    """A pending task in its stored form.

    replaced_epoch: of a task to replace, finished or without an entry.
    siblings: ids of the tasks that may have images of this one; if one has images, the task is not enqueued.
    cost: to reserve. limits: of the budgets that it counts against. replaced_cost: of an unfinished task to replace.
    line: the client with the line in which the task waits, '' if it goes to the stream.
    with_own_images: whether a failed or cancelled task of this id with images is returned, and not replaced.
    """

    task_id: str
    epoch: int
    digest: str
    entry: bytes
    record: bytes
    replaced_epoch: int | None
    version: int
    siblings: tuple[str, ...] = ()
    cost: Cost | None = None
    limits: Limits = ()
    replaced_cost: Cost | None = None
    line: str = ""
    with_own_images: bool = False


SubmitKind = Literal["new", "again", "known", "full", "collision", "newer", "gone", "siblings", "budget", "lost"]


class SubmitReply(Struct, frozen=True, gc=False):
    """Reply to one submit.

    kind: see submit.lua; existing: the record that is in Redis, empty if the task was enqueued.

    siblings: records of siblings with images, and that of the task itself if it ended with some and without success,
    if the kind is `siblings`.
    added_at: Unix time of the server at which the entry was added; 0 if none was.
    """

    kind: SubmitKind
    entry_id: str
    epoch: int
    existing: bytes
    siblings: tuple[bytes, ...] = ()
    added_at: float = 0.0


class DepthEstimate:
    """Depth of the queue. At most `limit` tasks wait in the stream, and in lines as many as those leave.

    So a client that fills the lines keeps no other one from its share of the stream.

    The depth is measured again after 0.5 % of `limit` new tasks, and with every submit while the calls in flight could
    fill the queue. A blocked read without a result shows for free that no task waits.

    lines: of clients, with tasks that wait outside of the stream. waiting: tasks that wait in it.
    """

    def __init__(self, limit: int, lines: Mapping[str, Line]) -> None:
        self.limit = limit
        self._lines = lines
        self.waiting = 0
        self._unmeasured = 0

    @property
    def in_lines(self) -> int:
        """Tasks that wait in lines."""
        return sum([line.waiting for line in self._lines.values()]) if self._lines else 0

    @property
    def capacity(self) -> int:
        """Tasks that may be added to the stream."""
        return self.limit - self.waiting

    def is_stale(self, in_lines: int) -> bool:
        """Return whether it is to be measured for a batch. in_lines: tasks that count against the limit too."""
        if self.capacity - in_lines < MAX_AT_ONCE:
            return True
        return self.waiting > 0 and self._unmeasured >= max(self.limit // 200, 1)

    def submitted(self, added: int, measured: int | None) -> None:
        """Add new tasks; measured: the depth before them, None if it was not measured."""
        self._unmeasured = 0 if measured is not None else self._unmeasured + added
        self.waiting = (self.waiting if measured is None else measured) + added

    def claimed(self, count: int) -> None:
        self.waiting = max(self.waiting - count, 0)

    def mark_empty(self) -> None:
        self.waiting = self._unmeasured = 0


class Submit:
    """Batcher of submits. It measures the depth of the queue when the estimate is stale.

    added: set after each batch that enqueued a task.
    on_loss: awaited before a submit if lost writes are written back, or if the stream is gone: an instance may run the
        task, whose record Redis lacks. Raises QueueUnavailable.
    """

    def __init__(self, context: VerbContext, depth: DepthEstimate, lines: ClientLines) -> None:
        self._context = context
        self._stream, self._record_prefix = context.keys.stream, context.keys.record("")
        self._commands = context.connection.meter.commands
        self._lines = lines
        self._depth = depth
        self.added = asyncio.Event()
        self.on_loss: Callable[[], Awaitable[None]] = _do_nothing
        self._recovered = context.connection.recovered
        self._batcher = Batcher[SubmitItem, SubmitReply](
            context.multiplexer, self._encode, self._decode, lambda item: len(item.entry)
        )

    async def __call__(
        self,
        task: Task,
        replaced_epoch: int | None = None,
        siblings: tuple[str, ...] = (),
        limits: Limits = (),
        replaced_cost: Cost | None = None,
        *,
        with_own_images: bool = False,
    ) -> SubmitReply:
        """Submit a pending task with the next batch, once more if a shared key had another type and was moved aside.

        See SubmitItem for the arguments. Raises QueueUnavailable, also while it is open what Redis has lost.
        """
        item = SubmitItem(
            task.id,
            task.epoch,
            task.digest,
            encode_entry(task),
            encode_task(task, with_request=False),
            replaced_epoch,
            version_of(task),
            siblings,
            task.cost,
            limits,
            replaced_cost,
            task.client if task.entry_id == IN_LINE else "",
            with_own_images,
        )
        reply = await self._sent(item) if self._recovered.is_set() else None
        if reply is None:
            await self.on_loss()
            reply = await self._sent(item)
        if reply is None:
            raise QueueUnavailable(headers={"Retry-After": "2"})
        return reply

    async def _sent(self, item: SubmitItem) -> SubmitReply | None:
        """Return the reply to an item; None if Redis has lost the stream, or another server answers."""
        try:
            try:
                reply = await self._batcher(item)
            except ResponseError as error:
                if not wrong_type(error):
                    raise
                await move_aside(self._context)
                reply = await self._batcher(item)
        except OtherServer:
            return None
        return None if reply.kind == "lost" else reply

    def _encode(self, items: list[SubmitItem]) -> CommandBatch:
        if not self._recovered.is_set():
            raise OtherServer
        depth, keys, siblings = self._depth, [self._stream], list[str]()
        in_lines = depth.in_lines if any(item.line for item in items) else 0
        measure = depth.limit if depth.is_stale(in_lines) else ""
        budget_texts, budgets = [("", "")] * len(items), list[str]()
        if any((item.cost and item.cost.slots) or item.replaced_cost for item in items):
            budget_texts = [(reservation(item.cost, item.limits), release(item.replaced_cost)) for item in items]
            budgets = budget_keys(self._context.keys, (text for texts in budget_texts for text in texts))
        args: list[Any] = [GROUP, depth.capacity, measure, self._context.record_ttl_ms, VERSION, len(items)]
        args += (len(budgets), BUDGETS_TTL_S, in_lines)
        for item, texts in zip(items, budget_texts, strict=True):
            keys.append(self._record_prefix + item.task_id)
            replaced = item.replaced_epoch or (_OWN_IMAGES if item.with_own_images else "")
            args += (item.epoch, item.digest, item.entry, item.record, replaced, item.version)
            args.append(len(item.siblings))
            siblings += [self._record_prefix + task_id for task_id in item.siblings]
            args += texts
        keys += siblings + budgets
        if any(item.line for item in items):
            add_line_args(self._context, keys, args, [item.line for item in items])
        else:
            args += (self._context.record_ttl_ms, *NO_LINES)
        return _SCRIPT.batch(keys, args)._replace(one_server=True)

    def _decode(self, items: list[SubmitItem], results: list[Any]) -> list[SubmitReply]:
        depth, ((measured, rows, budgets, lengths),) = self._depth, results
        replies = [
            SubmitReply(kind.decode(), entry.decode(), int(epoch or 0), existing, tuple(siblings), _added_at(entry))
            for kind, entry, epoch, existing, *siblings in rows
        ]
        added = sum(bool(reply.entry_id) and reply.entry_id != IN_LINE for reply in replies)
        was_measured = measured >= 0
        capacity = depth.limit - measured if was_measured else depth.capacity
        in_line = [bool(item.line) for item in items]
        cost = submit_cost(replies, capacity, are_read=any(item.siblings for item in items), in_line=in_line)
        if lengths:
            cost += self._record_lines(items, replies, lengths)
        if budgets != NO_CHANGE:
            cost += self._context.budgets.learn(budgets)
        self._commands["submit"] += cost + was_measured * _MEASURE_COST
        depth.submitted(added, measured if was_measured else None)
        if added:
            self.added.set()
        return replies

    def _record_lines(self, items: list[SubmitItem], replies: list[SubmitReply], lengths: list[int]) -> int:
        """Record the tasks that were added to lines. Return the number of commands beyond one for each task."""
        commands = 0
        for client, length in zip(clients_with_lines([item.line for item in items]), lengths, strict=True):
            added = [
                item.task_id
                for item, reply in zip(items, replies, strict=True)
                if item.line == client and reply.entry_id == IN_LINE
            ]
            if added:
                commands += 1 + 2 * (length == len(added))  # RPUSH; SADD and EXISTS
                self._lines.added(client, added, length)
        return commands


async def _do_nothing() -> None:
    return


def _added_at(entry_id: bytes) -> float:
    """Return the Unix time in the id of a new entry, 0 if the task has none in the stream."""
    milliseconds = entry_id.partition(b"-")[0]
    return int(milliseconds) / 1000 if milliseconds.isdigit() else 0.0


def submit_cost(
    replies: Sequence[SubmitReply], capacity: int, *, are_read: bool, in_line: Sequence[bool] | None = None
) -> int:
    """Return the commands of one script call, without those for lines.

    Args:
        in_line: for each task whether it was to wait in a line; None: no task was.
        capacity: of the stream, before the first task.
        are_read: whether one MGET reads the records of all tasks first.
    """
    commands, in_line = 1 + are_read, in_line or [False] * len(replies)
    for reply, is_in_line in zip(replies, in_line, strict=True):
        commands += (1 if is_in_line else _ENQUEUE_COST) * bool(reply.entry_id)
        if not are_read and not (reply.kind == "new" and reply.entry_id):
            is_read = capacity <= 0 or reply.kind == "budget" or is_in_line
            commands += _EXISTING_WHILE_FULL_COST if is_read else _EXISTING_COST
        if reply.kind in ("known", "gone"):
            commands += reply.existing.split(b" ", 2)[1] in _UNFINISHED
        capacity -= bool(reply.entry_id) and not is_in_line
    return commands
