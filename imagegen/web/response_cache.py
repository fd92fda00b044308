"""Cache of rendered responses for finished tasks."""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

from imagegen.tasks.task import Task

MAX_BYTES = 4 * 2**20
_ENTRY_BYTES = 500
"""Memory of one entry without its body."""


class ResponseKey(NamedTuple):
    """Key of a response of one task.

    kind: name of the route's response. base: of its links. viewer: what else of the client it depends on.
    """

    kind: str
    task_id: str
    base: str
    language: str
    viewer: str = ""


class ResponseCache:
    """Cache of rendered responses for finished tasks, up to `MAX_BYTES`, least recently used first out.

    A task never changes, another object takes its place: so a body holds for the very object that it was made of.
    """

    def __init__(self) -> None:
        self._entries: OrderedDict[ResponseKey, tuple[Task, bytes]] = OrderedDict()
        self._bytes = 0

    def get(self, key: ResponseKey, task: Task) -> bytes | None:
        entry = self._entries.get(key)
        if entry is None or entry[0] is not task:
            return None
        self._entries.move_to_end(key)
        return entry[1]

    def put(self, key: ResponseKey, task: Task, body: bytes) -> None:
        """Cache the body of a finished task; not one made by orjson, which would keep 4 KiB alive."""
        self._forget(self._entries.pop(key, None))
        self._entries[key] = task, body
        self._bytes += _size(task, body)
        while self._bytes > MAX_BYTES:
            self._forget(self._entries.popitem(last=False)[1])

    def _forget(self, entry: tuple[Task, bytes] | None) -> None:
        if entry is not None:
            self._bytes -= _size(*entry)


def _size(task: Task, body: bytes) -> int:
    """Return the bytes of an entry: it keeps its task alive too."""
    return _ENTRY_BYTES + len(task.request_json) + len(body)
