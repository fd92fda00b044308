"""Counters of the budgets of a day: changes of them by scripts (see budget.lua), and the values that scripts return."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from imagegen.redis_client.keys import Keys
from imagegen.tasks.cost import Cost

BUDGETS_TTL_S = 8 * 86_400
"""Life of the budgets of a day: longer than a task."""

KEPT_DAYS = 3
"""Days of which an instance remembers the values."""

NO_CHANGE = [0]
"""What a script returns that changed no budget."""

REFUSED = -(2**53)
"""Limit under which nothing fits: of a task with an unknown price."""

Limits = tuple[tuple[int, int], ...]
"""Slots of the budgets that a task counts against, each with its limit in micro-dollars."""


@dataclass(slots=True)
class BudgetLimits:
    """Budgets of each client that has its own, by the name of its key; and those of all other clients."""

    of_others: Limits = ()
    of_clients: Mapping[str, Limits] = field(default_factory=dict)


class BudgetValues:
    """Values of the budgets as this instance last saw them, in micro-dollars.

    Scripts return them at no cost. Redis counts the changes of a day: a count that is no higher than before shows that
    it has lost some.
    on_change: called after values were seen. on_refused: called with the client of a refused request.
    on_fewer_changes: called after no higher count was seen, of a counter that was lost, or in an overtaken reply.
    handled_losses: names of the last losses after which this instance raised the values of a day.
    """

    def __init__(self) -> None:
        self._days: dict[int, tuple[int, dict[int, int]]] = {}
        self.handled_losses: dict[int, bytes] = {}
        self.on_change: Callable[[], None] = lambda: None
        self.on_refused: Callable[[str], None] = lambda _client: None
        self.on_fewer_changes: Callable[[], None] = lambda: None

    @property
    def days(self) -> tuple[int, ...]:
        """Days of which values were seen."""
        return tuple(self._days)

    def used(self, day: int, slot: int) -> int:
        """Return what a budget held when it was last seen, reserved and charged; 0 if it was never seen."""
        return self.seen(day)[1].get(slot, 0)

    def seen(self, day: int) -> tuple[int, dict[int, int]]:
        """Return the highest count of changes that was seen, and the values by slot."""
        return self._days.get(day, (0, {}))

    def learn_all(self, day: int, stored: bytes) -> None:
        """Record the stored values of a day."""
        count, *values = struct.unpack(f">{len(stored) // 8}q", stored[: len(stored) // 8 * 8]) or (0,)
        if count >= self.seen(day)[0]:
            self._days[day] = (count, dict(enumerate(values)))
            self.on_change()

    def learn(self, reply: Sequence[Any]) -> int:
        """Record the values that a script returned. Return the number of its commands for budgets.

        Each change has a higher count than those before. If not, Redis has lost some: the change then counts on top of
        the value that was seen before, which is to be written back.
        """
        before: dict[int, int] = {}
        for at in range(1, len(reply), 5):
            day, count, slot, value, change = map(int, reply[at : at + 5])
            last, values = self.seen(day)
            if count > before.setdefault(day, last):
                values[slot] = value
                self._days[day] = (count, values)
            else:
                values[slot] = values.get(slot, 0) + change
                if count == before[day]:  # certainly a loss: an overtaken reply has a lower count
                    self._days[day] = (count + 1, values)
                self.on_fewer_changes()
        if len(self._days) > KEPT_DAYS:
            oldest = min(self._days)
            del self._days[oldest]
            self.handled_losses.pop(oldest, None)
        if len(reply) > 1:
            self.on_change()
        return int(reply[0])


def reservation(cost: Cost | None, limits: Limits) -> str:
    """Return the text of what a submit reserves; empty for nothing."""
    if cost is None or not cost.slots:
        return ""
    if cost.estimated is None:
        return _text(cost.day, 0, [f"{slot}={REFUSED}" for slot in cost.slots])
    if not cost.reserved:
        return ""
    return _text(cost.day, cost.reserved, [f"{slot}={limit}" for slot, limit in limits])


def extension(day: int, amount: int, limits: Limits) -> str:
    """Return the text of what a call beyond the planned ones reserves."""
    return _text(day, amount, [f"{slot}={limit}" for slot, limit in limits])


def settlement(cost: Cost | None) -> str:
    """Return the text of what budgets get at the end of a task; empty if none holds it."""
    if cost is None or not cost.slots:
        return ""
    return _text(cost.day, cost.ended().charged - cost.reserved, cost.slots)


def refund(cost: Cost | None, amount: int) -> str:
    """Return the text of what budgets get back of a task that is settled; empty for nothing."""
    return _text(cost.day, -amount, cost.slots) if cost and cost.slots and amount > 0 else ""


def charge(cost: Cost | None, amount: int) -> str:
    """Return the text of what budgets get for calls that no end of the task charges; empty for nothing."""
    return _text(cost.day, amount, cost.slots) if cost and cost.slots and amount > 0 else ""


def release(cost: Cost | None) -> str:
    """Return the text that takes back everything that is reserved for a task; empty if nothing is."""
    if cost is None or not cost.slots or not cost.reserved:
        return ""
    return _text(cost.day, -cost.reserved, cost.slots)


def _text(day: int, amount: int, slots: Iterable[object]) -> str:
    return f"{day} {amount} {' '.join(map(str, slots))}"


def budget_keys(keys: Keys, texts: Iterable[str]) -> list[str]:
    """Return the keys of the days that texts concern."""
    days = {text.partition(" ")[0] for text in texts if text}
    return [keys.budgets(day) for day in sorted(days)]
