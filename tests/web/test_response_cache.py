"""What was told of a finished task is told again from bytes, and never of another task or to another client."""

from __future__ import annotations

import pytest

from imagegen.tasks.task import State, Task
from imagegen.web.api import response_cache as told
from imagegen.web.api.response_cache import ResponseCache, ResponseKey
from imagegen.web.context import SERVICES

JSON = {"prompt": "told"}


def task(name: str) -> Task:
    return Task(name, 1, 1, "d", "m", b"{}", 1.0, state=State.COMPLETED)


def asked(name: str) -> ResponseKey:
    return ResponseKey("task", name, "http://x", "zh")


def test_a_body_holds_only_for_the_very_task_it_was_made_of() -> None:
    kept, one, same = ResponseCache(), task("a"), task("a")
    kept.put(asked("a"), one, b"1")
    assert kept.get(asked("a"), one) == b"1"
    assert kept.get(asked("a"), same) is None
    kept.put(asked("a"), same, b"2")
    assert (kept.get(asked("a"), one), kept.get(asked("a"), same)) == (None, b"2")


def test_the_one_that_was_not_asked_for_longest_goes_when_there_are_too_many_bytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(told, "MAX_BYTES", 1_500)
    kept, tasks = ResponseCache(), [task(name) for name in "abc"]
    for one in tasks[:2]:
        kept.put(asked(one.id), one, b"x" * 100)
    kept.get(asked("a"), tasks[0])
    kept.put(asked("c"), tasks[2], b"x" * 100)
    assert [kept.get(asked(one.id), one) is not None for one in tasks] == [True, False, True]
    kept.put(asked("c"), tasks[2], b"x" * 5_000)
    assert [kept.get(asked(one.id), one) for one in tasks] == [None, None, None]


def test_a_body_that_takes_the_place_of_another_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(told, "MAX_BYTES", 1_500)
    kept, one = ResponseCache(), task("a")
    for _ in range(10):
        kept.put(asked("a"), one, b"x" * 400)
    assert kept.get(asked("a"), one) == b"x" * 400


async def test_each_reader_is_told_in_its_language_and_with_links_of_its_host(service) -> None:
    answer = await (await service.post("/api/images/generate?wait=10", json=JSON)).json()
    path = f"/api/images/{answer['taskId']}"
    for _ in range(2):
        one = await (await service.get(path, headers={"Host": "one.example"})).json()
        two = await (await service.get(path, headers={"Host": "two.example"})).json()
        assert one["data"][0]["url"].startswith("http://one.example/api/images/")
        assert two["data"][0]["url"].startswith("http://two.example/api/images/")
        hit = await (await service.post("/api/images/generate", json=JSON, headers={"Accept-Language": "en"})).json()
        assert hit["message"].startswith("The same image")
        assert (await (await service.post("/api/images/generate", json=JSON)).json())["message"].startswith("发现")


async def test_a_task_that_is_drawn_afresh_is_told_anew(service) -> None:
    first = await (await service.post("/api/images/generate?wait=10", json=JSON)).json()
    path = f"/api/images/{first['taskId']}"
    before = await (await service.get(path)).json()
    await service.post("/api/images/generate?wait=10", json=JSON, headers={"Cache-Control": "no-cache"})
    after = await (await service.get(path)).json()
    assert after["sequence"] > before["sequence"]
    hit = await (await service.post("/api/images/generate", json=JSON)).json()
    assert (hit["cached"], hit["sequence"]) == (True, after["sequence"])


async def test_a_reader_that_has_the_version_is_told_so_also_when_the_bytes_are_kept(service) -> None:
    first = await (await service.post("/api/images/generate?wait=10", json=JSON)).json()
    path = f"/api/images/{first['taskId']}"
    for _ in range(2):
        answer = await service.get(path)
        same = await service.get(path, headers={"If-None-Match": answer.headers["ETag"]})
        assert (answer.status, same.status, await same.read()) == (200, 304, b"")
    assert (
        service.app[SERVICES].response_cache.get(ResponseKey("task", first["taskId"], "http://x", "zh"), task("a"))
        is None
    )


def test_a_task_with_a_large_request_counts_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(told, "MAX_BYTES", 10_000)
    kept, large = ResponseCache(), Task("a", 1, 1, "d", "m", b"x" * 20_000, 1.0, state=State.COMPLETED)
    kept.put(asked("a"), large, b"small")
    assert kept.get(asked("a"), large) is None
