"""Budgets of a UTC day: that of all clients together, and those of API keys."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from imagegen.accounts.api_keys import ApiKey
from imagegen.queue.verbs.budget_counters import REFUSED, BudgetLimits, Limits

TOTAL_SLOT = 0
"""Counter of all clients together; each key has its own, see ApiKey.slot."""


class Budgets:
    """Limits of the day in micro-dollars.

    limits: of each client, kept up to date.

    Args:
        total_micro_usd: of all clients together; None for no limit.
        keys: returns all API keys.
    """

    def __init__(self, total_micro_usd: int | None, keys: Callable[[], Iterable[ApiKey]] = lambda: ()) -> None:
        self._total: Limits = () if total_micro_usd is None else ((TOTAL_SLOT, total_micro_usd),)
        self._keys = keys
        self.limits = BudgetLimits(self._total)
        self.refresh()

    def refresh(self) -> None:
        """Read the limits of the keys again. A key without a counter yet is refused."""
        self.limits.of_clients = {
            key.name: (*self._total, (key.slot, key.daily_micro_usd)) if key.slot else ((TOTAL_SLOT, REFUSED),)
            for key in self._keys()
            if key.daily_micro_usd is not None
        }

    @property
    def all(self) -> dict[str, tuple[int, int]]:
        """Return slot and limit of each budget by the name of its key; that of all clients has an empty name."""
        budgets = {"": self._total[0]} if self._total else {}
        return budgets | {
            name: limits[-1] for name, limits in self.limits.of_clients.items() if limits[-1][0] != TOTAL_SLOT
        }

    def limits_of_slots(self, slots: Collection[int]) -> Limits:
        """Return the present limits of the budgets that hold a task; one without a limit any more has no bound."""
        limits = dict(self.all.values())
        return tuple([(slot, limits.get(slot, 2**53)) for slot in slots])
