"""Verb `refill_lines`: lines that may have stopped are moved on, and read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from msgspec import Struct

from imagegen.queue.lines import MovedTasks
from imagegen.queue.verbs.context import VerbContext
from imagegen.redis_client.lua import load_script

_SCRIPT = load_script(__package__, "lines", "refill_lines")

MAX_LINES = 100
"""Lines of one script call."""

MAX_LISTED = 1_000
"""Tasks of a line that are listed, so that positions are exact."""


class ListedLine(Struct, frozen=True, gc=False):
    """A line after some of its tasks were moved: its length, and its first tasks."""

    client: str
    moved: MovedTasks
    length: int
    task_ids: tuple[str, ...]


async def refill_lines(context: VerbContext, clients: Sequence[str], window: int) -> list[ListedLine]:
    """Move tasks of lines until each client has `window` tasks in the stream; 0: move none. Return the lines."""
    keys = [context.keys.stream, context.keys.lines, *map(context.keys.line, clients)]
    commands, rows = await context.run(_SCRIPT, keys, [window, context.record_ttl_ms, MAX_LISTED, *clients])
    context.count("other", 1 + commands)
    return [
        ListedLine(client, MovedTasks.decode(row[:4]), row[4], tuple([task_id.decode() for task_id in row[5]]))
        for client, row in zip(clients, rows, strict=True)
    ]


async def read_line_index(context: VerbContext) -> list[str]:
    """Return the clients that have a line."""
    names = cast(list[bytes], await context.multiplexer.execute("SMEMBERS", context.keys.lines))
    context.count("other", 1)
    return [name.decode(errors="replace") for name in names]
