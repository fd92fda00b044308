"""Verb `list_lines`: the lengths and the first tasks of lines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from msgspec import Struct

from imagegen.queue.verbs.context import VerbContext
from imagegen.redis_client.lua import load_script

_SCRIPT = load_script(__package__, "lines", "list_lines")

MAX_LINES = 100
"""Lines of one script call."""

MAX_LISTED = 1_000
"""Tasks of a line that are listed, so that positions are exact."""

MAX_READ_BYTES = 2**18
"""Bytes after which a script call lists no further line: about 600 short elements, which take Redis 10 to 20 ms."""


class ListedLine(Struct, frozen=True, gc=False):
    """Length of a line, and its first tasks."""

    client: str
    length: int
    task_ids: tuple[str, ...]


async def list_lines(context: VerbContext, clients: Sequence[str]) -> list[ListedLine]:
    """Return the lines of the first of these clients, at least one and at most `MAX_LINES`."""
    page = clients[:MAX_LINES]
    keys = [context.keys.lines, *map(context.keys.line, page)]
    commands, rows = await context.run(_SCRIPT, keys, [MAX_LISTED, MAX_READ_BYTES, *page])
    context.count("other", 1 + commands)
    return [
        ListedLine(client, length, tuple([task_id.decode() for task_id in ids]))
        for client, (length, ids) in zip(page, rows, strict=False)
    ]


async def read_line_index(context: VerbContext) -> list[str]:
    """Return the clients that have a line."""
    names = cast(list[bytes], await context.multiplexer.execute("SMEMBERS", context.keys.lines))
    context.count("other", 1)
    return [name.decode(errors="replace") for name in names]
