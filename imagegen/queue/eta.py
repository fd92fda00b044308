"""Owns the guess of how long a task will take: its place in the queue, and the time left from measured run times."""

from __future__ import annotations

import math
import statistics
from bisect import bisect_left, bisect_right, insort
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from functools import lru_cache

import msgspec
from msgspec import Struct

from imagegen.tasks.task import State, Task

RUNS_PER_WORKLOAD = 20
MAX_WORKLOADS = 500
FORECAST_MAX_AGE_S = 0.05

_NUMBER_BITS = 64

WorkloadKey = tuple[object, ...]
"""Model, width, height, n and steps: what decides how long a run takes. The model alone where no more is known."""


class QueuePosition(Struct, frozen=True, gc=False):
    """position: 1 is next, None where the task does not wait in the queue; eta_s: seconds left, None while unknown."""

    position: int | None = None
    eta_s: float | None = None


UNKNOWN_POSITION = QueuePosition()


def entry_order(entry_id: str) -> int:
    """Entry ids rise with time: milliseconds, and a number of up to 64 bits among those of one of them."""
    milliseconds, _, number = entry_id.partition("-")
    return (int(milliseconds) << _NUMBER_BITS) + int(number)


# What is added to the line is mostly asked for at once.
_order_lately = lru_cache(maxsize=64)(entry_order)


class _Size(Struct, gc=False):
    """What of a request's stored form says how long it takes; nothing else of it is read."""

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
    """The entries that wait, in order. Exact where one instance submits and claims all; else made anew now and then.

    Of a long queue that others filled only the first entries are known; those behind them are counted, and their
    places are estimated from the times in their ids, as if they had come evenly.

    read_at: when it was made anew, Unix time.
    """

    def __init__(self) -> None:
        self._line: list[int] = []
        self._behind = 0
        self._behind_from = self._behind_to = 0
        self.read_at = 0.0

    def __len__(self) -> int:
        return len(self._line) + self._behind

    @property
    def vague(self) -> bool:
        """Whether the next entries are not known one by one, though there are some."""
        return self._behind > 0 and (not self._line or self._line[0] > self._behind_from)

    @property
    def first_at(self) -> float | None:
        """When the next one came, Unix time; None where none waits."""
        first = self._behind_from if self.vague else self._line[0] if self._line else None
        return None if first is None else (first >> _NUMBER_BITS) / 1000

    def add(self, entry_id: str) -> None:
        order, line = _order_lately(entry_id), self._line
        if not line or line[-1] < order:
            line.append(order)
        else:
            insort(line, order)

    def taken(self, entry_ids: Sequence[str]) -> None:
        """Takes entries out that were claimed, mostly the first ones."""
        orders = [entry_order(entry_id) for entry_id in entry_ids]
        if self._line[: len(orders)] == orders:
            del self._line[: len(orders)]
        else:
            for entry_id in entry_ids:
                self.remove(entry_id)

    def remove(self, entry_id: str) -> None:
        if not entry_id:
            return
        order = entry_order(entry_id)
        at = bisect_left(self._line, order)
        if at < len(self._line) and self._line[at] == order:
            del self._line[at]
        elif self._behind and self._behind_from < order <= self._behind_to:
            self._behind -= 1

    def replace(self, entry_ids: Iterable[str], read_at: float, *, behind: int = 0, last: str = "") -> None:
        """Set the line anew.

        Args:
            behind: entries after the last one of `entry_ids`.
            last: the id of the last of them.
        """
        self.read_at = read_at
        self._line = sorted(map(entry_order, entry_ids))
        self._behind = behind
        if behind:
            self._behind_from, self._behind_to = self._line[-1], entry_order(last)

    def position(self, entry_id: str) -> int:
        """Return 1 for the next entry."""
        order = _order_lately(entry_id)
        return bisect_left(self._line, order) + self._behind_before(order) + 1

    def _behind_before(self, order: int) -> int:
        """Return how many of the entries that are only counted come before this one, about."""
        if not self._behind or order <= self._behind_from:
            return 0
        if order > self._behind_to:
            return self._behind
        if order == self._behind_to:
            return self._behind - 1
        share = (order - self._behind_from) / (self._behind_to - self._behind_from)
        return min(int(self._behind * share), self._behind - 1)


class RunTimes:
    """Seconds from the start of a task's last attempt to its end, by model, size and number of pictures."""

    def __init__(self) -> None:
        self._by_kind: OrderedDict[WorkloadKey, deque[float]] = OrderedDict()
        self._all: deque[float] = deque(maxlen=RUNS_PER_WORKLOAD)
        self._medians: dict[WorkloadKey, float] = {}

    def record(self, kind: WorkloadKey, seconds: float) -> None:
        for one in (kind, kind[:1]) if len(kind) > 1 else (kind,):
            runs = self._by_kind.get(one)
            if runs is None:
                runs = self._by_kind[one] = deque(maxlen=RUNS_PER_WORKLOAD)
            else:
                self._by_kind.move_to_end(one)
            runs.append(seconds)
            self._medians.pop(one, None)
        self._all.append(seconds)
        while len(self._by_kind) > MAX_WORKLOADS:
            gone, _ = self._by_kind.popitem(last=False)
            self._medians.pop(gone, None)

    def expected_of(self, task: Task) -> float | None:
        """As `expected`; what kind it is need not be read where nothing has run."""
        return self.expected(workload_key(task)) if self._all else None

    def expected(self, kind: WorkloadKey) -> float | None:
        """The median of the last runs of the kind; None where there was none."""
        median = self._medians.get(kind)
        if median is None and (runs := self._by_kind.get(kind)):
            median = self._medians[kind] = statistics.median(runs)
        return median

    @property
    def mean(self) -> float | None:
        """Of the last runs of any kind."""
        return statistics.fmean(self._all) if self._all else None


class SlotForecast:
    """When slots come free, as seen at one moment; any number of waiting tasks is placed by it.

    running_left_s: of the slots that run something; mean_s: what each waiting task takes.
    """

    def __init__(self, running_left_s: list[float], slots: int, mean_s: float) -> None:
        self._free_at = sorted([*running_left_s[:slots], *[0.0] * (slots - len(running_left_s))])
        self._mean_s = mean_s
        self._begun_in_all = self._begun(self._free_at[-1]) if mean_s > 0.0 else 0
        self._turns_of_all = self._turns(slots) if mean_s > 0.0 else []

    def wait_s(self, ahead: int) -> float:
        """Seconds until a slot takes the task with so many before it.

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
        """Tasks that slots have taken before."""
        mean_s = self._mean_s
        return sum([math.ceil((until - at) / mean_s) for at in self._free_at if at < until])

    def _turns(self, taking: int) -> list[float]:
        """When the first slots are free once all of them were, in order."""
        mean_s, free_at = self._mean_s, self._free_at[:taking]
        return sorted([at + math.ceil((free_at[-1] - at) / mean_s) * mean_s for at in free_at])


def remaining_s(expected_s: float, elapsed_s: float) -> float:
    """What is left of a run; one that takes longer than expected is expected to take a tenth more."""
    return max(expected_s - elapsed_s, expected_s * 0.1)


class EtaEstimator:
    """slots: tasks that run at once on this instance; `instances` says how many share the queue."""

    def __init__(self, slots: int) -> None:
        self.line = WaitingEntries()
        self.runs = RunTimes()
        self._slots = slots
        self._running: dict[str, tuple[WorkloadKey, float]] = {}
        self._seen: tuple[float, int, SlotForecast | None] = (0.0, 0, None)

    def started(self, task: Task, now: float) -> None:
        self._running[task.id] = (workload_key(task), now)

    def ended(self, task: Task, completed_at: float | None) -> None:
        """An attempt ended; only one that completed its task says how long a run takes."""
        kind, began = self._running.pop(task.id, (None, 0.0))
        if kind is not None and completed_at is not None:
            self.runs.record(kind, completed_at - began)

    def position_of(self, task: Task, now: float, instances: int = 1) -> QueuePosition:
        """Where an unfinished task stands."""
        expected_s = self.runs.expected_of(task)
        if task.state is State.PROCESSING:
            if expected_s is None or task.started_at is None:
                return UNKNOWN_POSITION
            running = self._running.get(task.id)
            began = running[1] if running else task.started_at
            return QueuePosition(None, round(remaining_s(expected_s, now - began), 1))
        if task.retry_at is not None or not task.entry_id:
            wait = max((task.retry_at or now) - now, 0.0)
            return QueuePosition(None, None if expected_s is None else round(wait + expected_s, 1))
        position = self.line.position(task.entry_id)
        outlook = None if expected_s is None else self._forecast(now, instances)
        if expected_s is None or outlook is None:
            return QueuePosition(position)
        return QueuePosition(position, round(outlook.wait_s(position - 1) + expected_s, 1))

    def _forecast(self, now: float, instances: int) -> SlotForecast | None:
        """None while no run is known. One serves many submits: what is told is rounded to more than its age."""
        seen_at, seen_by, outlook = self._seen
        if outlook is not None and 0.0 <= now - seen_at < FORECAST_MAX_AGE_S and seen_by == instances:
            return outlook
        mean_s = self.runs.mean
        if mean_s is None:
            return None
        expected = self.runs.expected
        running = [remaining_s(expected(kind) or mean_s, now - began) for kind, began in self._running.values()]
        outlook = SlotForecast(running, self._slots * instances, mean_s)
        self._seen = (now, instances, outlook)
        return outlook
