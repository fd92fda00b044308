"""Responses of POST /api/images/generate and GET /api/images/{taskId}."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from tests.emulator_fixtures import EmulatorProcess
from tests.service.conftest import StartService
from tests.service.running import Answer, Service, at_once, calls_about, eventually, release

CREATED = "图像生成任务已创建，请使用任务ID查询结果"
FOUND = "发现相同参数的图像已生成，可直接查询结果"
GONE = {"success": False, "status": "not_found", "message": "任务不存在或已过期"}
SCHNELL = "black-forest-labs/FLUX.1-schnell"

SUBMITTED = {
    *("success", "taskId", "cached", "message", "status", "sequence", "statusUrl", "eventsUrl", "cancelUrl"),
    *("queuePosition", "etaSeconds", "cost"),
}
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z")


@pytest.fixture(scope="module")
def service(start_for_module: StartService, upstream: EmulatorProcess) -> Service:
    return start_for_module(upstream.url, MODEL_ALIASES="an/old-name=a/new-name", WORKER_CONCURRENCY="20")


def check_submit(service: Service, answer: Answer, status: int, cache: str, message: str) -> None:
    seen = answer.json
    here = f"/api/images/{seen['taskId']}"
    assert (answer.status, answer.headers["X-Cache"], answer.headers["Location"]) == (status, cache, here)
    assert set(seen) - {"coalesced"} == SUBMITTED
    assert re.fullmatch("[0-9a-f]{32}", seen["taskId"])
    assert (seen["success"], seen["message"], seen["cached"]) == (True, message, cache == "HIT")
    assert seen.get("coalesced", False) is (cache == "COALESCED")
    assert isinstance(seen["sequence"], int)
    urls = [seen[name] for name in ("statusUrl", "eventsUrl", "cancelUrl")]
    assert urls == [f"{service.url}{here}", f"{service.url}{here}/events", f"{service.url}{here}/cancel"]


def test_a_repeated_request_joins_and_then_hits(service: Service, upstream: EmulatorProcess) -> None:
    order = {"prompt": "three submits {{fault:ok held=1}}"}
    first, second = service.submit(**order), service.submit(**order)
    check_submit(service, first, 202, "MISS", CREATED)
    check_submit(service, second, 202, "COALESCED", CREATED)
    release(upstream, "three submits")
    service.completed(first.json["taskId"])
    third = service.submit(**order)
    check_submit(service, third, 200, "HIT", FOUND)
    assert third.json["status"] == "completed"
    assert len({answer.json["taskId"] for answer in (first, second, third)}) == 1
    assert len(calls_about(upstream, "three submits")) == 1


def test_fifty_concurrent_identical_submits_are_one_paid_call(service: Service, upstream: EmulatorProcess) -> None:
    order = {"prompt": "fifty at once {{fault:ok delay_s=0.3}}"}
    answers = at_once([lambda: service.submit(**order)] * 50)
    (task_id,) = {answer.json["taskId"] for answer in answers}
    assert [answer.headers["X-Cache"] for answer in answers].count("MISS") == 1
    assert {answer.status for answer in answers} <= {200, 202}
    service.completed(task_id)
    assert [call["paid"] for call in calls_about(upstream, "fifty at once")] == [True]


PLAIN = {"prompt": "one and the same"}
FULL: dict[str, Any] = {
    "prompt": "all of the fields",
    "model": "a/model",
    "negativePrompt": "a dog",
    "guidanceScale": 3,
    "outputFormat": "png",
    "imageUrl": "https://images.example/a.png",
    "referenceImages": ["https://images.example/b.png"],
    "steps": 4,
    "seed": 7,
}
SAME: dict[str, list[dict[str, Any]]] = {
    "defaults": [PLAIN, PLAIN | {"model": SCHNELL, "width": 512, "height": 512, "n": 1}],
    "fractions": [PLAIN, PLAIN | {"width": 512.0, "height": 512.0, "n": 1.0}],
    "texts": [PLAIN, PLAIN | {"width": "512", "height": "512", "n": "1"}],
    "order of keys": [PLAIN | {"width": 256, "height": 128}, {"height": 128, "width": 256} | PLAIN],
    "nulls": [PLAIN, dict.fromkeys([*FULL, "model", "width", "height", "n"]) | PLAIN],
    "snake_case": [FULL, {re.sub("([A-Z])", r"_\1", name).lower(): value for name, value in FULL.items()}],
    "numbers as fractions": [FULL, FULL | {"guidanceScale": 3.0, "steps": 4.0, "seed": 7.0}],
    "numbers as texts": [FULL, FULL | {"guidanceScale": "3", "steps": "4", "seed": "7"}],
    "spaces around": [PLAIN, {"prompt": "\n one and the same\t "}],
    "an alias": [PLAIN | {"model": "an/old-name"}, PLAIN | {"model": "a/new-name"}],
}


@pytest.mark.parametrize("bodies", SAME.values(), ids=SAME.keys())
def test_equivalent_requests_are_one_task(service: Service, bodies: list[dict[str, Any]]) -> None:
    assert len({service.accepted(**body) for body in bodies}) == 1


def test_every_field_that_changes_the_image_makes_another_task(service: Service) -> None:
    base = FULL | {"model": "a/model", "width": 512, "height": 512, "n": 1}
    changes: list[dict[str, Any]] = [
        {},
        {"prompt": "all of the  fields"},
        {"model": "another/model"},
        {"width": 520},
        {"height": 520},
        {"steps": 5},
        {"steps": None},
        {"n": 2},
        {"seed": 8},
        {"seed": None},
        {"negativePrompt": "a cat"},
        {"guidanceScale": 3.5},
        {"outputFormat": "webp"},
        {"imageUrl": "https://images.example/c.png"},
        {"referenceImages": ["https://images.example/b.png", "https://images.example/d.png"]},
    ]
    assert len({service.accepted(**base | change) for change in changes}) == len(changes)


def test_only_given_fields_are_sent_upstream(service: Service, upstream: EmulatorProcess) -> None:
    service.made(prompt="no steps")
    service.made(prompt="with steps", steps=4, seed=7, negativePrompt="dog", model="m/any")
    (without,), (with_them,) = calls_about(upstream, "no steps"), calls_about(upstream, "with steps")
    known = {"model", "prompt", "width", "height", "n", "response_format"}
    assert set(without["body"]) <= known
    given = {name: value for name, value in with_them["body"].items() if name not in known}
    assert given == {"steps": 4, "seed": 7, "negative_prompt": "dog"}


def test_many_images_are_split_over_calls_with_distinct_seeds(service: Service, upstream: EmulatorProcess) -> None:
    task = service.made(prompt="eight of them", n=8, seed=40)
    calls = calls_about(upstream, "eight of them")
    assert sum(call["n"] for call in calls) == 8
    asked, seeds = 0, list[int]()
    for call in calls:
        assert call["seed"] == 40 + asked
        asked += call["n"]
        seeds += [call["seed"]] * call["n"]
    assert [(entry["index"], entry["seed"]) for entry in task["data"]] == list(enumerate(seeds))
    assert len({entry["sha256"] for entry in task["data"]}) == 8


def test_a_completed_task(service: Service) -> None:
    made = service.made(prompt="looked at", width=256, height=128)
    answer = service.get(f"/api/images/{made['taskId']}")
    seen = answer.json
    assert (seen["success"], seen["status"], seen["progress"]) == (True, "completed", 100)
    assert (seen["attempts"], seen["maxAttempts"], seen["model"]) == (1, 3, SCHNELL)
    times = [seen[name] for name in ("createdAt", "startedAt", "finishedAt")]
    assert times == sorted(times)
    assert all(TIME.fullmatch(time) for time in times)
    assert not {"message", "reason", "retryAt", "error", "warnings", "possiblyBilledTwice"} & set(seen)
    (entry,) = seen["data"]
    expected = {"url", "index", "contentType", "bytes", "width", "height", "sha256", "seed", "expiresAt"}
    assert set(entry) == expected
    here = re.escape(f"{service.url}/api/images/{seen['taskId']}/0")
    assert re.fullmatch(rf"{here}\?v={entry['sha256'][:12]}", entry["url"])
    assert (entry["index"], entry["width"], entry["height"], entry["contentType"]) == (0, 256, 128, "image/png")
    assert TIME.fullmatch(entry["expiresAt"])
    assert answer.headers["ETag"] == f'"{seen["sequence"]}"'
    assert answer.headers["Retry-After"] is None


def test_an_unchanged_task_is_304(service: Service) -> None:
    task_id = service.made(prompt="unchanged")["taskId"]
    etag = service.get(f"/api/images/{task_id}").headers["ETag"]
    again = service.get(f"/api/images/{task_id}", If_None_Match=etag)
    assert (again.status, again.body, again.headers["ETag"]) == (304, b"", etag)
    assert service.get(f"/api/images/{task_id}", If_None_Match='"1"').status == 200


def test_a_processing_task(service: Service, upstream: EmulatorProcess) -> None:
    task_id = service.accepted(prompt="in work {{fault:ok held=1}}")
    service.until(task_id, "processing")
    answer = service.get(f"/api/images/{task_id}")
    seen = answer.json
    assert (seen["success"], seen["status"]) == (True, "processing")
    assert seen["message"] == f"任务processing中 ({seen['progress']}%)"
    assert 0 < seen["progress"] < 100
    assert int(answer.headers["Retry-After"]) >= 1
    assert (seen["attempts"], seen["finishedAt"]) == (1, None)
    assert TIME.fullmatch(seen["startedAt"])
    release(upstream, "in work")
    service.completed(task_id)


def test_a_failed_task(service: Service) -> None:
    task_id = service.accepted(prompt="a failure {{fault:400_multiple}}")
    seen = service.finished(task_id)
    assert (seen["success"], seen["status"]) == (True, "failed")
    assert seen["message"] == "图像生成失败：height must be a multiple of 16"
    assert seen["error"] == {"code": "upstream_invalid_request", "retryable": False}
    assert "data" not in seen
    assert TIME.fullmatch(seen["finishedAt"])
    assert service.get(f"/api/images/{task_id}").headers["Retry-After"] is None


def test_a_failed_task_is_queued_again_under_its_id(service: Service, upstream: EmulatorProcess) -> None:
    order = {"prompt": "second chance {{fault:422_nsfw times=1}}"}
    task_id = service.accepted(**order)
    failed = service.finished(task_id)
    assert failed["error"]["code"] == "content_policy"
    again = service.submit(**order)
    assert (again.status, again.json["taskId"], again.json["cached"]) == (202, task_id, False)
    assert again.json["message"] == CREATED
    assert "coalesced" not in again.json
    completed = service.completed(task_id)
    assert completed["attempts"] == 1
    assert failed["sequence"] < again.json["sequence"] < completed["sequence"]
    assert len(calls_about(upstream, "second chance")) == 2


@pytest.mark.parametrize("task_id", ["0" * 32, "f" * 31, "no-such-task", "%00", "..%2F..", "a" * 500])
def test_an_unknown_task(service: Service, task_id: str) -> None:
    answer = service.get(f"/api/images/{task_id}")
    assert (answer.status, answer.json) == (404, GONE)


def test_english_texts_change_nothing_else(service: Service) -> None:
    task_id = service.made(prompt="two languages")["taskId"]

    def submitted(language: str) -> dict[str, Any]:
        headers = {"Accept-Language": language}
        return service.request("POST", "/api/images/generate", {"prompt": "two languages"}, headers=headers).json

    chinese, english = submitted("zh-CN,zh;q=0.9,en;q=0.8"), submitted("en-GB,en;q=0.9,zh;q=0.1")
    assert chinese["message"] == FOUND
    assert english["message"].isascii()
    assert chinese | {"message": ""} == english | {"message": ""}
    assert service.get(f"/api/images/{'0' * 32}", Accept_Language="en").json["message"].isascii()
    assert service.task(task_id)["status"] == "completed"


def test_links_have_the_host_of_the_request(service: Service) -> None:
    task_id = service.made(prompt="by another name")["taskId"]
    (entry,) = service.get(f"/api/images/{task_id}", Host="images.localhost:8080").json["data"]
    assert entry["url"].startswith(f"http://images.localhost:8080/api/images/{task_id}/0?v=")


def test_the_sequence_rises_with_each_change_and_never_falls(service: Service) -> None:
    task_id = service.accepted(prompt="changes {{fault:500 times=2}}", n=4, model="m/changes")
    seen = list[tuple[int, str, int]]()

    def look() -> bool:
        task = service.task(task_id)
        seen.append((task["sequence"], task["status"], task["progress"]))
        return bool(task["status"] == "completed")

    eventually(look)
    assert seen == sorted(seen, key=lambda state: state[0])
    assert len({sequence for sequence, *_ in seen}) == len(set(seen))


def test_the_largest_valid_request_is_accepted(service: Service, upstream: EmulatorProcess) -> None:
    largest = {"width": 2048, "height": 64, "n": 8, "seed": 2**63 - 1, "steps": 100, "model": "m/large"}
    task = service.made(prompt="ü" * 4000, **largest)
    assert len(task["data"]) == 8
    calls = calls_about(upstream, "ü" * 4000)
    assert calls[0]["seed"] == 2**63 - 1
    assert len({call["seed"] for call in calls}) == len(calls)


def test_the_answer_is_json_in_utf8(service: Service) -> None:
    answer = service.submit(prompt="utf-8")
    assert answer.headers["Content-Type"] == "application/json; charset=utf-8"
    assert json.loads(answer.body.decode())["message"] in (CREATED, FOUND)
    assert answer.headers["X-Request-Id"]
