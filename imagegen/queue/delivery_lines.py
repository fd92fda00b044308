"""Names of outbox entries that wait for memory: one line for each destination, ordered by due time."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Collection, Iterator

MAX_NAMES_EACH = 10_000
"""Names in the line of one destination, about 1 MB; further names stay in Redis only."""


class DeliveryLines:
    """Names by destination, in lines. A name may be in several lines; it is taken once."""

    def __init__(self) -> None:
        self._lines: dict[str, list[tuple[float, int, str]]] = {}
        self._number = itertools.count()
        self.until: dict[str, float] = {}
        """When each name falls due in Redis for other instances, Unix seconds."""

    def __contains__(self, name: str) -> bool:
        return name in self.until

    def add(self, name: str, due_at: float, destinations: Collection[str], until: float) -> bool:
        """Append a name; return False if every line is full.

        Args:
            name: of the outbox entry.
            due_at: Unix time of its next try.
            destinations: of its deliveries.
            until: when it falls due for other instances, Unix time.
        """
        for destination in destinations:
            line = self._lines.setdefault(destination, [])
            if len(line) < MAX_NAMES_EACH:
                heapq.heappush(line, (due_at, next(self._number), name))
                self.until[name] = until
        return name in self.until

    def take(self, due_before: float, capacity: Callable[[str], int], limit: int) -> list[str]:
        """Remove and return names that are due, in order of their due time within each destination.

        Args:
            due_before: Unix time.
            capacity: returns how many names a destination may get now.
            limit: names in all.
        """
        taken: list[str] = []
        for destination in list(self._lines):
            free = min(capacity(destination), limit - len(taken))
            for due_at, name in self._heads(destination):
                if free <= 0 or due_at > due_before:
                    break
                heapq.heappop(self._lines[destination])
                del self.until[name]
                taken.append(name)
                free -= 1
            if not self._lines[destination]:
                del self._lines[destination]
        return taken

    def next_due(self, capacity: Callable[[str], int]) -> float:
        """Return the earliest due time of a destination with capacity, infinity if there is none."""
        heads = (line[0][0] for destination, line in self._lines.items() if line and capacity(destination) > 0)
        return min(heads, default=math.inf)

    def clear(self) -> None:
        """Forget all names."""
        self._lines.clear()
        self.until.clear()

    def _heads(self, destination: str) -> Iterator[tuple[float, str]]:
        """Yield the first name of a line again and again; drop names that were taken from another line."""
        line = self._lines[destination]
        while line:
            due_at, _, name = line[0]
            if name in self.until:
                yield due_at, name
            else:
                heapq.heappop(line)
