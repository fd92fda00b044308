"""Counters of the budgets of a day: changes of them by scripts (see budget.lua), and the values that scripts return."""

from __future__ import annotations

import asyncio
import math
import secrets
import struct
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from msgspec import Struct

from imagegen.redis_client.keys import Keys
from imagegen.tasks.cost import Cost

BUDGETS_TTL_S = 8 * 86_400
"""Life of the budgets of a day: longer than a task."""

DOUBT_S = 600.0
"""How long after another server has answered the first change of a day is taken for one after a loss."""

KEPT_DAYS = 3
"""Days of which an instance remembers the values."""

NO_CHANGE = [0]
"""What a script returns that changed no budget."""

MAX_NUMBER = 2**53
"""A larger number was written by another program; see budget.lua."""

REFUSED = -(2**53)
"""Limit under which nothing fits: of a task with an unknown price."""

Limits = tuple[tuple[int, int], ...]
"""Slots of the budgets that a task counts against, each with its limit in micro-dollars."""


@dataclass(slots=True)
class BudgetLimits:
    """Budgets of each client that has its own, by the name of its key; and those of all other clients."""

    of_others: Limits = ()
    of_clients: Mapping[str, Limits] = field(default_factory=dict)


LOSS_JUMP = 2**40
"""By how much the number of changes is raised after a loss: more than there are changes in a day."""


class RestoreTry(Struct, frozen=True):
    """Try to write lost values back, until it is answered. later, first_later: as SeenBudgets has them at its begin."""

    name: str
    later: dict[int, int]
    first_later: int | None


@dataclass(slots=True)
class SeenBudgets:
    """Budgets of a day as this instance last saw them, in micro-dollars.

    Attributes:
        count: highest number of a change that was seen.
        values: by slot, the number of the change after which a value was seen, and the value.
        later: what changes have added that came after a loss that is not handled yet: they count from values below.
        first_later: the lowest number of such a change.
        is_doubted: whether another server answers, so that changes may come after a loss that is not noticed yet.
        restored_values: seen after another instance has handled a loss; what is lost of the values above lacks there.
        handled_loss: name of the last loss after which this instance added what it had seen.
        restoring: the try to do so that is not answered yet.
    """

    count: int = 0
    values: dict[int, tuple[int, int]] = field(default_factory=dict)
    later: dict[int, int] = field(default_factory=dict)
    first_later: int | None = None
    is_doubted: bool = False
    restored_values: dict[int, int] = field(default_factory=dict)
    handled_loss: bytes = b""
    restoring: RestoreTry | None = None

    def used(self, slot: int) -> int:
        """Return what a budget holds, reserved and charged; 0 if it was never seen."""
        value = self.values.get(slot, (0, 0))[1] + self.later.get(slot, 0)
        return max(value, self.restored_values.get(slot, 0))

    def is_after_loss(self, count: int) -> bool:
        """Return whether another instance has handled a loss before this number of changes."""
        return self.count > 0 and count > self.count + LOSS_JUMP // 2

    def add_later(self, slot: int, count: int, change: int) -> None:
        """Note a change with a number that is no higher than those before."""
        self.later[slot] = self.later.get(slot, 0) + change
        self.values.setdefault(slot, (0, 0))
        self.first_later = count if self.first_later is None else min(self.first_later, count)

    def begin_restore(self) -> RestoreTry:
        """Return the try that is to be sent, again if the last one was not answered: Redis may have done it."""
        if self.restoring is None:
            self.restoring = RestoreTry(secrets.token_hex(8), dict(self.later), self.first_later)
        return self.restoring

    def restored(self, count: int, values: Mapping[int, int]) -> None:
        """Note the values after this instance has added what was lost."""
        for slot, value in values.items():
            if not count < self.values[slot][0] < count + LOSS_JUMP // 2:  # else it was seen after that
                self.values[slot] = count, value
        handled = self.restoring.later if self.restoring else {}
        self.later = {slot: left for slot, at in self.later.items() if (left := at - handled.get(slot, 0))}
        self.first_later = self.first_later if self.later else None
        self.restoring = None
        self.restored_values.clear()
        self.is_doubted = False
        self.count = count if self.is_after_loss(count) else max(count, self.count)


class BudgetValues:
    """Values of the budgets as this instance last saw them.

    Scripts return them at no cost. Redis counts the changes of a day: a number that is no higher than before shows that
    it has lost some, one that is far higher that another instance has noticed that.
    on_change: called after values were seen. on_refused: called with the client of a refused request.
    on_fewer_changes: called after such a number was seen, also in an overtaken reply.
    restoring: held while lost values are written back.
    """

    def __init__(self) -> None:
        self._days: dict[int, SeenBudgets] = {}
        self._doubted_until = -math.inf
        self.restoring = asyncio.Lock()
        self.on_change: Callable[[], None] = lambda: None
        self.on_refused: Callable[[str], None] = lambda _client: None
        self.on_fewer_changes: Callable[[], None] = lambda: None

    @property
    def days(self) -> tuple[int, ...]:
        """Days of which values were seen."""
        return tuple(self._days)

    def used(self, day: int, slot: int) -> int:
        """Return what a budget held when it was last seen, reserved and charged; 0 if it was never seen."""
        return self.seen(day).used(slot)

    def seen(self, day: int) -> SeenBudgets:
        """Return what was seen of a day."""
        return self._days.get(day) or SeenBudgets()

    def on_new_server(self) -> None:
        """Note changes apart until a recovery has compared the values: the server may lack some of those before.

        The same with days of which nothing was seen yet: slower instances may have seen values that the server lacks.
        """
        self._doubted_until = time.monotonic() + DOUBT_S
        for seen in self._days.values():
            seen.is_doubted = True

    def learn_all(self, day: int, stored: bytes) -> None:
        """Record the stored values of a day. Those of another program are moved aside by the next change."""
        count, *values = struct.unpack(f">{len(stored) // 8}q", stored[: len(stored) // 8 * 8]) or (0,)
        if len(stored) % 8 or count < 0 or max(map(abs, (count, *values))) > MAX_NUMBER:
            self.on_fewer_changes()
            return
        seen = self._day(day)
        if seen.is_after_loss(count):
            seen.restored_values |= enumerate(values)
            self.on_fewer_changes()
        elif count >= seen.count and not (seen.is_doubted and (seen.count or seen.later)):
            used = ((slot, value) for slot, value in enumerate(values) if value or slot in seen.values)
            seen.count, seen.values = count, {slot: (count, value) for slot, value in used}
        if seen.is_doubted and count:
            self.on_fewer_changes()
        self.on_change()

    def learn(self, reply: Sequence[Any]) -> int:
        """Record the values that a script returned. Return the number of its commands for budgets.

        Each change has a higher number than those before. If not, Redis has lost some: the change then counts on top of
        the value that was seen before, which is to be written back.
        """
        before: dict[int, int] = {}
        for at in range(1, len(reply), 5):
            day, count, slot, value, change = map(int, reply[at : at + 5])
            seen = self._day(day)
            last = before.setdefault(day, seen.count)
            if seen.is_after_loss(count):
                seen.restored_values[slot] = value
                self.on_fewer_changes()
            elif count > last and not seen.is_doubted:
                seen.values[slot] = count, value
                seen.count = count
            else:
                seen.add_later(slot, count, change)
                if count == last:  # certainly a loss: an overtaken reply has a lower number
                    seen.count = count + 1
                self.on_fewer_changes()
        if len(reply) > 1:
            self.on_change()
        return int(reply[0])

    def _day(self, day: int) -> SeenBudgets:
        if day not in self._days:
            self._days[day] = SeenBudgets(is_doubted=time.monotonic() < self._doubted_until)
            if len(self._days) > KEPT_DAYS:
                del self._days[min(self._days)]
        return self._days[day]


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
