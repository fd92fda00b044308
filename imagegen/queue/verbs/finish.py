"""Verb `finish`: batched calls of finish.lua, which writes the final records of tasks."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from imagegen.queue.codec import decode_cost, final_record, with_delivery_log
from imagegen.queue.lines import ClientLines, MovedTasks
from imagegen.queue.verbs.budget_counters import BUDGETS_TTL_S, NO_CHANGE, budget_keys, settlement
from imagegen.queue.verbs.context import VerbContext
from imagegen.queue.verbs.line_args import NO_LINES, add_line_args
from imagegen.queue.verbs.outbox_entry import outbox_due_ms, outbox_name
from imagegen.redis_client.keys import GROUP
from imagegen.redis_client.lua import load_script
from imagegen.redis_client.multiplexer import Batcher, CommandBatch
from imagegen.tasks.cost import Cost
from imagegen.tasks.task import Task, pending_deliveries

_SCRIPT = load_script(__package__, "billed", "lines", "line_args", "budget", "finish")


class FinishItem(Struct, frozen=True, gc=False):
    """A final task with its encoded record, the id of the entry that carried it, and what budgets get."""

    entry_id: str
    final: Task
    record: bytes
    settlement: str


class FinishReply(Struct, frozen=True, gc=False):
    """Reply to `finish` and `cancel`.

    Args:
        existing: the record that was there first, empty if ours was stored.
        delivery_log: the log of webhooks that were added meanwhile, else empty.
        possibly_billed_twice: the count in the stored record if the existing record had a higher one, else 0.
        cost: JSON of the cost in the stored record if it is that of another instance, else empty.
    """

    existing: bytes
    delivery_log: bytes
    possibly_billed_twice: int = 0
    cost: bytes = b""


def finish_item(entry_id: str, final: Task, cost: Cost | None = None) -> FinishItem:
    """Encode a final task. An error is raised here, before the task joins a batch with others.

    cost: of the task before its end, as budgets hold it.
    """
    return FinishItem(entry_id, final, final_record(final), settlement(cost))


def as_stored(final: Task, reply: FinishReply) -> Task:
    """Return the final task as Redis has it now: with the webhooks and the count that others added."""
    if reply.possibly_billed_twice:
        cost = decode_cost(reply.cost) if reply.cost else final.cost
        final = replace(final, possibly_billed_twice=reply.possibly_billed_twice, cost=cost)
    return with_delivery_log(final, reply.delivery_log)


def record_moves(lines: ClientLines, rows: Sequence[Any], ended: Sequence[Task]) -> int:
    """Record what a script did to lines, and return how many commands that were.

    rows: for each line its client, and what `move` of lines.lua returned.
    ended: tasks that left the stream.
    """
    commands, clients = 0, set[str]()
    for name, *row in rows:
        moved, client = MovedTasks.decode(row), name.decode()
        lines.left(client, moved)
        clients.add(client)
        commands += moved.commands
    for task in ended:
        if task.client:
            lines.left_stream(task, is_line_moved=task.client in clients)
    return commands


class Finish:
    """Batcher of final records."""

    def __init__(self, context: VerbContext, lines: ClientLines) -> None:
        self._context, keys = context, context.keys
        self._shared_keys = keys.stream, keys.outbox
        self._record_prefix, self._log_prefix = keys.record(""), keys.delivery_log("")
        self._lines = lines
        self._batcher = Batcher[FinishItem, FinishReply](
            context.multiplexer, self._encode, self._decode, lambda item: len(item.record)
        )

    def __call__(self, item: FinishItem) -> asyncio.Future[FinishReply]:
        """Write a final record with the next batch."""
        return self._batcher(item)

    def _encode(self, items: list[FinishItem]) -> CommandBatch:
        keys = [*self._shared_keys]
        args: list[Any] = [GROUP, self._context.result_ttl_ms, outbox_due_ms(self._context.connection.clock())]
        settlements = [item.settlement for item in items if item.settlement]
        budgets = budget_keys(self._context.keys, settlements) if settlements else []
        args += (len(budgets), BUDGETS_TTL_S)
        for item in items:
            final = item.final
            keys += (self._record_prefix + final.id, self._log_prefix + final.id)
            args += (item.entry_id, final.epoch, item.record)
            args += (outbox_name(final.id, final.epoch), "1" if pending_deliveries(final) else "", item.settlement)
        keys += budgets
        if self._lines.by_client:
            add_line_args(self._context, keys, args, [self._lines.line_of(item.final.client) for item in items])
        else:
            args += (self._context.record_ttl_ms, *NO_LINES)
        return _SCRIPT.batch(keys, args)

    def _decode(self, items: list[FinishItem], results: list[Any]) -> list[FinishReply]:
        ((rows, budgets, line_rows),) = results
        replies = [FinishReply(*row) for row in rows]
        ended = [item.final for item, reply in zip(items, replies, strict=True) if not reply.existing]
        cost = record_moves(self._lines, line_rows, ended)
        if budgets != NO_CHANGE:
            cost += self._context.budgets.learn(budgets)
        self._context.count("finish", 2 + 2 * len(items) + cost)  # XACK; XDEL and SET (or GET) for each task
        logs = sum(bool(reply.delivery_log) for reply in replies)
        is_outbox_written = logs > 0 or any(pending_deliveries(item.final) for item in items)
        self._context.count("hooks", logs + is_outbox_written)
        return replies
