"""Verb `restore_claims`: claims that Redis has lost are written back by the instance that holds them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from msgspec import Struct

from imagegen.queue.claim import Claim
from imagegen.queue.codec import encode_entry, encode_task, version_of
from imagegen.queue.verbs.context import VerbContext
from imagegen.queue.verbs.restore_batch import count_restore
from imagegen.redis_client.keys import GROUP
from imagegen.redis_client.lua import load_script

_SCRIPT = load_script(__package__, "entries", "restore_claims")


class RestoredClaim(Struct, frozen=True, gc=False):
    """Result for one claim.

    kind: `held` means that nothing was missing; checkpoint: its bytes in Redis, empty if there is none.
    """

    kind: Literal["held", "restored", "lost"]
    entry_id: str
    checkpoint: bytes


async def restore_claims(context: VerbContext, consumer: str, claims: Sequence[Claim]) -> list[RestoredClaim]:
    """Restore the entry, pending entry, checkpoint and record of claims that `consumer` holds."""
    keys = [context.keys.stream]
    args: list[Any] = [GROUP, consumer, context.checkpoint_ttl_ms, context.record_ttl_ms]
    for claim in claims:
        task = claim.task
        keys += (context.keys.record(task.id), context.keys.checkpoint(task.id))
        checkpoint = b"" if claim.stored_bytes is None else claim.stored_bytes.partition(b" ")[2]
        args += (claim.entry_id, task.epoch, task.digest, version_of(task), encode_entry(task))
        args += (encode_task(task, with_request=False), checkpoint)
    rows = await context.run(_SCRIPT, keys, args)
    count_restore(context, len(claims))
    return [
        RestoredClaim(kind.decode(), entry_id.decode(), checkpoint)
        for kind, entry_id, checkpoint in zip(rows[::3], rows[1::3], rows[2::3], strict=True)
    ]
