"""Verb `refill_lines`: tasks of lines that do not move any more enter the stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from imagegen.queue.lines import MovedTasks
from imagegen.queue.verbs.context import VerbContext
from imagegen.redis_client.lua import load_script

_SCRIPT = load_script(__package__, "lines", "refill_lines")

MAX_MOVED, MAX_MOVED_BYTES = 200, 2**18
"""Tasks that one script call moves, unless those of a single line are more: they take Redis about 10 ms. Bytes after
which it moves no further one."""


class StoppedLine(NamedTuple):
    """Line with less than a window of tasks in the stream.

    missing: tasks to move. first: the first task when the line was listed; another one means that it moves.
    """

    client: str
    missing: int
    first: str


async def refill_lines(
    context: VerbContext, lines: Sequence[StoppedLine]
) -> tuple[list[MovedTasks], list[StoppedLine]]:
    """Move the missing tasks of lines into the stream. Return the moved tasks of each line, and what is left to do."""
    keys = [context.keys.stream, context.keys.lines, *(context.keys.line(line.client) for line in lines)]
    args = [value for line in lines for value in line]
    commands, rows = await context.run(_SCRIPT, keys, [context.record_ttl_ms, MAX_MOVED_BYTES, *args])
    context.count("other", 1 + commands)
    left = [StoppedLine(line.client, row[4], row[5].decode()) for line, row in zip(lines, rows, strict=True) if row[4]]
    return [MovedTasks.decode(row) for row in rows], left
