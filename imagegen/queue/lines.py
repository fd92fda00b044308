"""Lines of clients, as this instance has them in memory: who has many tasks, and how many wait outside of the stream.

A client has a limited number of tasks in the stream. Its further tasks wait in its own line in Redis, and are
moved into the stream one by one as its tasks end, in the script that ends them. So the tasks of one client do not wait
behind all those of another. Counting costs no command: an instance counts the tasks that it submitted.
"""

from __future__ import annotations

import time
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import count

from msgspec import Struct

from imagegen.queue.task_cache import TaskCache
from imagegen.tasks.task import IN_LINE, Task

WINDOW_PER_SLOT = 2
"""Tasks of a client in the stream for each call slot: a running one and the next."""


class MovedTasks(Struct, frozen=True, gc=False):
    """Result of a script for a line.

    taken: elements that left it. moved: ids of the tasks that are in the stream now, with their entries; the others
    were over. is_empty: whether it was found empty.
    """

    taken: int
    is_empty: bool
    commands: int
    moved: tuple[tuple[str, str], ...]

    @classmethod
    def decode(cls, row: Sequence[object]) -> MovedTasks:
        """Decode what `move` of lines.lua returns."""
        taken, is_empty, commands, names = row[:4]
        texts = [name.decode() for name in names]  # type: ignore[attr-defined]
        return cls(int(taken), bool(is_empty), int(commands), tuple(zip(texts[::2], texts[1::2], strict=True)))  # type: ignore[call-overload]


class Line:
    """Line of one client. Places are counted from the first task that ever waited in it.

    length: elements in Redis. taken: elements that left it. places: of the tasks that this instance has seen.
    """

    def __init__(self) -> None:
        self.length = 0
        self.taken = 0
        self.places: dict[str, int] = {}
        self._over: list[int] = []

    @property
    def waiting(self) -> int:
        """Tasks that wait, without the elements of those that are over."""
        return max(self.length - len(self._over), 0)

    def pushed(self, task_ids: Sequence[str], length: int) -> None:
        self.length = length
        first = self.taken + length - len(task_ids) + 1
        self.places.update(zip(task_ids, count(first)))

    def left(self, moved: MovedTasks) -> None:
        self.taken += moved.taken
        self.length = max(self.length - moved.taken, 0)
        for task_id, _ in moved.moved:
            self.places.pop(task_id, None)
        del self._over[: bisect_left(self._over, self.taken + 1)]

    def listed(self, task_ids: Sequence[str], length: int) -> None:
        """Replace all places by those that were read: the first tasks, and how many there are."""
        places = set(self._over)
        over = {task_id for task_id, place in self.places.items() if place in places}
        self.length, self.taken = length, 0
        self.places = dict(zip(task_ids, count(1)))
        self._over = [place for task_id, place in self.places.items() if task_id in over]

    def finished(self, task_id: str) -> None:
        """Record that a task is finished: its element stays until its turn."""
        place = self.places.get(task_id, 0)
        at = bisect_left(self._over, place)
        if place > self.taken and self._over[at : at + 1] != [place]:
            insort(self._over, place)

    def position(self, task_id: str) -> int:
        """Return 1 for the next task; for a task without a place here the last one."""
        place = self.places.get(task_id)
        if place is None:
            return max(self.waiting, 1)
        return max(place - self.taken - bisect_left(self._over, place), 1)


class ClientLines:
    """Lines of all clients, and which of their tasks are in the stream.

    Args:
        window: tasks of a client in the stream.
        slots: calls that one instance makes at once.

    Attributes:
        instances: returns how many share the queue.
        by_client: lines in memory.
        on_moved: called with the tasks that were moved into the stream.
        on_begun: called with a client: its line may have begun.
        on_doubt: called with a client: no task in the stream may be left to move its line.
        on_end_without_line: called when a task of a client without a line left the stream.
        on_emptied: called with a client and its tasks: its line is empty, though they were seen in it.
    """

    def __init__(self, task_cache: TaskCache, *, window: int, slots: int) -> None:
        self._task_cache = task_cache
        self._window = window
        self._slots = slots
        self.by_client: dict[str, Line] = {}
        self._in_stream: dict[str, dict[str, None]] = {}
        self._submitting: Counter[str] = Counter()
        self.moved_at: dict[str, float] = {}
        self.instances: Callable[[], int] = lambda: 1
        self.on_moved: Callable[[Sequence[tuple[str, str]]], None] = lambda _moved: None
        self.on_begun: Callable[[str], None] = lambda _client: None
        self.on_doubt: Callable[[str], None] = lambda _client: None
        self.on_end_without_line: Callable[[], None] = lambda: None
        self.on_emptied: Callable[[str, Sequence[str]], None] = lambda _client, _task_ids: None

    def __len__(self) -> int:
        """Return the number of lines in memory; costs no command."""
        return len(self.by_client)

    @property
    def waiting(self) -> int:
        """Number of tasks that wait in the lines in memory; costs no command."""
        return sum([line.waiting for line in self.by_client.values()]) if self.by_client else 0

    @property
    def clients(self) -> list[str]:
        """Clients that have a line."""
        return list(self.by_client)

    @property
    def window(self) -> int:
        """Tasks of a client in the stream, over all instances."""
        return max(min(self._window, WINDOW_PER_SLOT * self._slots * self.instances()), 1)

    @property
    def _share(self) -> int:
        """Tasks of a client in the stream that this instance submits."""
        return max(self.window // self.instances(), 1)

    # Submits

    def has_line(self, client: str) -> bool:
        return client in self.by_client

    def in_stream(self, client: str) -> list[str]:
        """Return the unfinished tasks of a client that were submitted here and are in the stream."""
        live, ids = self._task_cache.live, self._in_stream.get(client, {})
        task_ids = {
            task_id: None for task_id in ids if (task := live.get(task_id)) is not None and task.entry_id != IN_LINE
        }
        if task_ids:
            self._in_stream[client] = task_ids
        else:
            self._in_stream.pop(client, None)
        return list(task_ids)

    def is_full(self, client: str) -> bool:
        """Return whether a client has its share of tasks in the stream."""
        share, begun = self._share, self._submitting[client]
        return begun + len(self._in_stream.get(client, ())) >= share and begun + len(self.in_stream(client)) >= share

    def begin_submit(self, client: str, *, in_line: bool) -> None:
        """Count a submit that is under way; a task that goes to a line adds the line."""
        if in_line:
            self.by_client.setdefault(client, Line())
        else:
            self._submitting[client] += 1

    def end_submit(self, client: str, *, in_line: bool) -> None:
        if not in_line:
            self._submitting[client] -= 1
            if self._submitting[client] <= 0:
                del self._submitting[client]
                self._doubt_if_idle(client)

    def submitted(self, task: Task) -> None:
        """Count a task that was submitted here into the stream."""
        submitted_ids = self._in_stream.setdefault(task.client, {})
        submitted_ids[task.id] = None
        if len(submitted_ids) > 2 * self._window:
            self.in_stream(task.client)

    def added(self, client: str, task_ids: Sequence[str], length: int) -> None:
        """Record tasks that were added to the end of a line; length: of the line then."""
        line = self.by_client.setdefault(client, Line())
        line.pushed(task_ids, length)
        if length == len(task_ids):
            self.on_begun(client)
            self._doubt_if_idle(client)

    def _doubt_if_idle(self, client: str) -> None:
        if client in self.by_client and not self._submitting.get(client) and not self.in_stream(client):
            self.on_doubt(client)

    # Ends

    def line_of(self, client: str) -> str:
        """Return the client if it has a line, else ''."""
        return client if client in self.by_client else ""

    def left(self, client: str, moved: MovedTasks) -> None:
        """Record what a script did to a line."""
        line = self.by_client.get(client)
        if line is None:
            return
        line.left(moved)
        if moved.moved:
            self.moved_at[client] = time.monotonic()
            self.on_moved(moved.moved)
        if moved.is_empty:
            self._forget(client)

    def left_stream(self, task: Task, *, is_line_moved: bool) -> None:
        """Record that a task left the stream; is_line_moved: whether its script had the line of its client."""
        client = task.client
        self._in_stream.get(client, {}).pop(task.id, None)
        if is_line_moved:
            return
        if client in self.by_client:
            self.on_doubt(client)
        else:
            self.on_end_without_line()

    def finished(self, task: Task) -> None:
        """Record that a task is finished; it may still have an element in its line."""
        if task.client and (line := self.by_client.get(task.client)) is not None:
            line.finished(task.id)

    # Reads and messages

    def known(self, clients: Iterable[str]) -> None:
        """Record that clients have lines."""
        for client in clients:
            self.by_client.setdefault(client, Line())

    def listed(self, client: str, task_ids: Sequence[str], length: int) -> None:
        """Record what a line holds: its first tasks, and how many there are."""
        line = self.by_client.setdefault(client, Line())
        missing = line.places.keys() - set(task_ids)
        line.listed(task_ids, length)
        if not length:
            line.places = dict.fromkeys(missing, 0)
            self._forget(client)

    def waiting_in(self, client: str) -> Iterable[str]:
        """Return the ids of the tasks in a line that this instance has seen, in order."""
        line = self.by_client.get(client)
        return line.places if line else ()

    def _forget(self, client: str) -> None:
        line = self.by_client.pop(client)
        self.moved_at.pop(client, None)
        if line.places:
            self.on_emptied(client, list(line.places))

    # Positions

    def position(self, task: Task, in_stream: int) -> int:
        """Return the position of a task in a line: the waiting entries of the stream and its predecessors come before
        it, and as many of each other line.

        in_stream: waiting entries.
        """
        own = self.by_client.get(task.client)
        return self._position(own, own.position(task.id) if own else 1, in_stream)

    def next_position(self, client: str, in_stream: int) -> int:
        """Return the position that the next task of a client would have in its line."""
        own = self.by_client.get(client)
        return self._position(own, own.waiting + 1 if own else 1, in_stream)

    def _position(self, own: Line | None, place: int, in_stream: int) -> int:
        ahead_in_other_lines = sum([min(line.waiting, place) for line in self.by_client.values() if line is not own])
        return in_stream + place + ahead_in_other_lines
