"""Verb `renew`: renewal of the leases of claims."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from imagegen.queue.eta import entry_order
from imagegen.queue.verbs.context import VerbContext, batched
from imagegen.queue.verbs.group import BEGUN_DELIVERIES
from imagegen.redis_client.keys import GROUP
from imagegen.redis_client.lua import load_script
from imagegen.redis_client.multiplexer import Arg

_SCRIPT = load_script(__package__, "owned", "renew")

MAX_RENEWED = 500
"""Claims of one script call, so that other clients of Redis wait only a few ms."""


class Renewal(Struct, frozen=True, gc=False):
    """Entry ids after a renewal.

    lost: the consumer does not hold them any more. unlisted: it holds them, and they are not among the claims.
    without_checkpoint: it holds them, and Redis has lost their checkpoint.
    """

    lost: set[str]
    unlisted: list[str]
    without_checkpoint: list[str]


async def renew(context: VerbContext, consumer: str, claims: Sequence[tuple[str, str]]) -> Renewal:
    """Renew claims, each a task id and an entry id. An empty task id means that there is no checkpoint to renew."""
    renewal = Renewal(set(), [], [])
    pages = list(batched(sorted(claims, key=_entry_order), MAX_RENEWED)) or [[]]
    low, stream = "-", context.keys.stream
    for number, page in enumerate(pages, 1):
        high = "+" if number == len(pages) else page[-1][1]
        keys = [stream, *(context.keys.checkpoint(task_id) if task_id else stream for task_id, _ in page)]
        args: list[Arg] = [GROUP, consumer, context.checkpoint_ttl_ms, low, high, BEGUN_DELIVERIES]
        args += (entry_id for _, entry_id in page)
        lost_ids, unlisted_ids, ids_without_checkpoint = await context.run(_SCRIPT, keys, args)
        renewed = [task_id for task_id, entry_id in page if entry_id.encode() not in lost_ids]
        context.count("renew", renew_cost(renewed))
        renewal.lost.update(entry_id.decode() for entry_id in lost_ids)
        renewal.unlisted.extend(entry_id.decode() for entry_id in unlisted_ids)
        renewal.without_checkpoint.extend(entry_id.decode() for entry_id in ids_without_checkpoint)
        low = f"({high}"
    return renewal


def renew_cost(renewed_task_ids: Sequence[str]) -> int:
    """Return the commands of one script call: XPENDING, a PEXPIRE for each checkpoint, an XCLAIM with and without."""
    return 2 + sum(map(bool, renewed_task_ids)) + len(set(map(bool, renewed_task_ids)))


def _entry_order(claim: tuple[str, str]) -> int:
    return entry_order(claim[1])
