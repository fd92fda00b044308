"""Requests that differ only in `n`: finished images are used again, and only missing ones are paid for."""

from __future__ import annotations

import itertools
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import redis

from tests.emulator_fixtures import EmulatorProcess
from tests.ports import free_port
from tests.s3_server import S3Server
from tests.service.conftest import StartService
from tests.service.running import Answer, Service, at_once, calls_about, eventually, in_flight, redis_server, release

_numbers = itertools.count()
HELD = "{{fault:ok held=1 times=2}}"


def paid(upstream: EmulatorProcess, text: str) -> list[int]:
    """Return for how many images each call about a text was."""
    return [call["n"] for call in calls_about(upstream, text)]


def shas(task: dict[str, Any]) -> list[str]:
    return [image["sha256"] for image in task["data"]]


def reused(task: dict[str, Any]) -> list[bool]:
    return [image.get("reused", False) for image in task["data"]]


def files_of(service: Service, task: dict[str, Any]) -> list[Path]:
    """Return the files of a task's images, in their order."""
    paths = (Path(service.settings["DATA_DIR"]) / "images").rglob("*-*")
    return sorted((path for path in paths if task["taskId"] in str(path)), key=lambda path: path.name.split("-")[-2])


def assert_readable(service: Service, task: dict[str, Any]) -> None:
    assert [service.get(image["url"]).status for image in task["data"]] == [200] * len(task["data"])


def assert_hit(answer: Answer) -> str:
    assert (answer.status, answer.json["cached"], answer.headers["X-Cache"]) == (200, True, "HIT")
    return str(answer.json["taskId"])


@pytest.fixture(scope="module")
def service(start_for_module: StartService, upstream: EmulatorProcess) -> Service:
    return start_for_module(upstream.url, WEBHOOK_ALLOW_PRIVATE="true")


@pytest.fixture
def store_settings(request: pytest.FixtureRequest, store: str) -> dict[str, str]:
    settings = {"IMAGE_STORE": store}
    if store == "s3":
        s3: S3Server = request.getfixturevalue("s3")
        bucket = f"topped{next(_numbers)}"
        s3.buckets[bucket] = {}
        settings |= {"S3_ACCESS_KEY_ID": "a-key", "S3_SECRET_ACCESS_KEY": "a-secret"}
        settings |= {"S3_ENDPOINT": s3.url, "S3_BUCKET": bucket}
    return settings


@pytest.mark.parametrize(("store", "instances"), [("disk", 1), ("disk", 2), ("redis", 2), ("s3", 2)])
def test_two_then_four_then_two_images_are_paid_as_two_two_and_none(
    start_service: StartService, upstream: EmulatorProcess, store_settings: dict[str, str], instances: int
) -> None:
    name = f"top up {store_settings['IMAGE_STORE']} {instances}"
    services: list[Service] = [start_service(upstream.url, **store_settings) for _ in range(instances)]
    first, last = services[0], services[-1]
    two = first.made(prompt=name, n=2)
    four = last.made(prompt=name, n=4)
    assert paid(upstream, name) == [2, 2]
    assert shas(four)[:2] == shas(two)
    assert len(set(shas(four))) == 4
    assert reused(four) == [True, True, False, False]
    assert_hit(last.submit(prompt=name, n=2))
    three_id = assert_hit(first.submit(prompt=name, n=3))
    for service in services:
        three = service.completed(three_id)
        assert shas(three) == shas(four)[:3]
        assert reused(three) == [True] * 3
        for task in (two, three, four):
            assert_readable(service, task | {"data": [{"url": _path(image["url"])} for image in task["data"]]})
    assert paid(upstream, name) == [2, 2]
    for service in services:
        service.end()
    restarted: Service = start_service(upstream.url, **store_settings)
    is_swept = 'imagegen_loops{loop="bucket-sweeper"} 1.0' in restarted.get_as_admin("/metrics").body.decode()
    assert is_swept == ("S3_BUCKET" in store_settings)
    assert_hit(restarted.submit(prompt=name, n=1))
    assert_hit(restarted.submit(prompt=name, n=3))
    five = restarted.made(prompt=name, n=5)
    assert_readable(restarted, five)
    assert (shas(five)[:4], reused(five)) == (shas(four), [True] * 4 + [False])
    assert paid(upstream, name) == [2, 2, 1]


def _path(url: str) -> str:
    return url[url.index("/api/") :]


def test_links_of_the_provider_are_used_again(start_service: StartService, upstream: EmulatorProcess) -> None:
    service: Service = start_service(upstream.url, IMAGE_STORE="upstream")
    two = service.made(prompt="linked", n=2)
    four = service.made(prompt="linked", n=4)
    assert [image["url"] for image in four["data"]][:2] == [image["url"] for image in two["data"]]
    assert_hit(service.submit(prompt="linked", n=3))
    assert paid(upstream, "linked") == [2, 2]


def test_a_reused_image_outlives_the_task_that_made_it(
    start_service: StartService, upstream: EmulatorProcess, tmp_path: Path
) -> None:
    """The hit comes more than 3 s before the first task expires, and is read more than 3 s before it does itself."""
    settings = {"RESULT_TTL": "9", "UPSTREAM_TIMEOUT": "1"}
    services: dict[str, Service] = {
        store: start_service(upstream.url, home=tmp_path / store, IMAGE_STORE=store, **settings)
        for store in ("disk", "redis")
    }
    fours = {store: service.made(prompt=f"outlives {store}", n=4) for store, service in services.items()}
    made_at = time.monotonic()
    eventually(lambda: time.monotonic() > made_at + 5.5)
    hit_ids = {
        store: assert_hit(service.submit(prompt=f"outlives {store}", n=2)) for store, service in services.items()
    }
    eventually(lambda: time.monotonic() > made_at + 9.0 + 2 * 1.0 + 0.2)
    for store, service in services.items():
        assert service.get(f"/api/images/{fours[store]['taskId']}").status == 404
        assert_readable(service, service.task(hit_ids[store]))
    for store, service in services.items():
        eventually(partial(is_not_found, service, hit_ids[store]))


def is_not_found(service: Service, task_id: str) -> bool:
    return service.get(f"/api/images/{task_id}").status == 404


def test_the_images_of_the_old_task_may_be_deleted(service: Service, upstream: EmulatorProcess) -> None:
    two = service.made(prompt="deleted", n=2)
    four = service.made(prompt="deleted", n=4)
    for path in files_of(service, two):
        path.unlink()
    assert_readable(service, four)
    again = service.task(assert_hit(service.submit(prompt="deleted", n=2)))
    assert (shas(again), reused(again)) == (shas(two), [True, True])
    assert_readable(service, again)
    assert paid(upstream, "deleted") == [2, 2]


def test_missing_images_of_the_larger_task_are_topped_up(service: Service, upstream: EmulatorProcess) -> None:
    four = service.made(prompt="missing", n=4)
    for index, path in enumerate(files_of(service, four)):
        if index != 2:
            path.unlink()
    answer = service.submit(prompt="missing", n=2)
    assert (answer.status, answer.json["cached"]) == (202, False)
    two = service.completed(answer.json["taskId"])
    assert (shas(two)[0], reused(two)) == (shas(four)[2], [True, False])
    assert_readable(service, two)
    assert paid(upstream, "missing") == [4, 1]


def test_no_cache_generates_all_images(service: Service, upstream: EmulatorProcess) -> None:
    service.made(prompt="anew", n=4)
    fields, no_cache = {"prompt": "anew", "n": 2}, {"Cache-Control": "no-cache"}
    answer = service.request("POST", "/api/images/generate", fields, headers=no_cache)
    assert (answer.status, answer.headers["X-Cache"]) == (202, "MISS")
    assert reused(service.completed(answer.json["taskId"])) == [False, False]
    assert paid(upstream, "anew") == [4, 2]


def test_with_a_seed_no_image_comes_twice(service: Service, upstream: EmulatorProcess) -> None:
    two = service.made(prompt="seeded", n=2, seed=7)
    four = service.made(prompt="seeded", n=4, seed=7)
    assert shas(four)[:2] == shas(two)
    assert [image["seed"] for image in four["data"]] == [7, 7, 9, 9]
    assert [(call["n"], call["body"]["seed"]) for call in calls_about(upstream, "seeded")] == [(2, 7), (2, 9)]
    assert_hit(service.submit(prompt="seeded", n=3, seed=7))
    service.made(prompt="seeded", n=2, seed=8)
    assert paid(upstream, "seeded") == [2, 2, 2]


def test_a_variant_has_the_same_images_for_every_n(service: Service, upstream: EmulatorProcess) -> None:
    two = service.made(prompt="varied", n=2, variant=1)
    four = service.made(prompt="varied", n=4, variant=1)
    assert shas(four)[:2] == shas(two)
    first = two["data"][0]["seed"]
    assert [image["seed"] for image in four["data"]] == [first, first, first + 2, first + 2]
    service.made(prompt="varied", n=2, variant=2)
    assert paid(upstream, "varied") == [2, 2, 2]


def test_unfinished_and_failed_siblings_do_not_count(service: Service, upstream: EmulatorProcess) -> None:
    running = [service.accepted(prompt=f"unfinished {HELD}", n=n) for n in (2, 3)]
    eventually(lambda: len(paid(upstream, "unfinished")) == 2)
    upstream.release()
    for task_id in running:
        service.completed(task_id)
    assert sorted(paid(upstream, "unfinished")) == [2, 3]


def test_a_failed_task_is_completed_at_its_retry_if_another_one_has_its_images(
    service: Service, upstream: EmulatorProcess
) -> None:
    prompt = "refused once {{fault:400 times=1}}"
    failed_id = service.accepted(prompt=prompt, n=2)
    assert service.finished(failed_id)["status"] == "failed"
    four = service.made(prompt=prompt, n=4)
    assert reused(four) == [False] * 4
    assert assert_hit(service.request("POST", f"/api/images/{failed_id}/retry")) == failed_id
    two = service.completed(failed_id)
    assert (shas(two), reused(two)) == (shas(four)[:2], [True, True])
    assert paid(upstream, "refused once") == [2, 4]


@pytest.mark.parametrize("store", ["disk", "redis", "s3"])
def test_a_failed_task_keeps_its_paid_images_for_the_next_submit_on_any_instance(
    start_service: StartService, upstream: EmulatorProcess, store: str, store_settings: dict[str, str], tmp_path: Path
) -> None:
    (folder := tmp_path / "redis").mkdir()
    with redis_server(folder, port := free_port()):
        settings = {"REDIS_URL": f"redis://127.0.0.1:{port}", "BUDGET_DAILY_USD": "10", **store_settings}
        first, second = (start_service(upstream.url, **settings) for _ in range(2))
        text = f"the fifth is refused, {store}"
        upstream.script({"fault": "ok", "match": text}, {"fault": "400", "match": text})
        failed = first.finished(first.accepted(prompt=text, n=5))
        assert (failed["status"], len(failed["data"])) == ("failed", 4)
        again = second.made(prompt=text, n=5)
        assert paid(upstream, text) == [4, 1, 1]
        assert (shas(again)[:4], reused(again)) == (shas(failed), [True] * 4 + [False])
        assert again["cost"]["saved"] == pytest.approx(4 * again["cost"]["charged"])
        assert_readable(second, again)
        first.end()
        second.end()


def test_a_cancelled_task_keeps_its_paid_images_for_the_next_submit(
    service: Service, upstream: EmulatorProcess
) -> None:
    prompt = "the fifth is cancelled"
    upstream.script({"fault": "ok", "match": prompt}, {"fault": "ok", "held": 1, "match": prompt})
    task_id = service.accepted(prompt=prompt, n=5)
    eventually(lambda: len(service.task(task_id).get("data", [])) == 4)
    eventually(lambda: in_flight(upstream, prompt))
    assert service.request("POST", f"/api/images/{task_id}/cancel").status == 200
    again = service.made(prompt=prompt, n=5)
    assert paid(upstream, prompt) == [4, 1, 1]
    assert reused(again) == [True] * 4 + [False]
    upstream.release()


def test_a_request_with_another_n_uses_the_images_of_a_failed_one(service: Service, upstream: EmulatorProcess) -> None:
    prompt = "the fifth of five is refused"
    upstream.script({"fault": "ok", "match": prompt}, {"fault": "400", "match": prompt})
    failed = service.finished(service.accepted(prompt=prompt, n=5))
    assert (failed["status"], len(failed["data"])) == ("failed", 4)
    three = service.request("POST", "/api/images/generate", {"prompt": prompt, "n": 3})
    assert three.json["cached"] is True
    assert shas(service.completed(three.json["taskId"])) == shas(failed)[:3]
    six = service.made(prompt=prompt, n=6)
    assert (shas(six)[:4], reused(six)) == (shas(failed), [True] * 4 + [False] * 2)
    assert paid(upstream, prompt) == [4, 1, 2]


def test_a_completed_task_that_lacks_an_image_keeps_the_others(service: Service, upstream: EmulatorProcess) -> None:
    task = service.made(prompt="one of three is removed", n=3, seed=7)
    files_of(service, task)[1].unlink()
    assert service.accepted(prompt="one of three is removed", n=3, seed=7) == task["taskId"]
    again = service.completed(task["taskId"])
    assert (reused(again), len(again["data"])) == ([True, False, True], 3)
    assert paid(upstream, "one of three is removed") == [3, 1]
    assert [image["seed"] for image in again["data"]] == [7, 8, 7]
    assert_readable(service, again)


def test_a_new_call_on_v1_after_a_failed_one_keeps_the_images_that_are_paid(
    service: Service, upstream: EmulatorProcess
) -> None:
    prompt = "refused on v1"
    upstream.script({"fault": "ok", "match": prompt}, {"fault": "400", "match": prompt})
    body = {"prompt": prompt, "n": 5}
    assert service.request("POST", "/v1/images/generations", body).status == 400
    made = service.request("POST", "/v1/images/generations", body)
    assert (made.status, len(made.json["data"])) == (200, 5)
    assert paid(upstream, prompt) == [4, 1, 1]


def test_a_limit_of_the_cost_counts_only_the_images_that_a_failed_task_lacks(
    service: Service, upstream: EmulatorProcess
) -> None:
    prompt = "refused within a limit"
    upstream.script({"fault": "ok", "match": prompt}, {"fault": "400", "match": prompt})
    failed = service.finished(service.accepted(prompt=prompt, n=5))
    price = failed["cost"]["estimated"] / 5
    assert service.submit(prompt=prompt, n=5, maxCostUsd=price / 2).error == (402, "max_cost_exceeded")
    again = service.made(prompt=prompt, n=5, maxCostUsd=round(price * 1.2, 6))
    assert (again["cost"]["charged"], paid(upstream, prompt)) == (pytest.approx(price, rel=1e-3), [4, 1, 1])


def test_no_cache_does_not_use_the_images_of_a_failed_task(service: Service, upstream: EmulatorProcess) -> None:
    prompt = "refused, then fresh"
    upstream.script({"fault": "ok", "match": prompt}, {"fault": "400", "match": prompt})
    failed = service.finished(service.accepted(prompt=prompt, n=5))
    assert len(failed["data"]) == 4
    fresh = {"Cache-Control": "no-cache"}
    service.request("POST", "/api/images/generate", {"prompt": prompt, "n": 5}, headers=fresh)
    service.completed(failed["taskId"])
    assert paid(upstream, prompt) == [4, 1, 4, 1]


def test_a_batch_and_v1_use_finished_images(service: Service, upstream: EmulatorProcess) -> None:
    service.made(prompt="both apis", n=2, width=1024, height=1024)
    fields = {"prompt": "both apis", "width": 1024, "height": 1024}
    batch = service.request("POST", "/api/images/batch", {"requests": [fields | {"n": n} for n in (1, 2, 3)]})
    assert [(entry["statusCode"], entry["cached"]) for entry in batch.json["results"]] == [
        (200, True),
        (200, True),
        (202, False),
    ]
    service.completed(batch.json["results"][2]["taskId"])
    assert paid(upstream, "both apis") == [2, 1]
    settings = {"prompt": "both apis", "n": 4, "seed": 3, "size": "1024x1024"}
    first = service.request("POST", "/v1/images/generations", settings)
    second = service.request("POST", "/v1/images/generations", settings | {"n": 2})
    assert [len(answer.json["data"]) for answer in (first, second)] == [4, 2]
    assert paid(upstream, "both apis") == [2, 1, 4]


@pytest.mark.parametrize(("reuse", "expected"), [("always", [2, 2]), ("retries", [2, 4])])
def test_v1_uses_finished_images_only_where_equal_calls_are_one_task(
    start_service: StartService, upstream: EmulatorProcess, reuse: str, expected: list[int]
) -> None:
    service: Service = start_service(upstream.url, V1_REUSE=reuse)
    for n in (2, 4):
        answer = service.request("POST", "/v1/images/generations", {"prompt": f"v1 {reuse}", "n": n})
        assert len(answer.json["data"]) == n
    assert paid(upstream, f"v1 {reuse}") == expected


def test_fifty_equal_submits_top_up_once(start_service: StartService, upstream: EmulatorProcess) -> None:
    services: list[Service] = [start_service(upstream.url) for _ in range(2)]
    services[0].made(prompt="fifty", n=4)
    hits = at_once([partial(service.submit, prompt="fifty", n=2) for service in services * 25])
    assert {assert_hit(answer) for answer in hits} == {hits[0].json["taskId"]}
    joined = at_once([partial(service.submit, prompt="fifty", n=6) for service in services * 25])
    services[0].completed(joined[0].json["taskId"])
    assert {answer.json["taskId"] for answer in joined} == {joined[0].json["taskId"]}
    assert paid(upstream, "fifty") == [4, 2]


def test_a_webhook_of_a_hit_from_a_larger_task_is_called(service: Service, upstream: EmulatorProcess) -> None:
    service.made(prompt="hooked", n=2)
    hook = {"url": f"{upstream.url}/nowhere"}
    task_id = assert_hit(service.submit(prompt="hooked", n=1, webhook=hook))
    eventually(lambda: service.task(task_id)["webhook"][0]["attempts"] == 1)
    assert len(service.task(task_id)["webhook"]) == 1


@pytest.mark.parametrize("wait_for", ["accepted", "called"])
def test_a_kill_during_a_top_up_pays_for_no_reused_image(
    start_service: StartService, upstream: EmulatorProcess, tmp_path: Path, wait_for: str
) -> None:
    port, name = free_port(), f"killed {wait_for}"
    with redis_server(tmp_path, port):
        settings = {"REDIS_URL": f"redis://127.0.0.1:{port}", "LEASE_SECONDS": "1", "WORKER_CONCURRENCY": "1"}
        service: Service = start_service(upstream.url, **settings)
        two = service.made(prompt=name, n=2)
        if wait_for == "accepted":
            service.accepted(prompt="in its way {{fault:ok held=1 times=1}}")
            eventually(lambda: in_flight(upstream, "in its way"))
        upstream.script({"fault": "ok", "held": 1, "match": name, "times": 1 if wait_for == "accepted" else 2})
        task_id = service.accepted(prompt=name, n=3)
        if wait_for == "called":
            eventually(lambda: len(paid(upstream, name)) == 2)
        service.kill()
        other: Service = start_service(upstream.url, **settings)
        shown = other.task(task_id)
        assert shas(shown) == shas(two)
        release(upstream, name)
        three = other.completed(task_id, within_s=30.0)
        assert reused(three) == [True, True, False]
        assert_readable(other, three)
        other.end()
        assert paid(upstream, name) == [2, 1] + [1] * three.get("possiblyBilledTwice", 0)


def test_a_stored_record_of_a_hit_expires_like_any_other(
    start_service: StartService, upstream: EmulatorProcess, tmp_path: Path
) -> None:
    port = free_port()
    with redis_server(tmp_path, port), redis.Redis(port=port) as client:
        service: Service = start_service(upstream.url, REDIS_URL=f"redis://127.0.0.1:{port}", RESULT_TTL="500")
        service.made(prompt="record", n=2)
        task_id = assert_hit(service.submit(prompt="record", n=1))
        assert 490 < client.ttl(f"{{imagegen}}:task:{task_id}") <= 500
        lasting = (b":tasks", b":link-key", b":server")
        assert all(client.ttl(key) > 0 for key in client.keys("*") if not key.endswith(lasting))
        assert client.xlen("{imagegen}:tasks") == 0
        service.end()
