"""Recorder of this instance's minutes: the change of its counters, and samples of the queue.

It writes at most one command a minute, and only after a minute with tasks in it. The commands of idle minutes are
written with the next busy one.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from loguru import logger
from msgspec import Struct, field

from imagegen.errors import QueueUnavailable
from imagegen.history.history_store import KEPT_S, HistoryStore
from imagegen.history.minutes import Buckets, Minute, merge_into, merged
from imagegen.metrics import Histogram, Meter
from imagegen.redis_client.connection import Connection
from imagegen.redis_client.redis_errors import RedisError, shown

_Key = TypeVar("_Key", str, int)

STEP_S = 60
SAMPLES_PER_STEP = 12
CLOSE_TIMEOUT_S = 1.0


class Sample(Struct, frozen=True):
    """State of the queue at one moment, from the memory of this process. Money: micro-dollars since the start."""

    depth: int
    oldest_age_s: float
    in_flight: int
    spent: int
    saved: int


class _Totals(Struct, frozen=True):
    """Counters since the start of the process."""

    submits: Mapping[str, int] = field(default_factory=dict)
    tasks: Mapping[str, int] = field(default_factory=dict)
    calls: Mapping[str, int] = field(default_factory=dict)
    waits: Mapping[int, int] = field(default_factory=dict)
    runs: Mapping[int, int] = field(default_factory=dict)
    spent: int = 0
    saved: int = 0
    commands: int = 0


class HistoryRecorder:
    """Minutes of this instance, and the loop that writes them. step_s: seconds from one to the next."""

    def __init__(
        self,
        connection: Connection,
        store: HistoryStore,
        sample: Callable[[], Sample],
        *,
        step_s: int = STEP_S,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self._connection = connection
        self._meter = connection.meter
        self._store = store
        self._sample = sample
        self._step_s = step_s
        self._clock = clock or connection.clock
        self._unwritten: deque[Minute] = deque(maxlen=KEPT_S // STEP_S)
        self._before = _Totals()
        self._peak = Sample(0, 0.0, 0, 0, 0)
        self._at = self._now()
        self._last: Minute | None = None
        self._not_before = 0

    def _now(self) -> int:
        """Return the begin of the present minute."""
        return int(self._clock()) // self._step_s * self._step_s

    @property
    def current(self) -> Minute:
        """Return the minute that is not over yet."""
        return self._minute(_totals(self._meter, self._sample()))

    @property
    def recent(self) -> Minute:
        """Return the present minute and the last of this instance together."""
        current = self.current
        return current if self._last is None else merged(current, self._last)

    @property
    def unwritten(self) -> list[Minute]:
        """Return the minutes that no instance can read yet, with the present one."""
        return [*self._unwritten, self.current]

    async def record_forever(self) -> None:
        """Sample the queue some times a minute, and write each busy minute once it is over."""
        while True:
            await asyncio.sleep(self._step_s / SAMPLES_PER_STEP)
            await self.step()

    async def step(self) -> None:
        """Sample the queue, and write the minutes that are due."""
        self._sample_queue()
        if self._at >= self._not_before and any(minute.is_busy for minute in self._unwritten):
            await self._write()

    def _sample_queue(self) -> None:
        """Sample the queue, and begin the next minute if this one is over."""
        self._take(self._sample())
        if (now := self._now()) != self._at:
            totals = _totals(self._meter, self._sample())
            self._last = self._minute(totals)
            self._unwritten.append(self._last)
            if now < self._at:  # the clock went back
                self._not_before = now
            self._before, self._at, self._peak = totals, now, Sample(0, 0.0, 0, 0, 0)

    async def _write(self) -> None:
        """Write the minutes that are over, if Redis takes them. After a second command the next minute waits."""
        minutes = list(self._unwritten)
        self._not_before = self._at + self._step_s
        try:
            cost = await self._store.add(minutes)
        except QueueUnavailable:
            return
        except RedisError as error:
            logger.error("The history of the last minutes can't be written and is left out: {}", shown(error))
            cost = 1
        self._not_before = self._at + cost * self._step_s
        for _ in minutes:
            self._unwritten.popleft()

    async def close(self) -> None:
        """Write the rest with the begun minute, if Redis answers in time."""
        self._unwritten.append(self.current)
        if not any(minute.is_busy for minute in self._unwritten) or self._connection.health.down_since is not None:
            return
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self._write()
        except TimeoutError:
            logger.debug("Redis did not answer while stopping; the history lacks the last minute")

    def _take(self, sample: Sample) -> None:
        peak = self._peak
        self._peak = Sample(
            max(sample.depth, peak.depth),
            max(sample.oldest_age_s, peak.oldest_age_s),
            max(sample.in_flight, peak.in_flight),
            sample.spent,
            sample.saved,
        )

    def _minute(self, totals: _Totals) -> Minute:
        before, peak = self._before, self._peak
        minute = Minute(
            self._at,
            peak.depth,
            round(peak.oldest_age_s, 1),
            peak.in_flight,
            _change(before.submits, totals.submits),
            _change(before.tasks, totals.tasks),
            _change(before.calls, totals.calls),
            _change(before.waits, totals.waits),
            _change(before.runs, totals.runs),
            totals.spent - before.spent,
            totals.saved - before.saved,
            totals.commands - before.commands,
        )
        minute.instances = int(minute.is_busy)
        return minute


def with_unwritten(minutes: Mapping[int, Minute], unwritten: Iterable[Minute]) -> list[Minute]:
    """Return the minutes of all instances in order, with those that this one has not written yet."""
    total = dict(minutes)
    merge_into(total, unwritten)
    return [total[at] for at in sorted(total)]


def _totals(meter: Meter, sample: Sample) -> _Totals:
    runs = Counter[int]()
    for histogram in meter.attempts.values():
        runs.update(_buckets(histogram))
    return _Totals(
        {kind.lower(): count for kind, count in meter.submits.items()},
        meter.finished_by_state(),
        {code: histogram.count for code, histogram in meter.calls.items()},
        _buckets(meter.waits),
        runs,
        sample.spent,
        sample.saved,
        meter.commands.total(),
    )


def _buckets(histogram: Histogram) -> Buckets:
    return {number: count for number, count in enumerate(histogram.counts) if count}


def _change(before: Mapping[_Key, int], now: Mapping[_Key, int]) -> dict[_Key, int]:
    return {key: count - before.get(key, 0) for key, count in now.items() if count != before.get(key, 0)}
