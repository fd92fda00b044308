"""Tests of the response cache: bytes are reused only for the same state of a task and the same kind of client."""

from __future__ import annotations

import pytest

from imagegen.queue.eta import QueuePosition
from imagegen.tasks.task import State, Task
from imagegen.web import response_cache
from imagegen.web.handler_services import SERVICES
from imagegen.web.response_cache import ResponseCache, ResponseKey
from tests.web.conftest import Client, StartService

JSON = {"prompt": "told"}


def task(name: str) -> Task:
    return Task(name, 1, 1, "d", "m", b"{}", 1.0, state=State.COMPLETED)


def key_of(name: str) -> ResponseKey:
    return ResponseKey("task", name, "http://x", "zh")


def test_a_body_is_valid_only_for_its_exact_task() -> None:
    cache, record, same = ResponseCache(), task("a"), task("a")
    cache.put(key_of("a"), record, b"1")
    assert cache.get(key_of("a"), record) == b"1"
    assert cache.get(key_of("a"), same) is None
    cache.put(key_of("a"), same, b"2")
    assert (cache.get(key_of("a"), record), cache.get(key_of("a"), same)) == (None, b"2")


def test_a_body_with_a_place_in_the_queue_is_valid_for_that_place() -> None:
    cache, record = ResponseCache(), task("a")
    cache.put(key_of("a"), record, b"1", QueuePosition(2, 1.5))
    assert cache.get(key_of("a"), record, QueuePosition(2, 1.5)) == b"1"
    assert cache.get(key_of("a"), record, QueuePosition(1, 1.5)) is None
    assert cache.get(key_of("a"), record) is None


def test_the_least_recent_body_is_evicted_over_the_byte_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(response_cache, "MAX_BYTES", 1_500)
    cache, tasks = ResponseCache(), [task(name) for name in "abc"]
    for record in tasks[:2]:
        cache.put(key_of(record.id), record, b"x" * 100)
    cache.get(key_of("a"), tasks[0])
    cache.put(key_of("c"), tasks[2], b"x" * 100)
    assert [cache.get(key_of(record.id), record) is not None for record in tasks] == [True, False, True]
    cache.put(key_of("c"), tasks[2], b"x" * 5_000)
    assert [cache.get(key_of(record.id), record) for record in tasks] == [None, None, None]


def test_a_body_that_takes_the_place_of_another_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(response_cache, "MAX_BYTES", 1_500)
    cache, record = ResponseCache(), task("a")
    for _ in range(10):
        cache.put(key_of("a"), record, b"x" * 400)
    assert cache.get(key_of("a"), record) == b"x" * 400


async def test_each_reader_gets_its_language_and_links_of_its_host(start_service: StartService) -> None:
    service = await start_service(hosts=("0.0.0.0",))
    answer = await (await service.post("/api/images/generate?wait=10", json=JSON)).json()
    path = f"/api/images/{answer['taskId']}"
    for _ in range(2):
        record = await (await service.get(path, headers={"Host": "one.example"})).json()
        two = await (await service.get(path, headers={"Host": "two.example"})).json()
        assert record["data"][0]["url"].startswith("http://one.example/api/images/")
        assert two["data"][0]["url"].startswith("http://two.example/api/images/")
        hit = await (await service.post("/api/images/generate", json=JSON, headers={"Accept-Language": "en"})).json()
        assert hit["message"].startswith("The same image")
        assert (await (await service.post("/api/images/generate", json=JSON)).json())["message"].startswith("发现")


async def test_a_task_generated_again_is_rendered_again(service: Client) -> None:
    first = await (await service.post("/api/images/generate?wait=10", json=JSON)).json()
    path = f"/api/images/{first['taskId']}"
    before = await (await service.get(path)).json()
    await service.post("/api/images/generate?wait=10", json=JSON, headers={"Cache-Control": "no-cache"})
    after = await (await service.get(path)).json()
    assert after["sequence"] > before["sequence"]
    hit = await (await service.post("/api/images/generate", json=JSON)).json()
    assert (hit["cached"], hit["sequence"]) == (True, after["sequence"])


async def test_a_matching_etag_is_304_even_if_the_bytes_are_cached(service: Client) -> None:
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


def test_a_large_request_counts_in_the_size_of_its_task(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(response_cache, "MAX_BYTES", 10_000)
    cache, large = ResponseCache(), Task("a", 1, 1, "d", "m", b"x" * 20_000, 1.0, state=State.COMPLETED)
    cache.put(key_of("a"), large, b"small")
    assert cache.get(key_of("a"), large) is None
