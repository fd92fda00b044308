"""Cache of rendered responses about tasks."""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

from imagegen.queue.eta import UNKNOWN_POSITION, QueuePosition
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


class _Entry(NamedTuple):
    task: Task
    place: QueuePosition
    body: bytes

    @property
    def size(self) -> int:
        """Return its bytes: it keeps its task alive too."""
        return _ENTRY_BYTES + len(self.task.request_json) + len(self.body)


class ResponseCache:
    """Cache of rendered responses about tasks, up to `MAX_BYTES`, least recently used first out.

    A task never changes, another object takes its place: so a body holds for the very object that it was made of, and
    for the position of an unfinished task that it shows.
    """

    def __init__(self) -> None:
        self._entries: OrderedDict[ResponseKey, _Entry] = OrderedDict()
        self._bytes = 0

    def get(self, key: ResponseKey, task: Task, place: QueuePosition = UNKNOWN_POSITION) -> bytes | None:
        entry = self._entries.get(key)
        if entry is None or entry.task is not task or entry.place != place:
            return None
        self._entries.move_to_end(key)
        return entry.body

    def put(self, key: ResponseKey, task: Task, body: bytes, place: QueuePosition = UNKNOWN_POSITION) -> None:
        """Cache the body of a task; not one made by orjson, which would keep 4 KiB alive."""
        self._forget(self._entries.pop(key, None))
        entry = self._entries[key] = _Entry(task, place, body)
        self._bytes += entry.size
        while self._bytes > MAX_BYTES:
            self._forget(self._entries.popitem(last=False)[1])

    def _forget(self, entry: _Entry | None) -> None:
        if entry is not None:
            self._bytes -= entry.size
