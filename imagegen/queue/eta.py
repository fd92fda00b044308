"""Position of a task in the queue, and its remaining time estimated from measured run times."""

from __future__ import annotations

import math
import re
import statistics
from bisect import bisect_left, bisect_right, insort
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from functools import lru_cache

import msgspec
from msgspec import Struct

from imagegen.tasks.task import IN_LINE, State, Task

RUNS_PER_WORKLOAD = 20
MAX_WORKLOADS = 500
FORECAST_MAX_AGE_S = 0.05

_NUMBER_BITS = 64
_ENTRY = re.compile(r"[0-9]{1,20}-[0-9]{1,20}")

WorkloadKey = tuple[object, ...]
"""Model, width, height, n and steps, which decide the run time; the model alone if the request is not at hand."""


class QueuePosition(Struct, frozen=True, gc=False):
    """Position of a task, and its remaining time.

    position: 1 is next, None if the task does not wait in the queue; eta_s: remaining seconds, None if unknown.
    """

    position: int | None = None
    eta_s: float | None = None


UNKNOWN_POSITION = QueuePosition()


@lru_cache(maxsize=256)  # that of an entry is needed at its submit, for its position, and at its claim
def entry_order(entry_id: str) -> int:
    """Return an integer that orders entry ids: milliseconds, then the number of up to 64 bits."""
    milliseconds, _, number = entry_id.partition("-")
    return (int(milliseconds) << _NUMBER_BITS) + int(number)


def is_entry_id(text: str) -> bool:
    """Return whether a text is the id of an entry; each of its two numbers has up to 64 bits."""
    return _ENTRY.fullmatch(text) is not None and all(int(part) < 1 << _NUMBER_BITS for part in text.split("-"))


class _Size(Struct, gc=False):
    """Fields of a stored request that decide its run time; no other field is decoded."""

    width: int | None = None
    height: int | None = None
    n: int | None = None
    steps: int | None = None


_read_size = msgspec.json.Decoder(_Size).decode


def workload_key(task: Task) -> WorkloadKey:
    if not task.request_json:
        return (task.model,)
    size = _read_size(task.request_json)
    return (task.model, size.width, size.height, size.n, size.steps)


class WaitingEntries:
    """Waiting entries in order. Exact if one instance submits and claims all; else read again now and then.

    Of a long queue that peers filled only the first entries are listed. The others are counted, and their positions are
    estimated from the times in their ids, as if they had come evenly.

    read_at: Unix time of the last read.
    """

    def __init__(self) -> None:
        self._listed: list[int] = []
        self._behind = 0
        self._behind_from = self._behind_to = 0
        self.read_at = 0.0

    def __len__(self) -> int:
        return len(self._listed) + self._behind

    @property
    def vague(self) -> bool:
        """Whether the next entries are counted and not listed."""
        return self._behind > 0 and (not self._listed or self._listed[0] > self._behind_from)

    @property
    def first_at(self) -> float | None:
        """Unix time of the first entry; None if no entry waits."""
        first = self._behind_from if self.vague else self._listed[0] if self._listed else None
        return None if first is None else (first >> _NUMBER_BITS) / 1000

    def add(self, entry_id: str) -> None:
        order, listed = entry_order(entry_id), self._listed
        if not listed or listed[-1] < order:
            listed.append(order)
        else:
            insort(listed, order)

    def taken(self, entry_ids: Sequence[str]) -> None:
        """Remove entries that were claimed, mostly the first ones."""
        orders = [entry_order(entry_id) for entry_id in entry_ids]
        if self._listed[: len(orders)] == orders:
            del self._listed[: len(orders)]
        else:
            for entry_id in entry_ids:
                self.remove(entry_id)

    def remove(self, entry_id: str) -> None:
        if not entry_id or entry_id == IN_LINE:
            return
        order = entry_order(entry_id)
        at = bisect_left(self._listed, order)
        if at < len(self._listed) and self._listed[at] == order:
            del self._listed[at]
        elif self._behind and self._behind_from < order <= self._behind_to:
            self._behind -= 1

    def replace(self, entry_ids: Iterable[str], read_at: float, *, behind: int = 0, last: str = "") -> None:
        """Replace all entries by those that were read.

        Args:
            behind: entries after the last one of `entry_ids`.
            last: the id of the last of them.
        """
        self.read_at = read_at
        self._listed = sorted(map(entry_order, entry_ids))
        self._behind = behind
        if behind:
            self._behind_from, self._behind_to = self._listed[-1], entry_order(last)

    def position(self, entry_id: str) -> int:
        """Return 1 for the next entry."""
        order = entry_order(entry_id)
        return bisect_left(self._listed, order) + self._behind_before(order) + 1

    def _behind_before(self, order: int) -> int:
        """Return about how many of the counted entries come before this one."""
        if not self._behind or order <= self._behind_from:
            return 0
        if order > self._behind_to:
            return self._behind
        if order == self._behind_to:
            return self._behind - 1
        share = (order - self._behind_from) / (self._behind_to - self._behind_from)
        return min(int(self._behind * share), self._behind - 1)


class RunTimes:
    """Seconds from the start of a task's last attempt to its end, by model, size and number of images."""

    def __init__(self) -> None:
        self._by_kind: OrderedDict[WorkloadKey, deque[float]] = OrderedDict()
        self._all: deque[float] = deque(maxlen=RUNS_PER_WORKLOAD)
        self._medians: dict[WorkloadKey, float] = {}

    def record(self, kind: WorkloadKey, seconds: float) -> None:
        for key in (kind, kind[:1]) if len(kind) > 1 else (kind,):
            runs = self._by_kind.get(key)
            if runs is None:
                runs = self._by_kind[key] = deque(maxlen=RUNS_PER_WORKLOAD)
            else:
                self._by_kind.move_to_end(key)
            runs.append(seconds)
            self._medians.pop(key, None)
        self._all.append(seconds)
        while len(self._by_kind) > MAX_WORKLOADS:
            oldest, _ = self._by_kind.popitem(last=False)
            self._medians.pop(oldest, None)

    def expected_of(self, task: Task) -> float | None:
        """Return the expected run time of a task; its workload is not decoded before the first run."""
        return self.expected(workload_key(task)) if self._all else None

    def expected(self, kind: WorkloadKey) -> float | None:
        """Return the median of the last runs of a workload; None if there was none."""
        median = self._medians.get(kind)
        if median is None and (runs := self._by_kind.get(kind)):
            median = self._medians[kind] = statistics.median(runs)
        return median

    @property
    def mean(self) -> float | None:
        """Mean of the last runs of all workloads."""
        return statistics.fmean(self._all) if self._all else None


class SlotForecast:
    """Times at which slots become free, computed at one moment for any number of waiting tasks.

    running_left_s: of the busy slots; mean_s: run time of each waiting task.
    """

    def __init__(self, running_left_s: list[float], slots: int, mean_s: float) -> None:
        self._free_at = sorted([*running_left_s[:slots], *[0.0] * (slots - len(running_left_s))])
        self._mean_s = mean_s
        self._begun_in_all = self._begun(self._free_at[-1]) if mean_s > 0.0 else 0
        self._turns_of_all = self._turns(slots) if mean_s > 0.0 else []

    def wait_s(self, ahead: int) -> float:
        """Return the seconds until a slot takes the task that has `ahead` tasks before it.

        The slots that are free soon enough to take any of them take turns, once all of those are free.
        """
        if self._mean_s <= 0.0:
            return self._free_at[0]
        begun, turns = self._begun_in_all, self._turns_of_all
        if ahead < begun:
            taking = bisect_right(self._free_at, ahead, key=self._begun)
            begun, turns = self._begun(self._free_at[taking - 1]), self._turns(taking)
        rounds, place = divmod(ahead - begun, len(turns))
        return turns[place] + rounds * self._mean_s

    def _begun(self, until: float) -> int:
        """Return how many tasks the slots have taken before a time."""
        mean_s = self._mean_s
        return sum([math.ceil((until - at) / mean_s) for at in self._free_at if at < until])

    def _turns(self, taking: int) -> list[float]:
        """Return when the first slots are free once all of them were, in order."""
        mean_s, free_at = self._mean_s, self._free_at[:taking]
        return sorted([at + math.ceil((free_at[-1] - at) / mean_s) * mean_s for at in free_at])


def remaining_s(expected_s: float, elapsed_s: float) -> float:
    """Return the remaining time of a run; an overdue run is expected to take a tenth more."""
    return max(expected_s - elapsed_s, expected_s * 0.1)


class EtaEstimator:
    """Estimator of positions and remaining times. slots: tasks that run at once on this instance.

    paused: whether claiming is paused, so that no time can be estimated for a waiting task.
    """

    def __init__(self, slots: int) -> None:
        self.waiting = WaitingEntries()
        self.runs = RunTimes()
        self._slots = slots
        self._running: dict[str, tuple[WorkloadKey, float]] = {}
        self._latest: tuple[float, int, SlotForecast | None] = (0.0, 0, None)
        self.paused = False

    def started(self, task: Task, now: float) -> None:
        self._running[task.id] = (workload_key(task), now)

    def ended(self, task: Task, completed_at: float | None) -> None:
        """Record the end of an attempt; only a completed one counts as a run time."""
        kind, began = self._running.pop(task.id, (None, 0.0))
        if kind is not None and completed_at is not None:
            self.runs.record(kind, completed_at - began)

    def position_of(
        self, task: Task, now: float, instances: int = 1, line_position: int | None = None
    ) -> QueuePosition:
        """Return the position of an unfinished task.

        instances: how many share the queue. line_position: of a task in a line.
        """
        expected_s = self.runs.expected_of(task)
        if task.state is State.PROCESSING:
            if expected_s is None or task.started_at is None:
                return UNKNOWN_POSITION
            running = self._running.get(task.id)
            began = running[1] if running else task.started_at
            return QueuePosition(None, round(remaining_s(expected_s, now - began), 1))
        if task.retry_at is not None or not task.entry_id or (task.entry_id == IN_LINE and line_position is None):
            wait = max((task.retry_at or now) - now, 0.0)
            if expected_s is None or self.paused:
                return UNKNOWN_POSITION
            return QueuePosition(None, round(wait + expected_s, 1))
        position = self.waiting.position(task.entry_id) if line_position is None else line_position
        forecast = None if expected_s is None or self.paused else self._forecast(now, instances)
        if expected_s is None or forecast is None:
            return QueuePosition(position)
        return QueuePosition(position, round(forecast.wait_s(position - 1) + expected_s, 1))

    def _forecast(self, now: float, instances: int) -> SlotForecast | None:
        """Return the forecast, None before the first run. One serves many submits: results are rounded coarsely."""
        seen_at, seen_by, forecast = self._latest
        if forecast is not None and 0.0 <= now - seen_at < FORECAST_MAX_AGE_S and seen_by == instances:
            return forecast
        mean_s = self.runs.mean
        if mean_s is None:
            return None
        expected = self.runs.expected
        running = [remaining_s(expected(kind) or mean_s, now - began) for kind, began in self._running.values()]
        forecast = SlotForecast(running, self._slots * instances, mean_s)
        self._latest = (now, instances, forecast)
        return forecast
