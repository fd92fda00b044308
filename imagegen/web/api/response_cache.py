"""Owns what was told of finished tasks lately, as bytes, so that clients who ask again cost no building of answers."""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

from imagegen.tasks.task import Task

MAX_BYTES = 4 * 2**20
_OWN_BYTES = 500
"""About what one entry costs beside its body."""


class ResponseKey(NamedTuple):
    """What an answer depends on beside the task. kind: of the answer; base: of its links."""

    kind: str
    task_id: str
    base: str
    language: str


class ResponseCache:
    """Bodies up to `MAX_BYTES` in all; the one that was not asked for longest goes first.

    A task never changes, another one takes its place: so a body holds for the very task that it was made of.
    """

    def __init__(self) -> None:
        self._kept: OrderedDict[ResponseKey, tuple[Task, bytes]] = OrderedDict()
        self._bytes = 0

    def get(self, asked: ResponseKey, task: Task) -> bytes | None:
        kept = self._kept.get(asked)
        if kept is None or kept[0] is not task:
            return None
        self._kept.move_to_end(asked)
        return kept[1]

    def put(self, asked: ResponseKey, task: Task, body: bytes) -> None:
        """Keeps the body of a finished task; not one of orjson's, which would hold on to 4 KiB."""
        self._drop(self._kept.pop(asked, None))
        self._kept[asked] = task, body
        self._bytes += _size(task, body)
        while self._bytes > MAX_BYTES:
            self._drop(self._kept.popitem(last=False)[1])

    def _drop(self, kept: tuple[Task, bytes] | None) -> None:
        if kept is not None:
            self._bytes -= _size(*kept)


def _size(task: Task, body: bytes) -> int:
    """The task stays as long as its body, also where it is forgotten elsewhere."""
    return _OWN_BYTES + len(task.request_json) + len(body)
