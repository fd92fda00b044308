"""Money of a task, in micro-dollars (millionths of a US dollar)."""

from __future__ import annotations

from msgspec import Struct


class Cost(Struct, frozen=True, omit_defaults=True, gc=False):
    """Money of one epoch of a task.

    estimated: of all planned calls by the price table; None if the price is unknown.
    day: days since 1970-01-01 UTC; the budgets of this day hold it.
    slots: counters of the budgets that hold it. reserved: what they hold for it.
    charged: calls that were sent. unsure: the part of it whose answer was lost.
    calling: price of the call in flight, which counts as sent if its owner dies.
    """

    estimated: int | None = None
    day: int = 0
    slots: tuple[int, ...] = ()
    reserved: int = 0
    charged: int = 0
    unsure: int = 0
    calling: int = 0
