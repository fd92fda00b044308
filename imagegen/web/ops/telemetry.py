"""Telemetry of this process: the sources of its metrics, its counters and the board."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from aiohttp import web
from msgspec import Struct

from imagegen.accounts.budget_watch import BudgetWatch
from imagegen.accounts.counts import Counts
from imagegen.metrics import Meter, RecentRates
from imagegen.providers.channel_counts import ChannelStatus
from imagegen.queue.monitor import QueueMonitor

_NUMBER = re.compile(r"-\d+$")


class ProviderLimits(Struct, frozen=True):
    """Limits of calls to the provider.

    concurrency: simultaneous calls; rate_per_min: calls a minute, None for no limit.
    blocked: why no call may be made now and the Unix time until when, None if calls may be made.
    """

    concurrency: int
    rate_per_min: float | None
    blocked: Callable[[], tuple[str, float] | None]

    @property
    def blocked_s(self) -> float:
        blocked = self.blocked()
        return max(blocked[1] - time.time(), 0.0) if blocked else 0.0


class Telemetry(Struct, frozen=True):
    """Sources of /metrics, /api/stats and the board.

    loops: the names of the side loops that live. max_queue: of waiting tasks. store_writable: whether images can be
    saved. key_accepted: whether the provider accepts our key. spending: what this process has spent and saved.
    paused_since: Unix time since when claiming is paused, None if it is not.
    channels: returns the state of all channels.
    """

    meter: Meter
    recent: RecentRates
    backlog: QueueMonitor
    upstream: ProviderLimits
    loops: Callable[[], Iterable[str]]
    max_queue: int
    store_writable: Callable[[], bool]
    key_accepted: Callable[[], bool]
    budgets: BudgetWatch
    spending: Counts
    paused_since: Callable[[], float | None]
    channels: Callable[[], Sequence[ChannelStatus]]

    def loops_by_kind(self) -> Mapping[str, int]:
        """Return the numbers of loops by kind: `loop-0`, `loop-1`, … are one kind."""
        return dict(sorted(Counter(_NUMBER.sub("", name) for name in self.loops()).items()))


OBSERVED = web.AppKey("observed", Telemetry)
