"""Tasks that meet a rate limit which others do not meet. No I/O."""

from __future__ import annotations

Place = tuple[str, str]
"""Key in its channel, and model."""

MAX_OWN_IN_A_ROW = 3
"""Calls of tasks with limits of their own that are refused in a row, after which it is taken for the key's limit."""

MAX_TASKS = MAX_PLACES = 10_000
"""Tasks of either kind, and places with a limit: clients may name any model. The oldest are forgotten."""


class LimitedTasks:
    """Unfinished tasks whose last call met a rate limit, and those of them whose limit seems to be their own.

    A service may answer 429 to a request that it never takes, such as one with more tokens than a minute's quota
    (https://platform.openai.com/docs/guides/rate-limits). Waiting out a 429 is no attempt, so such a task calls until
    its deadline, and each of its calls would stop those of all others. A task that was limited before its model
    answered others has a limit of its own: further 429s let it wait longer and stop no other.
    """

    def __init__(self) -> None:
        self._place_of: dict[str, Place] = {}
        self._limited_at: dict[Place, float] = {}
        self._own: dict[str, int] = {}
        self._own_in_a_row: dict[Place, int] = {}

    def limited(self, task_id: str, place: Place, now: float) -> bool:
        """Record a 429 of a task that goes on. Return whether the limit is its own. now: monotonic."""
        if task_id in self._own:
            self._own[task_id] += 1
            self._own_in_a_row[place] = self._own_in_a_row.get(place, 0) + 1
            self._note(place, now)
            return self._own_in_a_row[place] < MAX_OWN_IN_A_ROW
        self._place_of[task_id] = place
        self._note(place, now)
        if len(self._place_of) > MAX_TASKS:
            del self._place_of[next(iter(self._place_of))]
        return False

    def _note(self, place: Place, now: float) -> None:
        self._limited_at[place] = now
        if len(self._limited_at) > MAX_PLACES:
            oldest = next(iter(self._limited_at))
            del self._limited_at[oldest]
            self._own_in_a_row.pop(oldest, None)

    def answered(self, place: Place, began_at: float) -> None:
        """Record a call that was answered with images; it counts if it began after the last limit of its place."""
        if not self._limited_at or began_at < self._limited_at.get(place, began_at + 1.0):
            return
        del self._limited_at[place]
        self._own_in_a_row.pop(place, None)
        for task_id in [limited for limited, its in self._place_of.items() if its == place]:
            del self._place_of[task_id]
            self._own[task_id] = 0
        while len(self._own) > MAX_TASKS:
            del self._own[next(iter(self._own))]

    def was_limited(self, task_id: str) -> bool:
        """Return whether the last call for this unfinished task met a limit here."""
        return task_id in self._place_of or task_id in self._own

    def own_limits(self, task_id: str) -> int:
        """Return how many of its calls were refused since its limit was found to be its own."""
        return self._own.get(task_id, 0)

    def finished(self, task_id: str) -> None:
        """Forget a task that ended."""
        if self._limited_at or self._own:
            self._place_of.pop(task_id, None)
            self._own.pop(task_id, None)
