"""Verb `start_fenced`: write of a checkpoint only if Redis confirms that the claim is ours."""

from __future__ import annotations

from typing import cast

from msgspec import Struct

from imagegen.queue.codec import encode_cost_if_sent
from imagegen.queue.verbs.context import VerbContext
from imagegen.redis_client.keys import GROUP
from imagegen.redis_client.lua import load_script
from imagegen.redis_client.multiplexer import Arg
from imagegen.tasks.cost import Cost

_SCRIPT = load_script(__package__, "entries", "billed", "budget", "start_fenced")


class FencedStart(Struct, frozen=True, gc=False):
    """Checkpoint of a task that another instance may hold, or may have started before.

    Args:
        expected: the checkpoint that is probably there, empty for none.
        value: the checkpoint to write.
        possibly_billed_twice: provider calls that may have been paid twice.
        cost: what the task has cost by now.
    """

    task_id: str
    epoch: int
    entry_id: str
    expected: bytes
    value: bytes
    possibly_billed_twice: int
    cost: Cost | None


async def start_fenced(context: VerbContext, consumer: str, item: FencedStart) -> bytes | None:
    """Write a checkpoint if the entry is pending for this consumer.

    Return `b''` if it was written, the checkpoint that is there if it is another one, None if the claim is not ours.
    """
    keys = [context.keys.stream, context.keys.record(item.task_id), context.keys.checkpoint(item.task_id)]
    args: list[Arg] = [GROUP, consumer, item.entry_id, item.epoch, context.checkpoint_ttl_ms]
    args += [item.expected, item.value, item.possibly_billed_twice, encode_cost_if_sent(item.cost)]
    kind, existing, commands = await context.run(_SCRIPT, keys, args)
    context.count("takeover", 1 + commands)
    return None if kind == b"lost" else cast(bytes, existing)
