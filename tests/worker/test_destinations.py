"""Order of deliveries to many receivers, quick, slow and dead ones, by a clock that the test moves."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Mapping

import pytest

from imagegen.worker import destinations as module
from imagegen.worker.destinations import (
    MAX_CONCURRENT,
    MAX_HEALTHY,
    MAX_PAUSE_S,
    MAX_PER_HOST,
    MAX_SLOW_EACH,
    MAX_UNPROVEN,
    SLOW_S,
    Destinations,
    Try,
)
from tests.support import over_rows


class Receivers:
    """Simulation of receivers; each takes its number of seconds a try, None means a timeout after 10 s."""

    def __init__(self, took_s: Mapping[str, float | None]) -> None:
        self.took_s = dict(took_s)
        self.schedule: Destinations[tuple[str, int]] = Destinations()
        self.now = 0.0
        self.events: list[tuple[float, int, str, Try[tuple[str, int]], float]] = []
        self.started: dict[str, list[float]] = {name: [] for name in took_s}
        self.done: dict[str, list[float]] = {name: [] for name in took_s}
        self.order: list[tuple[str, int]] = []
        self.most = 0
        self._count = 0

    def add(self, name: str, count: int, due_at: float | None = None) -> None:
        for number in range(count):
            self.schedule.add(name, self.now if due_at is None else due_at, (name, number), self.now)

    def run(self, until: float) -> None:
        while True:
            while running := self.schedule.start(self.now):
                name = running.item[0]
                took = self.took_s[name]
                self.order.append(running.item)
                self.started[name].append(self.now)
                self._push(self.now + (10.0 if took is None else took), "end", running)
                if took is None or took > SLOW_S:
                    self._push(self.now + SLOW_S, "slow", running)
            self.most = max(self.most, sum(event[2] == "end" for event in self.events))
            wait_s = self.schedule.wait_s(self.now)
            at = min(self.events[0][0] if self.events else until, until if wait_s is None else self.now + wait_s)
            if at >= until:
                self.now = until
                return
            self.now = at
            while self.events and self.events[0][0] <= self.now:
                _, _, kind, running, began = heapq.heappop(self.events)
                name = running.item[0]
                if kind == "slow":
                    self.schedule.slow_down(running, self.now)
                else:
                    failed = self.took_s[name] is None
                    self.schedule.end(running, self.now, took_s=self.now - began, failed=failed)
                    self.done[name].append(self.now)

    def _push(self, at: float, kind: str, running: Try[tuple[str, int]]) -> None:
        self._count += 1
        heapq.heappush(self.events, (at, self._count, kind, running, self.now))


def url(host: object, segment: object = "hook") -> str:
    return f"https://{host}:443/{segment}"


def test_a_slow_receiver_takes_two_slots_and_delays_no_other() -> None:
    world = Receivers({url("slow"): 9.0, url("good"): 0.05})
    world.add(url("slow"), 2_100)
    world.run(30.0)
    world.add(url("good"), 5)
    world.run(31.0)
    assert len(world.done[url("good")]) == 5
    assert len(world.started[url("slow")]) <= MAX_SLOW_EACH * 5
    assert world.most <= MAX_SLOW_EACH + MAX_HEALTHY


@over_rows("took_s", [9.0, None])
@over_rows("known", [False, True])
def test_slow_hosts_leave_slots_for_a_healthy_one(took_s: float | None, known: bool) -> None:
    slow = [url(f"slow{n}") for n in range(60)]
    world = Receivers(dict.fromkeys(slow, took_s) | {url("good"): 0.05})
    for name in slow:
        world.add(name, 50)
    if known:
        world.run(100.0)
    world.add(url("good"), 5)
    world.run(world.now + 2.0)
    assert len(world.done[url("good")]) == 5
    assert world.most <= MAX_CONCURRENT


def test_one_host_with_many_paths_takes_only_its_share() -> None:
    paths = [url("slow", n) for n in range(500)]
    world = Receivers(dict.fromkeys(paths, 9.0) | {url("good"): 0.05})
    for name in paths:
        world.add(name, 2)
    world.run(0.5)
    world.add(url("good"), 5)
    world.run(2.0)
    assert len(world.done[url("good")]) == 5
    assert sum(map(len, world.started.values())) <= MAX_PER_HOST + 5
    world.run(20_000.0)
    assert sum(map(len, world.done.values())) == 1_005


def test_another_path_of_a_slow_receivers_host_is_called_at_once() -> None:
    world = Receivers({url("host", "slow"): 9.0, url("host", "good"): 0.05})
    world.add(url("host", "slow"), 100)
    world.run(5.0)
    world.add(url("host", "good"), 5)
    world.run(6.0)
    assert len(world.done[url("host", "good")]) == 5


def test_a_healthy_receiver_gets_more_slots_after_its_first_response() -> None:
    world = Receivers({url("good"): 0.1})
    world.add(url("good"), 100)
    world.run(0.05)
    assert len(world.started[url("good")]) == MAX_UNPROVEN
    world.run(0.15)
    assert len(world.started[url("good")]) == MAX_UNPROVEN + MAX_HEALTHY
    world.run(5.0)
    assert len(world.done[url("good")]) == 100


def test_a_silent_receiver_backs_off_and_recovers_at_once() -> None:
    world = Receivers({url("silent"): None})
    world.add(url("silent"), 100)
    world.run(200.0)
    starts = world.started[url("silent")][MAX_UNPROVEN:]
    gaps = [after - before for before, after in itertools.pairwise(starts)]
    assert gaps == sorted(gaps)
    assert gaps[-1] == 10.0 + MAX_PAUSE_S
    world.took_s[url("silent")] = 0.01
    world.run(250.0)
    assert len(world.done[url("silent")]) == 100


def test_what_is_due_first_is_called_first_within_a_destination() -> None:
    world = Receivers({url("good"): 0.1})
    for number, due_at in enumerate([3.0, 1.0, 2.0]):
        world.schedule.add(url("good"), due_at, (url("good"), number), 0.0)
    world.run(10.0)
    assert [number for _, number in world.order] == [1, 2, 0]
    assert world.started[url("good")] == [1.0, 2.0, 3.0]


def test_a_retry_after_pauses_the_whole_receiver() -> None:
    schedule: Destinations[int] = Destinations()
    for number in range(3):
        schedule.add(url("busy"), 0.0, number, 0.0)
    running = schedule.start(0.0)
    assert running is not None
    schedule.end(running, 0.1, took_s=0.1, failed=True, retry_after_s=20.0)
    assert schedule.start(20.0) is None
    assert schedule.wait_s(0.1) == pytest.approx(20.0)
    assert schedule.start(20.1) is not None


def test_destinations_without_work_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_REMEMBERED", 10)
    names = [url(n) for n in range(50)]
    world = Receivers({name: None if n % 2 else 0.1 for n, name in enumerate(names)})
    for name in names:
        world.add(name, 1)
    world.run(1_000.0)
    assert sum(map(len, world.done.values())) == 50
    assert len(world.schedule._all) <= 10
    assert not world.schedule._blocked
    assert not +world.schedule._of_host


def test_an_old_timer_takes_no_turn_from_a_new_destination() -> None:
    schedule: Destinations[int] = Destinations()
    schedule.add(url("a"), 0.0, 0, 0.0)
    schedule.add(url("a"), 0.0, 1, 0.0)
    first = schedule.start(0.0)
    assert first is not None
    schedule.end(first, 1.0, took_s=5.0, failed=True)  # a pause until 6.0, for which a timer is set
    paused = schedule._all[url("a")]
    paused.paused_until = 0.0
    schedule.add(url("a"), 1.0, 2, 1.0)
    for now in (2.0, 3.0):
        running = schedule.start(now)
        assert running is not None
        schedule.end(running, now, took_s=0.1, failed=False)
    assert url("a") not in schedule._all
    schedule.add(url("a"), 6.0, 3, 6.0)
    assert schedule.start(6.5) is not None


@over_rows("seed", range(20))
def test_every_delivery_is_attempted_eventually(seed: int) -> None:
    dice = random.Random(seed)
    names = [url(f"host{dice.randrange(30)}", n) for n in range(120)]
    world = Receivers({name: dice.choice([0.01, 0.2, 1.5, 9.0, None]) for name in names})
    added = 0
    for _ in range(150):
        name, count = dice.choice(names), dice.randrange(1, 8)
        world.add(name, count, world.now + dice.choice([0.0, 0.0, 3.0, 40.0]))
        added += count
        world.took_s[dice.choice(names)] = dice.choice([0.01, 0.2, 1.5, 9.0, None])
        world.run(world.now + dice.random() * 2)
        assert world.most <= MAX_CONCURRENT
    world.took_s = dict.fromkeys(names, 0.01)
    world.run(world.now + 300.0)
    assert sum(map(len, world.done.values())) == added
    assert world.schedule.start(world.now) is None
    assert not world.schedule._blocked
    assert (world.schedule._under_way, world.schedule._in_quick, world.schedule._in_slow) == (0, 0, 0)
