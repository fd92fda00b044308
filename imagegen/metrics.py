"""Counters and histograms of this process, cheap to update, read on request.

Names and labels are of bounded sets: routes, kinds, codes. Never an id, an address or a client's text.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

MONTH_S = 30 * 86_400.0

COMMAND_PURPOSES = (
    "submit", "read", "claim", "start", "finish", "retry", "renew", "takeover", "release", "cancel",
    "control", "idempotency", "limits", "pictures", "hooks", "list", "stats", "restore", "usage", "alerts", "keys",
    "other",
)  # fmt: skip
"""What a Redis command may be for. The inner commands of scripts count, as Upstash bills them; AUTH, HELLO, CLIENT,
INFO, PING and the loading of scripts don't."""

SUBMITS = ("MISS", "COALESCED", "HIT", "REFRESH", "FULL", "OVER_BUDGET")
"""What a submit met: the values of `X-Cache`, a full queue, and a budget that is used up."""

WRITTEN_BACK = ("waiting", "running", "finished")
"""Tasks that are written back after Redis has lost them."""

OTHER_MODEL = "other"

REQUEST_BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
CALL_BOUNDS_S = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0)
WAIT_BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)


class Histogram:
    """Histogram of values.

    counts: how many values were up to each of `bounds`, and above the last; total: their sum.
    """

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def add(self, other: Histogram) -> None:
        """Add the counts of another histogram with the same bounds."""
        self.counts = [own + added for own, added in zip(self.counts, other.counts, strict=True)]
        self.total += other.total

    @property
    def count(self) -> int:
        return sum(self.counts)


Request = tuple[str, str, int]
"""Labels of requests: method, template of the route, status."""


class TaskLabels(NamedTuple):
    """Labels of finished tasks; `code` is empty without an error."""

    state: str
    code: str
    model: str


class Meter:
    """Metrics of a process, shared by all its parts.

    models: ids with their own label; every other one is `other`, since clients may name any.
    """

    def __init__(self, models: Collection[str] = (), *, clock: Callable[[], float] = time.monotonic) -> None:
        self._models = frozenset(models)
        self._clock = clock
        self._started_at = clock()
        self.started_unix_s = time.time()
        self.commands = Counter(dict.fromkeys(COMMAND_PURPOSES, 0))
        self.submits = Counter(dict.fromkeys(SUBMITS, 0))
        self.tasks: Counter[TaskLabels] = Counter()
        self.attempts: defaultdict[str, Histogram] = defaultdict(lambda: Histogram(CALL_BOUNDS_S))
        self.calls: defaultdict[str, Histogram] = defaultdict(lambda: Histogram(CALL_BOUNDS_S))
        self.requests: defaultdict[Request, Histogram] = defaultdict(lambda: Histogram(REQUEST_BOUNDS_S))
        self.waits = Histogram(WAIT_BOUNDS_S)
        self.open_requests = 0
        self.ambiguous = 0
        self.taken_back_micro_usd = 0
        self.takeovers = 0
        self.dead_letters = 0
        self.vanished = 0
        self.written_back = Counter(dict.fromkeys(WRITTEN_BACK, 0))
        self.images = 0
        self.image_bytes = 0
        self.thumbnails = 0
        self.alerts: Counter[tuple[str, str]] = Counter()

    @property
    def uptime_s(self) -> float:
        return self._clock() - self._started_at

    @property
    def commands_a_month(self) -> float:
        """The commands of 30 days, at the rate so far; it means little in the first minutes."""
        return self.commands.total() / max(self.uptime_s, 1.0) * MONTH_S

    def redis_commands_sent(self, purpose: str, commands: int) -> None:
        """Count commands that were sent to Redis."""
        self.commands[purpose] += commands

    def finished(self, state: str, code: str, model: str) -> None:
        """Count a task that this process finished."""
        self.tasks[TaskLabels(state, code, model if model in self._models else OTHER_MODEL)] += 1

    def observe_provider_call(self, code: str, seconds: float, *, ambiguous: bool = False) -> None:
        """Count a call to the provider. code: `ok`, an error code, or `abandoned`."""
        self.calls[code].observe(seconds)
        self.ambiguous += ambiguous

    def images_stored(self, sizes_bytes: Collection[int]) -> None:
        """Count the stored images of a completed task."""
        self.images += len(sizes_bytes)
        self.image_bytes += sum(sizes_bytes)

    def finished_by_state(self) -> Mapping[str, int]:
        """Return the numbers of finished tasks by state."""
        states = dict.fromkeys(("completed", "failed", "cancelled"), 0)
        for key, count in self.tasks.items():
            states[key.state] += count
        return states


class Rates(NamedTuple):
    """Per minute, over the last `window_s` seconds."""

    window_s: float
    submits: float
    finished: float
    requests: float
    commands: float


class RecentRates:
    """Rates from the counters: the change since a request about a minute ago, else since the start."""

    _KEPT = 12
    _APART_S = 5.0
    _WINDOW_S = 60.0

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._samples: deque[tuple[float, tuple[int, ...]]] = deque([(0.0, (0, 0, 0, 0))], maxlen=self._KEPT)

    def rates(self) -> Rates:
        now, totals = self._meter.uptime_s, self._totals()
        while len(self._samples) > 1 and now - self._samples[1][0] >= self._WINDOW_S:
            self._samples.popleft()
        then, before = self._samples[0]
        window_s = max(now - then, 1.0)
        if now - self._samples[-1][0] >= self._APART_S:
            self._samples.append((now, totals))
        return Rates(window_s, *((new - old) * 60 / window_s for new, old in zip(totals, before, strict=True)))

    def _totals(self) -> tuple[int, ...]:
        meter = self._meter
        requests = sum(histogram.count for histogram in meter.requests.values())
        return meter.submits.total(), meter.tasks.total(), requests, meter.commands.total()
