"""Names and due times of the outbox, the sorted set of webhooks that are still to be delivered."""

from __future__ import annotations

from collections.abc import Sequence

from imagegen.queue.verbs.context import VerbContext
from imagegen.redis_client.multiplexer import Arg

OUTBOX_GRACE_S = 60.0
"""Time for which an outbox entry belongs to the instance that wrote it or claimed it."""


def outbox_name(task_id: str, epoch: int, number: int | None = None) -> str:
    """Return the name of the webhooks that waited for the end of an epoch.

    Args:
        number: of a single webhook that was added after the end.
    """
    return f"{task_id}:{epoch}" if number is None else f"{task_id}:{epoch}:{number}"


def outbox_due_ms(now: float) -> int:
    """Return when another instance may claim names that are written to the outbox now, Unix time in ms."""
    return int((now + OUTBOX_GRACE_S) * 1000)


async def restore_outbox(context: VerbContext, names: Sequence[str]) -> None:
    """Add names to the outbox that are missing there."""
    due_ms = outbox_due_ms(context.connection.clock())
    scores: list[Arg] = []
    for name in names:
        scores += (due_ms, name)
    await context.multiplexer.execute("ZADD", context.keys.outbox, "NX", *scores)
    context.count("restore", 1)
