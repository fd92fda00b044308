"""Responses of GET /api/images/{taskId}/{index}."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
from functools import partial
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import quote

import pytest
from PIL import Image

from tests.emulator_fixtures import EmulatorProcess
from tests.ports import free_port
from tests.service.conftest import StartService
from tests.service.running import Answer, Service, at_once, calls_about, eventually, release


@pytest.fixture(scope="module")
def service(start_for_module: StartService, upstream: EmulatorProcess) -> Service:
    return start_for_module(upstream.url, WORKER_CONCURRENCY="30", UPSTREAM_TIMEOUT="6")


def picture(service: Service, task_id: str, index: int = 0, query: str = "", **headers: str) -> Answer:
    return service.get(f"/api/images/{task_id}/{index}{query}", **headers)


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_an_image_is_served_as_its_entry_describes(service: Service, kind: str) -> None:
    task = service.made(prompt=f"as {kind}", outputFormat=kind, width=128, height=64, model="m/any")
    (entry,) = task["data"]
    answer = service.get(entry["url"])
    assert (answer.status, answer.headers["Content-Type"]) == (200, f"image/{kind}")
    assert answer.headers["Content-Type"] == entry["contentType"]
    assert (len(answer.body), hashlib.sha256(answer.body).hexdigest()) == (entry["bytes"], entry["sha256"])
    with Image.open(io.BytesIO(answer.body)) as image:
        image.load()
        assert (image.size, image.format) == ((128, 64), kind.upper())
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["ETag"]


def test_a_versioned_link_is_cacheable_until_the_image_expires(service: Service) -> None:
    (entry,) = service.made(prompt="cached by browsers")["data"]
    cached = re.fullmatch(r"public, max-age=(\d+), immutable", service.get(entry["url"]).headers["Cache-Control"])
    assert cached
    assert 86_000 < int(cached[1]) <= 86_400


def test_an_unversioned_link_is_not_cacheable_and_a_wrong_one_is_410(service: Service) -> None:
    task_id = service.made(prompt="versions")["taskId"]
    plain = picture(service, task_id)
    assert plain.status == 200
    assert "immutable" not in plain.headers["Cache-Control"]
    assert picture(service, task_id, query="?v=000000000000").error == (410, "image_expired")


def test_an_unchanged_image_is_304(service: Service) -> None:
    (entry,) = service.made(prompt="a picture unchanged")["data"]
    etag = service.get(entry["url"]).headers["ETag"]
    again = service.get(entry["url"], If_None_Match=etag)
    assert (again.status, again.body) == (304, b"")


def test_a_range_of_an_image_is_served(service: Service) -> None:
    (entry,) = service.made(prompt="a part")["data"]
    whole = service.get(entry["url"]).body
    size = len(whole)
    for span, part in [
        ("0-9", whole[:10]),
        ("10-", whole[10:]),
        ("-5", whole[-5:]),
        (f"5-{size * 2}", whole[5:]),
    ]:
        answer = service.get(entry["url"], Range=f"bytes={span}")
        assert (answer.status, answer.body) == (206, part)
        assert re.fullmatch(rf"bytes \d+-\d+/{size}", answer.headers["Content-Range"])
    beyond = service.get(entry["url"], Range=f"bytes={size}-")
    assert (beyond.status, beyond.headers["Content-Range"]) == (416, f"bytes */{size}")


def test_an_image_outside_the_task_is_not_found(service: Service) -> None:
    task_id = service.made(prompt="only one")["taskId"]
    assert picture(service, task_id, 1).status == 404
    assert picture(service, "0" * 32).error == (404, "not_found")


def test_no_image_is_served_before_it_exists(service: Service, upstream: EmulatorProcess) -> None:
    task_id = service.accepted(prompt="not yet {{fault:ok held=1}}")
    service.until(task_id, "processing")
    assert picture(service, task_id).status == 404
    release(upstream, "not yet")
    service.completed(task_id)
    assert picture(service, task_id).status == 200


def test_an_image_outlives_the_link_of_the_provider(service: Service, upstream: EmulatorProcess) -> None:
    task = service.made(prompt="the link dies", n=4)
    upstream.expire_links()
    assert [service.get(entry["url"]).status for entry in task["data"]] == [200] * 4
    assert service.submit(prompt="the link dies", n=4).json["cached"] is True


LASTING = [
    "image_html",
    "image_svg",
    "image_html_as_png",
    "image_403",
    "image_expired",
    "image_redirect_loop",
    "image_redirect_private",
    "url",
    "javascript_url",
    "file_url",
    "private_url",
]
"""Faults that another call would repeat."""

DAMAGED = ["image_truncated_png", "image_truncated_jpeg", "image_empty", "image_huge", "null_url", "garbage_base64"]
"""Faults that another call may fix."""

PASSING = [
    "image_short",
    "image_404",
    "image_500",
    "image_reset",
    "image_hang",
    "image_slow interval_s=0.1",
]
"""Links that may work later."""

SPOILED = LASTING + DAMAGED + PASSING


@pytest.fixture(scope="module")
def spoiled(service: Service) -> dict[str, str]:
    """Submit concurrent tasks, each with another model, so that no failure affects another; return their ids."""
    bodies = [{"prompt": f"spoiled {{{{fault:{fault}}}}}", "model": f"m/{fault[:20]}"} for fault in SPOILED]
    ids = at_once([partial(service.accepted, **body) for body in bodies])
    return dict(zip(SPOILED, ids, strict=True))


@pytest.mark.parametrize("fault", LASTING + DAMAGED)
def test_an_invalid_image_fails_the_task_and_is_not_served(
    service: Service, upstream: EmulatorProcess, spoiled: dict[str, str], fault: str
) -> None:
    task = service.finished(spoiled[fault])
    assert (task["status"], task["error"]["code"]) == ("failed", "upstream_bad_response")
    assert task["message"].startswith("图像生成失败：")
    assert "data" not in task
    assert picture(service, task["taskId"]).status == 404
    calls = calls_about(upstream, f"spoiled {{{{fault:{fault}}}}}")
    assert len(calls) == (1 if fault in LASTING else 2)


@pytest.mark.parametrize("fault", PASSING)
def test_a_paid_image_with_a_failing_link_is_fetched_later(
    service: Service, upstream: EmulatorProcess, spoiled: dict[str, str], fault: str
) -> None:
    task = eventually(lambda: seen if (seen := service.task(spoiled[fault]))["reason"] == "retrying" else {}, 40.0)
    assert (task["status"], task["attempts"]) == ("pending", 0)
    assert task["retryAt"]
    assert picture(service, task["taskId"]).status == 404
    assert len(calls_about(upstream, f"spoiled {{{{fault:{fault}}}}}")) == 1


def test_only_images_were_stored(service: Service, spoiled: dict[str, str]) -> None:
    for fault in LASTING + DAMAGED:
        service.finished(spoiled[fault])
    stored = [path for path in (service.folder.parent / "data" / "images").rglob("*") if path.is_file()]
    assert stored
    for path in stored:
        with Image.open(path) as image:
            image.verify()


def test_the_type_of_an_image_is_that_of_its_bytes(service: Service) -> None:
    (entry,) = service.made(prompt="typed {{fault:image_wrong_type}}", model="m/typed")["data"]
    assert (entry["contentType"], service.get(entry["url"]).headers["Content-Type"]) == ("image/png",) * 2


@pytest.mark.parametrize("fault", ["image_500", "image_reset", "image_404", "image_short"])
def test_a_link_that_fails_once_is_retried_and_nothing_paid_twice(
    service: Service, upstream: EmulatorProcess, fault: str
) -> None:
    service.made(prompt=f"passing {{{{fault:{fault} link_times=1}}}}", model=f"m/passing-{fault}")
    assert len(calls_about(upstream, f"passing {{{{fault:{fault} ")) == 1


def test_only_the_bad_image_is_requested_again(service: Service, upstream: EmulatorProcess) -> None:
    task = service.made(prompt="one bad {{fault:image_svg index=1 times=1}}", n=4, model="m/one-bad")
    assert [entry["index"] for entry in task["data"]] == [0, 1, 2, 3]
    assert "warnings" not in task
    assert [call["n"] for call in calls_about(upstream, "one bad")] == [4, 1]


def test_an_image_that_stays_bad_is_a_warning_for_the_others(service: Service) -> None:
    task = service.made(prompt="stays bad {{fault:image_svg index=0}}", n=3, model="m/stays-bad")
    assert len(task["data"]) == 2
    assert task["warnings"]
    assert all(service.get(entry["url"]).status == 200 for entry in task["data"])


def files_of(service: Service, task_id: str) -> list[Path]:
    return [path for path in (service.folder.parent / "data").rglob("*") if path.is_file() and task_id in str(path)]


def test_a_deleted_image_is_generated_again_by_the_next_submit(service: Service, upstream: EmulatorProcess) -> None:
    body = {"prompt": "deleted", "n": 2}
    first = service.made(**body)
    files_of(service, first["taskId"])[0].unlink()
    statuses = sorted(service.get(entry["url"]).status for entry in first["data"])
    assert statuses == [200, 410]
    again = service.submit(**body)
    assert (again.status, again.json["cached"], again.json["taskId"]) == (202, False, first["taskId"])
    second = service.completed(first["taskId"])
    assert second["sequence"] > again.json["sequence"] > first["sequence"]
    assert [service.get(entry["url"]).status for entry in second["data"]] == [200, 200]
    assert len(calls_about(upstream, "deleted")) == 2
    assert service.submit(**body).json["cached"] is True


def test_fifty_submits_for_a_deleted_image_are_one_more_call(service: Service, upstream: EmulatorProcess) -> None:
    body = {"prompt": "missed by fifty"}
    task_id = service.made(**body)["taskId"]
    for path in files_of(service, task_id):
        path.unlink()
    answers = at_once([lambda: service.submit(**body)] * 50)
    assert {answer.json["taskId"] for answer in answers} == {task_id}
    service.completed(task_id)
    assert len(calls_about(upstream, "missed by fifty")) == 2


def test_progress_follows_events(service: Service, upstream: EmulatorProcess) -> None:
    """Each image takes a while; progress does not change in between."""
    prompt = "step by step {{fault:image_slow interval_s=0.0005 held=1}}"
    task_id = service.accepted(prompt=prompt, n=4, width=64, height=64, model="m/steps")
    with service.events(task_id) as events:
        release(upstream, "step by step")
        lines = events.read().decode().splitlines()
    views = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    seen = [view["progress"] for view in views if "progress" in view]
    pictures = [len(view.get("data", ())) for view in views if "progress" in view]
    assert (seen, seen[-1]) == (sorted(seen), 100)
    assert pictures == sorted(pictures)
    assert len(set(seen) - {0, 100}) >= 3, sorted(set(seen))
    assert set(pictures) & {1, 2, 3}, "pictures are shown before all are there"
    print(f"progress: {sorted(set(seen))}")


def test_the_service_continues(service: Service) -> None:
    assert service.made(prompt="after all that", n=2)["status"] == "completed"
    assert service.get("/readyz").status == 200


def test_a_range_of_any_length_of_digits_is_answered(service: Service) -> None:
    (entry,) = service.made(prompt="long digits")["data"]
    size = entry["bytes"]
    beyond = service.get(entry["url"], Range=f"bytes={'9' * 4301}-")
    assert (beyond.status, beyond.headers["Content-Range"]) == (416, f"bytes */{size}")
    assert service.get(entry["url"], Range=f"bytes=0-{'9' * 4301}").status == 206
    several = service.get(entry["url"], Range="bytes=0-1,4-5")
    assert (several.status, len(several.body)) == (200, size)


def test_a_head_of_an_image_has_its_length_and_no_body(service: Service) -> None:
    (entry,) = service.made(prompt="only the head")["data"]
    path = entry["url"].partition("://")[2].partition("/")[2]
    connection = HTTPConnection(service.url.partition("://")[2], timeout=10)
    connection.request("HEAD", f"/{path}")
    answer = connection.getresponse()
    assert (answer.status, answer.read(), answer.headers["Content-Length"]) == (200, b"", str(entry["bytes"]))
    assert answer.headers["Content-Type"] == entry["contentType"]
    connection.close()


@pytest.mark.parametrize("index", ["٠", "00", "+0", "0x0", "100"])
def test_an_index_is_a_plain_number(service: Service, index: str) -> None:
    task_id = service.made(prompt="plain numbers")["taskId"]
    assert service.get(f"/api/images/{task_id}/{quote(index)}").status == 404


def test_a_deleted_data_folder_makes_the_service_not_ready(
    start_service: StartService, upstream: EmulatorProcess
) -> None:
    service: Service = start_service(upstream.url, REDIS_URL=f"redis://127.0.0.1:{free_port()}", ready=False)
    shutil.rmtree(service.folder.parent / "data")
    causes = eventually(lambda: [cause for cause in service.get("/readyz").json["causes"] if "images" in cause])
    assert "ENOENT" in causes[0]
    assert service.log.count("Images can't be saved") == 1


def test_another_instance_serves_an_image_once_its_task_is_completed(
    start_service: StartService, upstream: EmulatorProcess, redis_url: str
) -> None:
    first, second = (start_service(upstream.url, REDIS_URL=redis_url) for _ in range(2))
    for number in range(10):
        task_id = first.accepted(prompt=f"two instances {number} {{{{fault:ok held=1}}}}")
        assert second.task(task_id)["status"] in {"pending", "processing"}
        release(upstream, f"two instances {number}")
        first.completed(task_id)
        assert second.get(f"/api/images/{task_id}/0").status == 200


@pytest.mark.parametrize("query", ["", "?size=64"])
def test_a_request_for_another_version_alone_is_refused(service: Service, query: str) -> None:
    task_id = service.made(prompt="of one version", model="m/any")["taskId"]
    etag = picture(service, task_id, query=query).headers["ETag"]
    for other in ('"other"', f"W/{etag}", f'"other", W/{etag}'):
        refused = picture(service, task_id, query=query, If_Match=other)
        assert (refused.status, refused.body, refused.headers["ETag"]) == (412, b"", etag)
    for own in ("*", etag, f'"other", {etag}', f'W/"other",{etag}'):
        assert picture(service, task_id, query=query, If_Match=own).status == 200
    since = "Thu, 01 Jan 1970 00:00:00 GMT"  # without a time of change it does not count
    assert picture(service, task_id, query=query, If_Unmodified_Since=since).status == 200
    whole = picture(service, task_id, query=query, Range="bytes=0-3", If_Range=f"W/{etag}")
    assert (whole.status, len(whole.body) > 4) == (200, True)
