"""Lines of clients as arguments of a script that has line_args.lua."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from imagegen.queue.verbs.context import VerbContext

NO_LINES = ("", "")
"""The last arguments of a batch of tasks without a line, after the life of a record."""


def clients_with_lines(clients: Sequence[str]) -> list[str]:
    """Return the clients of a batch that have a line, each once; '' is none."""
    return list(dict.fromkeys(filter(None, clients)))


def add_line_args(context: VerbContext, keys: list[str], args: list[Any], clients: Sequence[str]) -> None:
    """Append the lines of a batch to the arguments of its script.

    clients: for each task the client with the line that it concerns, '' for none.
    """
    args.append(context.record_ttl_ms)
    if not any(clients):
        args += NO_LINES
        return
    lines = clients_with_lines(clients)
    keys.append(context.keys.lines)
    keys += map(context.keys.line, lines)
    numbers = {client: number for number, client in enumerate(lines, 1)}
    args += (" ".join([str(numbers.get(client, 0)) for client in clients]), "\n".join(lines))
