"""Watch over the budgets of the day: alerts at 80 % and 100 %, and their state for metrics."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import suppress

from msgspec import Struct

from imagegen.accounts.alerts import BUDGET_EXHAUSTED, BUDGET_WARNING, Alerts
from imagegen.errors import QueueUnavailable
from imagegen.formats import rfc3339
from imagegen.queue.queue_verbs import QueueVerbs
from imagegen.tasks.cost import SECONDS_A_DAY, day_end, day_of, dollars

WARNING_SHARE = 0.8

CHECK_DELAY_S = 0.5
"""Changes within this time are checked together."""

ALERT_LIFE_S = 2.0 * SECONDS_A_DAY

MAX_SHOWN = 100
"""Budgets of keys that are shown; the others are left out."""

LimitsByKey = Mapping[str, tuple[int, int]]
"""Counter and limit (micro-dollars) of each budget, by the name of its key; empty for that of all clients."""


class BudgetState(Struct, frozen=True):
    """A budget of the day in micro-dollars. key: None for that of all clients together.

    used: reserved and charged, as this instance last saw it.
    """

    key: str | None
    limit: int
    used: int

    @property
    def left(self) -> int:
        return max(self.limit - self.used, 0)


class BudgetWatch:
    """Budgets as this instance sees them.

    Args:
        limits: returns the budgets.
        clock: Unix time.
    """

    def __init__(
        self, alerts: Alerts, verbs: QueueVerbs, limits: Callable[[], LimitsByKey], clock: Callable[[], float]
    ) -> None:
        self._alerts = alerts
        self._verbs = verbs
        self._values = verbs.budgets
        self._limits = limits
        self._clock = clock
        self._refused: set[str] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._values.on_change, self._values.on_refused = self._check_soon, self.on_refused

    def on_refused(self, client: str) -> None:
        """Note that a budget refused a request. client: name of the request's key."""
        self._refused.add(client)
        self._check_soon()

    async def refresh(self) -> None:
        """Read today's values if there is a budget; costs one command. Without Redis the last ones stay."""
        if self._limits():
            with suppress(QueueUnavailable):
                await self._verbs.read_budgets(day_of(self._clock()))

    def states(self) -> list[BudgetState]:
        """Return today's budgets: that of all clients, then those of keys by name, at most `MAX_SHOWN`."""
        day, limits = day_of(self._clock()), self._limits()
        return [
            BudgetState(name or None, limit, self._values.used(day, slot))
            for name, (slot, limit) in sorted(limits.items())[: MAX_SHOWN + 1]
        ]

    @property
    def resets_at(self) -> float:
        """Unix time at which the budgets of today end."""
        return day_end(self._clock())

    def _check_soon(self) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(CHECK_DELAY_S, self._check)

    def _check(self) -> None:
        self._timer = None
        refused, self._refused = self._refused, set()
        day = day_of(self._clock())
        for name, (slot, limit) in self._limits().items():
            used = self._values.used(day, slot)
            was_refused = name in refused or (bool(refused) and not name)
            nearly = used >= limit * WARNING_SHARE and (used > 0 or was_refused)
            if nearly:
                self._report(BUDGET_WARNING, name, limit, used)
            if nearly and (used >= limit or was_refused):
                self._report(BUDGET_EXHAUSTED, name, limit, used)

    def _report(self, kind: str, name: str, limit: int, used: int) -> None:
        self._alerts.report(
            kind,
            f"{day_of(self._clock())} {name}",
            life_s=ALERT_LIFE_S,
            shared=True,
            key=name or None,
            limit=dollars(limit),
            used=dollars(used),
            currency="USD",
            resetsAt=rfc3339(self.resets_at),
        )
