"""Verb `cancel`: end of an unfinished task. Its entry is removed, so that no instance starts or finishes it."""

from __future__ import annotations

from imagegen.queue.codec import final_record
from imagegen.queue.verbs.context import VerbContext
from imagegen.queue.verbs.finish import FinishReply
from imagegen.queue.verbs.outbox_entry import outbox_due_ms, outbox_name
from imagegen.redis_client.keys import GROUP
from imagegen.redis_client.lua import load_script
from imagegen.redis_client.multiplexer import Arg
from imagegen.tasks.task import Task, pending_deliveries

_SCRIPT = load_script(__package__, "billed", "cancel")


async def cancel(context: VerbContext, final: Task, tombstone: bytes) -> FinishReply | None:
    """Cancel an epoch of a task. Return None if there is no record.

    Args:
        tombstone: the checkpoint to write, which shows the owner that the task is cancelled.
    """
    names = context.keys
    keys = [names.stream, names.outbox]
    keys += [names.record(final.id), names.checkpoint(final.id), names.delivery_log(final.id)]
    args: list[Arg] = [GROUP, final.epoch, final_record(final), context.result_ttl_ms]
    args += [tombstone, context.checkpoint_ttl_ms]
    args += [outbox_due_ms(context.connection.clock()), outbox_name(final.id, final.epoch)]
    args += ["1" if pending_deliveries(final) else ""]
    row = await context.run(_SCRIPT, keys, args)
    reply = None if row is None else FinishReply(*row)
    context.count("cancel", cancel_cost(reply))
    return reply


def cancel_cost(reply: FinishReply | None) -> int:
    """Return the commands: GET; XDEL, XACK and two SETs if the task was cancelled."""
    return 6 if reply is not None and reply.existing == b"" else 2
