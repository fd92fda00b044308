"""Cache of finished tasks in a process, bounded by bytes and time."""

from __future__ import annotations

import tracemalloc

import pytest
from msgspec.structs import replace

from imagegen.queue import task_cache as module
from imagegen.queue.task_cache import TaskCache
from imagegen.tasks import transitions
from imagegen.tasks.image import StoredImage
from imagegen.tasks.task import Task
from tests.support import Clock


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def task_cache(clock: Clock) -> TaskCache:
    return TaskCache(clock=clock, monotonic=clock)


def finished(number: int, clock: Clock, ttl_s: float = 10.0) -> Task:
    task = Task(f"{number:032x}", 1, 1, "d" * 32, "m", b'{"prompt":"p"}', clock.now)
    return transitions.completed(task, (), (), now=clock.now, ttl_s=ttl_s)


def remembered(task_cache: TaskCache, count: int) -> list[int]:
    return [number for number in range(count) if task_cache.finished(f"{number:032x}")]


def test_the_oldest_entries_are_evicted(task_cache: TaskCache, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FINISHED_BYTES", 3_500)
    for number in range(9):
        task_cache.put(finished(number, clock))
    assert remembered(task_cache, 9) == [6, 7, 8]


def test_a_task_larger_than_the_cache_is_not_cached(
    task_cache: TaskCache, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FINISHED_BYTES", 100)
    task_cache.put(finished(0, clock))
    assert remembered(task_cache, 1) == []


def test_the_counted_size_of_a_task_matches_its_memory(task_cache: TaskCache, clock: Clock) -> None:
    tracemalloc.start()
    empty, _ = tracemalloc.get_traced_memory()
    for number in range(500):
        task = finished(number, clock)
        picture = StoredImage(0, "image/png", 10**6 + number, 512, 512, f"{number:064x}", 10**9 + number)
        task_cache.put(replace(task, digest=f"{number:032x}", model=f"black-forest-labs/{number}", images=(picture,)))
    full, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 0.5 < (full - empty) / task_cache._finished_bytes <= 1.0


def test_expired_tasks_are_evicted_by_new_ones(task_cache: TaskCache, clock: Clock) -> None:
    tracemalloc.start()
    for number in range(500):
        task_cache.put(finished(number, clock))
    full, _ = tracemalloc.get_traced_memory()
    clock.now += 11
    task_cache.put(finished(500, clock))
    left, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert left < full / 5
    assert remembered(task_cache, 501) == [500]


def test_an_expired_task_is_dropped_at_once(task_cache: TaskCache, clock: Clock) -> None:
    task_cache.put(finished(0, clock, ttl_s=-1.0))
    assert remembered(task_cache, 1) == []


def test_a_miss_is_cached_for_ten_seconds_on_a_single_instance(task_cache: TaskCache, clock: Clock) -> None:
    task_cache.store_from_redis("a" * 32, None)
    read_at = clock.now
    for age_s, counts in ((0.0, True), (9.0, True), (11.0, False)):
        clock.now = read_at + age_s
        assert task_cache.recent_remote("a" * 32) == (counts, None)
        assert task_cache.recent_remote("a" * 32, lambda _unix_s: False) == (False, None)


def test_a_miss_is_not_cached_if_a_submit_came_meanwhile(task_cache: TaskCache, clock: Clock) -> None:
    task = Task("a" * 32, 1, 1, "d" * 32, "m", b'{"prompt":"p"}', clock.now)
    task_cache.put(task)
    task_cache.store_from_redis(task.id, None)
    assert task_cache.recent_remote(task.id) == (False, None)
    assert task_cache.live[task.id] is task
