"""Verb `cancel`: end of an unfinished task. Its entry is removed, so that no instance starts or finishes it.

A client that is not the last one of the task leaves it.
"""

from __future__ import annotations

from msgspec import Struct
from msgspec.structs import replace

from imagegen.queue.checkpoint import cancelled_checkpoint, decode_checkpoint
from imagegen.queue.codec import UnreadableRecord, final_record
from imagegen.queue.lines import ClientLines
from imagegen.queue.verbs.budget_counters import BUDGETS_TTL_S, budget_keys, settlement
from imagegen.queue.verbs.context import VerbContext
from imagegen.queue.verbs.finish import FinishReply, as_stored, record_moves
from imagegen.queue.verbs.line_args import add_line_args
from imagegen.queue.verbs.outbox_entry import outbox_due_ms, outbox_name
from imagegen.redis_client.keys import GROUP
from imagegen.redis_client.lua import load_script
from imagegen.redis_client.multiplexer import Arg
from imagegen.tasks.cost import Cost
from imagegen.tasks.provider_job import JobHandle
from imagegen.tasks.task import IN_LINE, Task, pending_deliveries

_SCRIPT = load_script(__package__, "billed", "lines", "line_args", "budget", "joined", "cancel")


class KnownProgress(Struct, frozen=True, gc=False):
    """Checkpoint that is probably stored, empty for none, and what the task has cost by then."""

    checkpoint: bytes
    cost: Cost | None


class CancelledTask(Struct, frozen=True, gc=False):
    """A cancelled task as stored.

    handle: of the provider job that it waited for. price: of the call that began it, as its cost has it in `calling`.
    left: it is not cancelled, since it has other clients. published: whether that was published to the other instances.
    """

    task: Task
    handle: JobHandle | None = None
    price: int = 0
    left: bool = False
    published: bool = False


class CancelBy(Struct, frozen=True, gc=False):
    """The client that cancels, empty for all of them; the first clients of the task; the message if it leaves.

    channel: empty if no other instance is there.
    """

    client: str = ""
    first_clients: str = ""
    channel: str = ""
    message: bytes = b""


FOR_ALL = CancelBy()


async def cancel(
    context: VerbContext,
    lines: ClientLines,
    final: Task,
    entry_id: str,
    progress: KnownProgress | None = None,
    *,
    by: CancelBy = FOR_ALL,
) -> CancelledTask | None:
    """Cancel an epoch of a task, or leave it if it has other clients.

    Return the task as stored; None if there is no record, or the epoch is over.

    The money is settled from the checkpoint, in the same step. An existing record with the mark of this end is its own:
    the first reply was lost.

    Args:
        final: the task at its end, with the cost of its submit. entry_id: of the entry that carries it, or empty.
    """
    submitted = final.cost
    progress = progress or KnownProgress(b"", submitted)
    while True:
        cost = progress.cost
        final = replace(final, cost=cost and cost.ended(), jobs=_jobs_of(progress.checkpoint))
        row = await _run(context, lines, final, by, progress)
        if row is None:
            return None
        if isinstance(row, CancelledTask):
            return row
        existing, log, count, budgets = row
        cost_of_entry = 2 if existing == b"" and entry_id != IN_LINE else 0  # XDEL and XACK
        cost_of_clients = bool(by.client) and (existing is None or existing == b"")  # GET
        cost_of_verb = cancel_cost(existing) + cost_of_entry + cost_of_clients
        context.count("cancel", cost_of_verb + context.budgets.learn(budgets))
        if existing is not None:
            if existing and f'{final.counted_in}"'.encode() not in existing:
                return None
            return _cancelled(as_stored(final, FinishReply(existing, log, count)), progress.checkpoint)
        progress = KnownProgress(log, cost_at(log, entry_id, submitted))


def _jobs_of(checkpoint: bytes) -> tuple[str, ...]:
    try:
        return decode_checkpoint(checkpoint)[1].begun_jobs if checkpoint else ()
    except UnreadableRecord:
        return ()


def _cancelled(final: Task, checkpoint: bytes) -> CancelledTask:
    try:
        progress = decode_checkpoint(checkpoint)[1] if checkpoint else None
    except UnreadableRecord:
        progress = None
    if progress is None or progress.job is None or progress.phase == "cancelled":
        return CancelledTask(final)
    return CancelledTask(final, progress.job.handle, progress.cost.calling if progress.cost else 0)


def cost_at(checkpoint: bytes, entry_id: str, submitted: Cost | None) -> Cost | None:
    """Return what a task has cost by its checkpoint. That of another entry is of an epoch before.

    If the checkpoint is unreadable, or of an instance that records no money, its calls count as sent.
    """
    try:
        started_entry, progress = decode_checkpoint(checkpoint)
    except UnreadableRecord:
        return submitted and submitted.assumed_sent() if checkpoint else submitted
    if (entry_id and started_entry != entry_id) or progress.phase == "cancelled":
        return submitted
    if progress.cost is None and submitted is not None and (progress.calling or progress.billed_again):
        return submitted.assumed_sent()
    return progress.cost or submitted


async def _run(
    context: VerbContext, lines: ClientLines, final: Task, by: CancelBy, progress: KnownProgress
) -> tuple[bytes | None, bytes, int, list[int]] | CancelledTask | None:
    names = context.keys
    keys = [names.stream, names.outbox]
    keys += [names.record(final.id), names.checkpoint(final.id), names.delivery_log(final.id), names.joined(final.id)]
    text = settlement(progress.cost)
    args: list[Arg] = [GROUP, final.epoch, final_record(final), context.result_ttl_ms]
    args += [cancelled_checkpoint(final.jobs), context.checkpoint_ttl_ms]
    args += [outbox_due_ms(context.connection.clock()), outbox_name(final.id, final.epoch)]
    args += ["1" if pending_deliveries(final) else "", progress.checkpoint, text, BUDGETS_TTL_S]
    args += [by.client, by.first_clients, by.channel, by.message]
    keys += budget_keys(names, [text])
    add_line_args(context, keys, args, [lines.line_of(final.client)])
    row = await context.run(_SCRIPT, keys, args)
    if row is None:
        context.count("cancel", 2)
        return None
    if len(row) == 2:
        context.count("cancel", row[0])
        return CancelledTask(final, left=True, published=bool(row[1]))
    existing, log, count, budgets, line_rows = row
    context.count("cancel", record_moves(lines, line_rows, [final] if existing == b"" else []))
    return existing, log, count, budgets


def cancel_cost(existing: bytes | None) -> int:
    """Return the commands without those for its entry: GET; another GET; two SETs if the task was cancelled."""
    return 3 if existing is None else 2 if existing else 5
