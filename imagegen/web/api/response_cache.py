"""Caches of parsed bodies and of rendered responses: repeated requests cost little."""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

from imagegen.queue.client_queue import Submission
from imagegen.tasks.task import Task

MAX_SUBMISSIONS, MAX_BODY_BYTES = 1_000, 1_000

MAX_BYTES = 4 * 2**20
_ENTRY_BYTES = 500
"""Memory of one entry without its body."""


Owner = tuple[str, str, str | None]
"""Of a submission: name of the API key that sends it, and the scope of its task."""


class SubmissionCache:
    """Cache of up to `MAX_SUBMISSIONS` submissions by their owner and the client's body of up to `MAX_BODY_BYTES`.

    Each has the units of its request. Without the owner, a client's body would lead to the task of another client that
    has its own.
    """

    def __init__(self) -> None:
        self._submissions: OrderedDict[tuple[Owner, bytes], tuple[Submission, int]] = OrderedDict()

    def get(self, owner: Owner, raw: bytes) -> tuple[Submission, int] | None:
        return self._submissions.get((owner, raw))

    def put(self, owner: Owner, raw: bytes, submission: Submission, units: int) -> None:
        if len(raw) <= MAX_BODY_BYTES:
            self._submissions[owner, raw] = submission, units
            if len(self._submissions) > MAX_SUBMISSIONS:
                self._submissions.popitem(last=False)


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
