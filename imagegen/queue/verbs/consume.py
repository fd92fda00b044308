"""Reads of new entries from the stream, and the claim of expired ones."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from imagegen.queue.verbs.context import VerbContext, pairs_of
from imagegen.redis_client.keys import GROUP
from imagegen.redis_client.multiplexer import CommandBatch

Entry = tuple[str, dict[bytes, bytes]]
"""Id and fields of a stream entry."""

BLOCK_GRACE_S = 5.0
"""Time for the reply of a blocked read after its block time; later the connection counts as lost."""


async def read_waiting(context: VerbContext, consumer: str, count: int) -> list[Entry]:
    """Claim up to `count` new entries that wait already, on the shared connection.

    Raises QueueUnavailable, RedisError.
    """
    command = ("XREADGROUP", "GROUP", GROUP, consumer, "COUNT", count, "STREAMS", context.keys.stream, ">")
    (reply,) = await context.multiplexer.execute_batch(CommandBatch([command], no_resend=True))
    context.count("claim", 1)
    return _delivered(reply)


async def read_entries(context: VerbContext, consumer: str, count: int, block_s: float) -> list[Entry]:
    """Claim up to `count` new entries, and wait up to `block_s` for the first one. Raises RedisError."""
    block = ("COUNT", count, "BLOCK", int(block_s * 1000))
    command = ("XREADGROUP", "GROUP", GROUP, consumer, *block, "STREAMS", context.keys.stream, ">")
    reads = context.connection.blocking_reads
    try:
        reply = await reads.execute(*command, within_s=block_s + BLOCK_GRACE_S)
    except asyncio.CancelledError:
        await reads.close()  # else the server would deliver entries that nothing reads
        raise
    context.count("claim", 1)
    return _delivered(reply)


async def claim_expired(
    context: VerbContext, consumer: str, entry_ids: Sequence[str], min_idle_s: float, *, force: bool = False
) -> list[Entry]:
    """Claim those of the entries that were not renewed for `min_idle_s`, with `force` also those without a claim.

    Each goes to one consumer only.
    """
    async with context.connection.deadline():
        rows: Any = await context.connection.commands.xclaim(
            context.keys.stream, GROUP, consumer, int(min_idle_s * 1000), list(entry_ids), force=force
        )
    context.count("takeover", 1)
    # An entry that was deleted while it was pending has no fields.
    return [(entry_id.decode(), fields) for entry_id, fields in rows if fields]


async def delete_entries(context: VerbContext, entry_ids: Sequence[str]) -> None:
    """Delete entries and their claims. Raises QueueUnavailable, RedisError."""
    names = (context.keys.stream, GROUP, *entry_ids)
    await context.multiplexer.execute_batch(CommandBatch([("XACK", *names), ("XDEL", names[0], *entry_ids)]))
    context.count("finish", 2)


def entry_of(row: Any) -> Entry:
    """Return an entry of a raw reply: its id, and a flat list of its fields."""
    entry_id, flat = row
    return entry_id.decode(), pairs_of(flat)


def _delivered(reply: Any) -> list[Entry]:
    return [] if reply is None else [entry_of(row) for row in reply[0][1]]
