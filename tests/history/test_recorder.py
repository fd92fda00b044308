"""Tests of the history in Redis: what several instances write, what it costs, and that nothing counts twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from imagegen.errors import QueueUnavailable
from imagegen.history.history_store import LIFE_S, HistoryStore
from imagegen.history.minutes import Minute
from imagegen.history.recorder import HistoryRecorder, Sample, with_unwritten
from tests.support import Clock

NOTHING = Sample(0, 0.0, 0, 0, 0)


class Recording:
    """One instance with its recorder, at a time that the test moves."""

    def __init__(self, instance: Any, clock: Clock) -> None:
        self.clock = clock
        self.sample = NOTHING
        self.meter, self.commands = instance.connection.meter, instance.connection.commands
        self.key = instance.keys.history
        self.store = HistoryStore(instance.connection, instance.keys, instance.parts.monitor.instance, min_interval_s=0)
        self.recorder = HistoryRecorder(instance.connection, self.store, lambda: self.sample, clock=clock)

    async def next_minute(self) -> int:
        """Let a minute end; return the commands that this cost."""
        before = self.meter.commands["stats"]
        self.clock.now += 60
        await self.recorder.step()
        return int(self.meter.commands["stats"] - before)


@pytest.fixture
def clock(make_instance: Callable[..., Any]) -> Clock:
    return Clock(make_instance(start=False).connection.clock() // 60 * 60)


@pytest.fixture
def record(make_instance: Callable[..., Any], clock: Clock) -> Callable[[], Recording]:
    return lambda: Recording(make_instance(start=False), clock)


async def test_an_idle_instance_writes_nothing_and_a_busy_one_a_command_a_minute(
    record: Callable[[], Recording],
) -> None:
    one = record()
    assert [await one.next_minute() for _ in range(5)] == [0] * 5
    costs = []
    for _ in range(6):
        one.meter.finished("completed", "", "m")
        costs.append(await one.next_minute())
    assert costs == [2, 0, 1, 1, 1, 1]  # the first write also sets the life of the stream
    assert [await one.next_minute() for _ in range(5)] == [0] * 5
    assert sum(minute.tasks.get("completed", 0) for minute in (await one.store.read()).values()) == 6
    assert 0 < await one.commands.ttl(one.key) <= LIFE_S


async def test_minutes_of_two_instances_add_up(record: Callable[[], Recording], clock: Clock) -> None:
    one, two = record(), record()
    began = int(clock.now)
    for each, state, wait_s in ((one, "completed", 0.4), (two, "failed", 40.0)):
        each.meter.finished(state, "", "m")
        each.meter.waits.observe(wait_s)
        each.meter.observe_provider_call("ok", 0.2)
        each.meter.submits["HIT"] += 2
        each.sample = Sample(7, 3.0, 2, 1_000, 500)
        await each.recorder.step()
    await one.next_minute()
    clock.now -= 60
    await two.next_minute()
    for reader in (one, two):
        (minute,) = (await reader.store.read()).values()
        assert (minute.at, minute.instances) == (began, 2)
        assert (minute.depth, minute.oldest_age_s, minute.in_flight) == (7, 3.0, 4)
        assert (minute.tasks, minute.calls, minute.submits) == ({"completed": 1, "failed": 1}, {"ok": 2}, {"hit": 4})
        assert (minute.spent, minute.saved) == (2_000, 1_000)
        assert sum(minute.waits.values()) == 2


async def test_the_commands_of_idle_minutes_come_with_the_next_busy_one(record: Callable[[], Recording]) -> None:
    one = record()
    for _ in range(3):
        one.meter.redis_commands_sent("claim", 5)
        assert await one.next_minute() == 0
    one.meter.finished("completed", "", "m")
    await one.next_minute()
    assert [minute.commands for minute in (await one.store.read()).values()] == [5, 5, 5, 0]


async def test_a_minute_that_was_written_twice_counts_once(record: Callable[[], Recording], clock: Clock) -> None:
    one, two = record(), record()
    minute = Minute(int(clock.now) - 60, tasks={"completed": 1})
    for _ in range(2):
        await one.store.add([minute])
    assert [row.tasks for row in (await two.store.read()).values()] == [{"completed": 1}]


async def test_minutes_wait_while_redis_is_away(
    record: Callable[[], Recording], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = record()
    add = one.store.add

    async def refuse(_minutes: object) -> int:
        raise QueueUnavailable

    monkeypatch.setattr(one.store, "add", refuse)
    for _ in range(2):
        one.meter.finished("completed", "", "m")
        await one.next_minute()
    monkeypatch.setattr(one.store, "add", add)
    await one.next_minute()
    assert [minute.tasks for minute in (await one.store.read()).values() if minute.tasks] == [{"completed": 1}] * 2


async def test_the_begun_minute_is_shown_here_and_written_at_the_end(record: Callable[[], Recording]) -> None:
    one, two = record(), record()
    one.meter.finished("completed", "", "m")
    shown = with_unwritten(await one.store.read(), one.recorder.unwritten)
    assert [minute.tasks for minute in shown] == [{"completed": 1}]
    await one.recorder.close()
    assert [minute.tasks for minute in (await two.store.read()).values()] == [{"completed": 1}]


async def test_the_history_continues_after_a_step_of_the_clock_back(
    record: Callable[[], Recording], clock: Clock
) -> None:
    one = record()
    for step_s in (0, 7_200, -7_200):
        clock.now += step_s
        one.meter.finished("completed", "", "m")
        await one.next_minute()
    await one.next_minute()
    assert sum(minute.tasks.get("completed", 0) for minute in (await one.store.read()).values()) == 3


async def test_minutes_older_than_a_day_are_forgotten(record: Callable[[], Recording], clock: Clock) -> None:
    one = record()
    old, new = int(clock.now) - 86_500, int(clock.now) - 60
    await one.store.add([Minute(old, depth=1), Minute(new, depth=2)])
    assert list(await one.store.read()) == [new]


async def test_a_foreign_entry_in_the_history_is_left_out(record: Callable[[], Recording], clock: Clock) -> None:
    one = record()
    await one.commands.xadd(one.key, {"writer": b"\xff", "minutes": b"["})
    await one.store.add([Minute(int(clock.now), depth=2)])
    assert [minute.depth for minute in (await one.store.read()).values()] == [2]


async def test_a_history_of_another_type_is_renamed_and_written_again(record: Callable[[], Recording]) -> None:
    one = record()
    await one.commands.rpush(one.key, "of another program")
    assert await one.store.read() == {}
    one.meter.finished("completed", "", "m")
    await one.next_minute()
    assert await one.commands.lrange(f"{one.key}:aside", 0, -1) == [b"of another program"]
    assert await one.commands.ttl(f"{one.key}:aside") > 0
    assert [minute.tasks for minute in (await one.store.read()).values()] == [{"completed": 1}]
    assert 0 < await one.commands.ttl(one.key) <= LIFE_S


async def test_foreign_entries_of_the_history_are_left_out(record: Callable[[], Recording]) -> None:
    one = record()
    one.meter.finished("completed", "", "m")
    await one.next_minute()
    for fields in ({"minutes": b"\xff", "writer": b"\xff"}, {"x": "y"}, {"writer": "w", "minutes": "[{}]"}):
        await one.commands.xadd(one.key, fields)
    assert [minute.tasks for minute in (await one.store.read()).values()] == [{"completed": 1}]
