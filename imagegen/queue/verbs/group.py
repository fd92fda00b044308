"""State of the consumer group: its creation, its consumers, and its pending entries."""

from __future__ import annotations

from typing import Any, cast

from msgspec import Struct

from imagegen.errors import QueueUnavailable
from imagegen.queue.verbs.context import VerbContext, pairs_of
from imagegen.queue.verbs.move_aside import move_aside
from imagegen.redis_client.keys import GROUP
from imagegen.redis_client.redis_errors import ResponseError, wrong_type

PAGE_SIZE = 1_000
"""Pending entries that one command lists."""

NEVER_IDLE_MS = 10**12
"""An idle time that no entry has: 31 years."""


BEGUN_DELIVERIES = 1_000_000
"""Count of deliveries for the entry of a begun task, as its owner sets it: it lasts longer than the checkpoint if
Redis evicts keys. Each takeover adds one."""


class Consumer(Struct, frozen=True, gc=False):
    """A consumer of the group: the number of its pending entries, and seconds since its last read or claim."""

    name: str
    pending: int
    idle_s: float


class PendingEntry(Struct, frozen=True, gc=False):
    """A claimed entry: its consumer, and seconds since the last renewal. begun: its owner has begun the task."""

    entry_id: str
    consumer: str
    idle_s: float
    begun: bool = False


async def create_group(context: VerbContext) -> bool:
    """Create the stream and its group. Return False if they exist.

    Raises QueueUnavailable after a key of another type was moved aside: the call has to be repeated.
    """
    async with context.connection.deadline():
        try:
            await context.connection.commands.xgroup_create(context.keys.stream, GROUP, id="0", mkstream=True)
        except ResponseError as error:
            if wrong_type(error):
                await move_aside(context)
                raise QueueUnavailable from error
            if "BUSYGROUP" not in str(error):
                raise
            context.count("other", 1)
            return False
    context.count("other", 1)
    return True


async def pending_entries(context: VerbContext) -> list[PendingEntry]:
    """Return the pending entries of all instances in order, one command for each `PAGE_SIZE` of them."""
    entries: list[PendingEntry] = []
    low = "-"
    while True:
        rows = await _group_rows(context, "takeover", "XPENDING", context.keys.stream, GROUP, low, "+", PAGE_SIZE)
        entries += [
            PendingEntry(
                entry_id.decode(), consumer.decode(errors="replace"), idle_ms / 1000, deliveries >= BEGUN_DELIVERIES
            )
            for entry_id, consumer, idle_ms, deliveries in rows
        ]
        if len(rows) < PAGE_SIZE:
            return entries
        low = f"({entries[-1].entry_id}"


async def length(context: VerbContext) -> int:
    """Return the number of entries, claimed ones included."""
    count = cast(int, await context.multiplexer.execute("XLEN", context.keys.stream))
    context.count("takeover", 1)
    return count


async def consumers(context: VerbContext) -> list[Consumer]:
    """Return the consumers of the group; none if there is no group."""
    rows = await _group_rows(context, "takeover", "XINFO", "CONSUMERS", context.keys.stream, GROUP)
    return [
        Consumer(row[b"name"].decode(errors="replace"), row[b"pending"], row[b"idle"] / 1000)
        for row in map(pairs_of, rows)
    ]


async def last_delivered(context: VerbContext) -> str:
    """Return the id of the last entry that the group delivered to any instance, `0-0` if there is no group."""
    for row in map(pairs_of, await _group_rows(context, "read", "XINFO", "GROUPS", context.keys.stream)):
        if row.get(b"name") == GROUP.encode():
            return str(row[b"last-delivered-id"].decode())
    return "0-0"


async def transfer_entry(context: VerbContext, consumer: str, entry_id: str) -> None:
    """Make a pending entry pending for another consumer, which has started its task."""
    await _group_rows(context, "restore", "XCLAIM", context.keys.stream, GROUP, consumer, 0, entry_id, "JUSTID")


async def mark_begun(context: VerbContext, consumer: str, entry_id: str) -> None:
    """Set the count of deliveries of an entry that the consumer surely holds to that of begun tasks."""
    count = ("RETRYCOUNT", BEGUN_DELIVERIES, "JUSTID")
    await _group_rows(context, "start", "XCLAIM", context.keys.stream, GROUP, consumer, 0, entry_id, *count)


async def probe_claim(context: VerbContext, consumer: str, entry_id: str) -> None:
    """Claim an entry that was not renewed for years, so none: Redis answers it only if it takes writes now.

    Raises QueueUnavailable, RedisError.
    """
    command = ("XCLAIM", context.keys.stream, GROUP, consumer, NEVER_IDLE_MS, entry_id, "JUSTID")
    await _group_rows(context, "takeover", *command)


async def _group_rows(context: VerbContext, purpose: str, *command: str | int) -> list[Any]:
    """Run a command of the group. Return no rows if there is no stream or no group."""
    try:
        rows = cast(list[Any], await context.multiplexer.execute(*command))
    except ResponseError as error:
        if "NOGROUP" not in str(error) and "no such key" not in str(error):
            raise
        rows = []
    context.count(purpose, 1)
    return rows
