"""Counts of a channel's calls, and what `GET /api/channels` and the metrics show of channels and their keys."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from msgspec import Struct


@dataclass(slots=True)
class CallCounts:
    """Calls with one key since the start of this process. errors: by code. spent: micro-dollars."""

    calls: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    in_flight: int = 0
    spent: int = 0


class KeyStatus(Struct, frozen=True):
    """State of a key.

    id: begin of its fingerprint. source: variable or file with it, empty without a key. last4: empty if the key is
    short. state: `healthy`, `cooling` or `out`. until: Unix time of the next call. reason: code of the last refusal.
    """

    id: str
    source: str
    last4: str
    state: str
    until: float | None
    reason: str | None
    counts: CallCounts


class ChannelStatus(Struct, frozen=True):
    """State of a channel.

    state: `healthy`, `resting` or `out`. models: patterns and renames. host: None without one.
    """

    name: str
    provider: str
    priority: int
    weight: int
    models: tuple[str, ...]
    host: str | None
    state: str
    until: float | None
    reason: str | None
    concurrency: int | None
    rate_per_min: float | None
    keys: tuple[KeyStatus, ...]

    @property
    def totals(self) -> CallCounts:
        """Return the counts of all keys together."""
        counts = CallCounts()
        for key in self.keys:
            counts.calls += key.counts.calls
            counts.errors += key.counts.errors
            counts.in_flight += key.counts.in_flight
            counts.spent += key.counts.spent
        return counts


def errors_by_code(counts: CallCounts) -> dict[str, int]:
    """Return the errors in the order of their codes."""
    return dict(sorted(counts.errors.items()))
