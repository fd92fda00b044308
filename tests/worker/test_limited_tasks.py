"""Tests of which rate limits are a task's own."""

from __future__ import annotations

import pytest

from imagegen.worker import limited_tasks
from imagegen.worker.limited_tasks import MAX_OWN_IN_A_ROW, LimitedTasks

HERE = ("key", "m")


def known(*task_ids: str) -> LimitedTasks:
    """Return a record of tasks that were limited before others of their model were answered."""
    tasks = LimitedTasks()
    for task_id in task_ids:
        assert not tasks.limited(task_id, HERE, 1.0)
    tasks.answered(HERE, 2.0)
    return tasks


def test_a_limit_before_others_are_answered_is_no_task_s_own() -> None:
    tasks = LimitedTasks()
    assert [tasks.limited("a", HERE, now) for now in (1.0, 2.0, 3.0)] == [False] * 3
    assert tasks.was_limited("a")
    assert tasks.own_limits("a") == 0


def test_a_limit_after_others_were_answered_is_its_own() -> None:
    tasks = known("a")
    assert tasks.was_limited("a")
    assert tasks.limited("a", HERE, 3.0)
    assert tasks.own_limits("a") == 1
    assert not tasks.limited("b", HERE, 4.0)


def test_an_answer_of_a_call_from_before_the_limit_proves_nothing() -> None:
    tasks = LimitedTasks()
    tasks.limited("a", HERE, 5.0)
    tasks.answered(HERE, 4.9)
    assert not tasks.limited("a", HERE, 6.0)


@pytest.mark.parametrize("elsewhere", [("other key", "m"), ("key", "other")])
def test_an_answer_of_another_key_or_model_proves_nothing(elsewhere: tuple[str, str]) -> None:
    tasks = LimitedTasks()
    tasks.limited("a", HERE, 1.0)
    tasks.answered(elsewhere, 2.0)
    assert not tasks.limited("a", HERE, 3.0)


def test_many_tasks_in_a_row_show_a_limit_of_the_key() -> None:
    tasks = known(*"abcd")
    seen = [tasks.limited(task_id, HERE, 3.0) for task_id in "abcd"]
    assert seen == [True] * (MAX_OWN_IN_A_ROW - 1) + [False] * (4 - MAX_OWN_IN_A_ROW + 1)
    tasks.answered(HERE, 4.0)
    assert tasks.limited("a", HERE, 5.0)


def test_a_task_that_ended_is_forgotten() -> None:
    tasks = known("a")
    tasks.finished("a")
    assert not tasks.was_limited("a")
    assert not tasks.limited("a", HERE, 3.0)


def test_tasks_that_never_end_here_are_forgotten_once_there_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limited_tasks, "MAX_TASKS", 2)
    tasks = known("a", "b", "c")
    assert [tasks.was_limited(task_id) for task_id in "abc"] == [False, True, True]
    tasks.limited("d", HERE, 3.0)
    tasks.answered(HERE, 4.0)
    assert [tasks.was_limited(task_id) for task_id in "abcd"] == [False, False, True, True]


def test_places_whose_limit_never_ends_are_forgotten_once_there_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limited_tasks, "MAX_PLACES", 2)
    tasks = LimitedTasks()
    for number in range(3):
        tasks.limited(f"task {number}", ("key", f"model {number}"), 1.0)
    for number in range(3):
        tasks.answered(("key", f"model {number}"), 2.0)
    own = [tasks.limited(f"task {number}", ("key", f"model {number}"), 3.0) for number in range(3)]
    assert own == [False, True, True]
