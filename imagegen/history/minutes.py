"""Counts of one minute, their sums over instances, and percentiles of their histograms."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from itertools import accumulate
from typing import TypeVar

from msgspec import Struct

_Key = TypeVar("_Key", str, int)

Buckets = dict[int, int]
"""Counts of a histogram by the number of the bucket, without empty ones."""


class Minute(Struct, gc=False, omit_defaults=True):
    """Counts of one minute on one instance, or on several.

    Fields may be added, never changed: instances of several versions write them.

    Attributes:
        at: Unix time of its begin.
        depth, oldest_age_s: most tasks that waited in any instance's view, and the greatest age of the first one.
        in_flight: most attempts that ran at once.
        submits: by what they met. tasks: ended ones by state. calls: to the provider, by how they ended.
        waits: from a submit to the first attempt, see WAIT_BOUNDS_S. runs: of attempts, see CALL_BOUNDS_S.
        spent, saved: micro-dollars.
        commands: of Redis. instances: that wrote a minute in which something happened.
    """

    at: int
    depth: int = 0
    oldest_age_s: float = 0.0
    in_flight: int = 0
    submits: dict[str, int] = {}
    tasks: dict[str, int] = {}
    calls: dict[str, int] = {}
    waits: Buckets = {}
    runs: Buckets = {}
    spent: int = 0
    saved: int = 0
    commands: int = 0
    instances: int = 0

    @property
    def is_busy(self) -> bool:
        """Return whether there were tasks in it."""
        return bool(self.submits or self.tasks or self.calls or self.depth or self.in_flight)


def merged(first: Minute, second: Minute) -> Minute:
    """Return what happened on two instances together in the same minute."""
    return Minute(
        first.at,
        max(first.depth, second.depth),
        max(first.oldest_age_s, second.oldest_age_s),
        first.in_flight + second.in_flight,
        _sums(first.submits, second.submits),
        _sums(first.tasks, second.tasks),
        _sums(first.calls, second.calls),
        _sums(first.waits, second.waits),
        _sums(first.runs, second.runs),
        first.spent + second.spent,
        first.saved + second.saved,
        first.commands + second.commands,
        first.instances + second.instances,
    )


def _sums(first: Mapping[_Key, int], second: Mapping[_Key, int]) -> dict[_Key, int]:
    total = dict(first)
    for key, count in second.items():
        total[key] = total.get(key, 0) + count
    return total


def merge_into(minutes: dict[int, Minute], added: Iterable[Minute]) -> None:
    """Add minutes to those of the same time."""
    for minute in added:
        existing = minutes.get(minute.at)
        minutes[minute.at] = minute if existing is None else merged(existing, minute)


def quantile(buckets: Buckets, bounds: tuple[float, ...], share: float) -> float | None:
    """Return the value that this share of all values does not exceed; None without any.

    It is interpolated within its bucket. A value above the last bound counts as that bound.
    """
    numbers = sorted(buckets)
    if not numbers:
        return None
    counts = list(accumulate(buckets[number] for number in numbers))
    rank = share * counts[-1]
    at = bisect_left(counts, rank)
    number, before = numbers[at], counts[at - 1] if at else 0
    if number >= len(bounds):
        return bounds[-1]
    low = bounds[number - 1] if number else 0.0
    return low + (bounds[number] - low) * (rank - before) / (counts[at] - before)
