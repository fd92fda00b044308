"""Verb `release`: return of claims to the queue, without a count of the attempt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from msgspec import Struct
from msgspec.structs import replace

from imagegen.queue.claim import Claim
from imagegen.queue.codec import encode_entry, version_of
from imagegen.queue.eta import entry_order
from imagegen.queue.verbs.context import VerbContext, batched
from imagegen.redis_client.keys import GROUP
from imagegen.redis_client.lua import load_script
from imagegen.tasks.cost import INTERRUPTED

_SCRIPT = load_script(__package__, "owned", "release")

MAX_RELEASED = 100
"""Claims of one script call, so that other clients of Redis wait only a few ms."""


class ReleaseItem(Struct, frozen=True, gc=False):
    """A claim to release; checkpoint: without its entry id, empty if none was written."""

    task_id: str
    entry_id: str
    epoch: int
    entry: bytes
    checkpoint: bytes
    version: int


def release_item(claim: Claim) -> ReleaseItem:
    """Encode a claim. A call that was cut off may have been paid, but does not count as an attempt.

    The entry has the count of calls too, since Redis may evict the checkpoint and keep the stream.
    """
    checkpoint, task = claim.checkpoint, claim.task
    stored, begun_calls = b"", task.begun_calls
    if claim.stored_bytes is not None:
        if checkpoint.phase == "calling":
            ambiguous_calls = checkpoint.ambiguous_calls + checkpoint.calling
            cost = claim.cost.lost(INTERRUPTED) if checkpoint.calling else checkpoint.cost
            attempts = checkpoint.attempts - 1
            checkpoint = replace(checkpoint, ambiguous_calls=ambiguous_calls, attempts=attempts, cost=cost)
        stored = replace(checkpoint, phase="released").encode("").strip()
        begun_calls = checkpoint.billed_again + (checkpoint.is_paid or checkpoint.has_new_images)
        task = replace(task, cost=claim.cost if checkpoint.cost is None else checkpoint.cost)
    entry = encode_entry(replace(task, begun_calls=begun_calls) if begun_calls else task)
    return ReleaseItem(task.id, claim.entry_id, task.epoch, entry, stored, version_of(task))


async def release(context: VerbContext, consumer: str, items: Sequence[ReleaseItem], *, leaving: bool = False) -> int:
    """Release claims of a consumer. Return how many of them were still its own.

    Args:
        leaving: whether to remove the consumer too, if it holds nothing more.
    """
    released = 0
    ordered = sorted(items, key=lambda item: entry_order(item.entry_id))
    pages = list(batched(ordered, MAX_RELEASED, lambda item: len(item.entry))) or [[]]
    for number, page in enumerate(pages, 1):
        released += await _release_page(context, consumer, page, leaving=leaving and number == len(pages))
    return released


async def _release_page(context: VerbContext, consumer: str, items: Sequence[ReleaseItem], *, leaving: bool) -> int:
    keys = [context.keys.stream]
    args: list[Any] = [GROUP, consumer, "1" if leaving else "", context.record_ttl_ms]
    args += (items[0].entry_id, items[-1].entry_id) if items else ("-", "+")
    for item in items:
        keys += (context.keys.record(item.task_id), context.keys.checkpoint(item.task_id))
        args += (item.entry_id, item.version, item.epoch, item.entry, item.checkpoint)
    released, moved = cast(list[int], await context.run(_SCRIPT, keys, args))
    context.count("release", 2 + released * 6 + moved + 2 * leaving)  # GET or SET of a checkpoint; both if it moves
    return released
