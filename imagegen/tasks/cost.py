"""Money of a task, in micro-dollars (millionths of a US dollar)."""

from __future__ import annotations

from decimal import Decimal
from math import floor
from typing import Self

from msgspec import Struct
from msgspec.structs import replace

UNKNOWN = -1
"""Unknown price of a call in flight."""

INTERRUPTED = "interrupted"
"""Fault of a call that ended with its instance."""

SECONDS_A_DAY = 86_400

MICRO_USD = 1_000_000
"""Micro-dollars of a dollar."""


def day_of(now: float) -> int:
    """Return the days since 1970-01-01 UTC of a Unix time."""
    return int(now // SECONDS_A_DAY)


def day_end(now: float) -> float:
    """Return the Unix time at which the UTC day of a Unix time ends, and with it its budgets."""
    return float((day_of(now) + 1) * SECONDS_A_DAY)


def micro_usd_limit(dollars: float) -> int:
    """Return a limit in dollars as micro-dollars, never more than its decimal form."""
    return floor(Decimal(repr(dollars)) * MICRO_USD)


def dollars(micro_usd: int) -> float:
    """Return micro-dollars as dollars with at most 6 decimals."""
    return micro_usd / MICRO_USD


class Cost(Struct, frozen=True, omit_defaults=True, gc=False):
    """Money of one epoch of a task.

    estimated: of all planned calls by the price table; None if the price is unknown.
    day: days since 1970-01-01 UTC; the budgets of this day hold it.
    slots: counters of the budgets that hold it. reserved: what they hold for it; 0 once it is settled.
    charged: calls that were sent. unsure: the part of it that lost its answer.
    calling: price of the call in flight, which counts as sent if its owner dies; or UNKNOWN.
    saved: price of the images that were taken from another task.
    unpriced: calls that were sent and have an unknown price.
    fault: code of the last error of a call that is charged all the same, so that its images need another call.
    most: that its calls may be charged; None without a limit of the submit.
    """

    estimated: int | None = None
    day: int = 0
    slots: tuple[int, ...] = ()
    reserved: int = 0
    charged: int = 0
    unsure: int = 0
    calling: int = 0
    saved: int = 0
    unpriced: int = 0
    fault: str = ""
    most: int | None = None

    @property
    def total(self) -> int | None:
        """What all images of the request cost, also those that were taken from another task; None if unknown."""
        return None if self.estimated is None else self.estimated + self.saved

    def for_part(self, missing: int, wanted: int) -> Self:
        """Return the cost of a task that has some of its images already: only the missing ones are generated."""
        if self.estimated is None:
            return self
        estimated = self.estimated * missing // wanted
        return replace(self, estimated=estimated, saved=self.saved + self.estimated - estimated)

    def held_by(self, slots: tuple[int, ...], day: int) -> Self:
        """Return the cost as budgets hold it from the submit on."""
        return replace(self, slots=slots, day=day, reserved=self.charged + (self.estimated or 0))

    def rest_for(self, price: int) -> int:
        """Return what a call needs beyond the reserved amount; 0 if no budget limits it."""
        return max(self.charged + price - self.reserved, 0) if self.slots else 0

    def exceeds_most(self, price: int | None, n: int) -> bool:
        """Return whether a call would make it cost more than its submit allows. price: None if unknown.

        n: images of the request. The price of each call is rounded, by a micro-dollar an image at most.
        """
        return self.most is not None and (price is None or self.charged + price > self.most + n)

    def with_more(self, amount: int) -> Self:
        """Return the cost after the budgets have reserved more."""
        return replace(self, reserved=self.reserved + amount)

    def before_call(self, price: int | None) -> Self:
        """Begin a call; price: None if unknown."""
        return replace(self, calling=UNKNOWN if price is None else price)

    def paid(self, price: int | None, fault: str = "") -> Self:
        """End a call that is paid; price: None if unknown. fault: why another call may be needed."""
        if price is None:
            return replace(self, calling=0, unpriced=self.unpriced + 1, fault=fault or self.fault)
        return replace(self, calling=0, charged=self.charged + price, fault=fault or self.fault)

    def unpaid(self) -> Self:
        """End a call that was certainly not paid."""
        return replace(self, calling=0)

    def lost(self, fault: str) -> Self:
        """End a call that may have been paid: its answer was lost."""
        if self.calling == UNKNOWN:
            return self.paid(None, fault)
        return replace(self.paid(self.calling, fault), unsure=self.unsure + self.calling)

    def found(self, price: int) -> Self:
        """Go on with a call that was taken for lost. price: as it was in `calling`."""
        if price == UNKNOWN:
            return replace(self, calling=price, unpriced=max(self.unpriced - 1, 0))
        return replace(self, calling=price, charged=max(self.charged - price, 0), unsure=max(self.unsure - price, 0))

    def taken_back(self, price: int) -> Self:
        """Take back a call that counted as lost, since it is certainly not paid. price: as it was in `calling`."""
        return self.found(price).unpaid()

    def assumed_sent(self) -> Self:
        """Return the cost if all planned calls may have been paid, since there is no record of them."""
        if self.estimated is None:
            return self.paid(None, INTERRUPTED)
        amount = max(self.estimated - self.charged, 0)
        return replace(self, calling=0, charged=self.charged + amount, unsure=self.unsure + amount, fault=INTERRUPTED)

    def ended(self) -> Self:
        """Return the cost of a finished task: a call in flight may have been paid, and nothing stays reserved."""
        cost = self.lost(self.fault) if self.calling else self
        return replace(cost, reserved=0) if cost.reserved else cost

    def carried_into(self, new: Cost) -> Cost:
        """Return the cost of the epoch that takes the place of this one, which ends without a result."""
        old = self.ended()
        return replace(
            new, charged=old.charged, unsure=old.unsure, unpriced=old.unpriced, fault=old.fault or INTERRUPTED
        )
