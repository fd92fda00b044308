"""Images in a bucket that shows them late, or that has lost them."""

from __future__ import annotations

import itertools
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from http import HTTPStatus

import pytest
from aiohttp import web

from bench.imagehost import noise_png
from tests.emulator_fixtures import EmulatorProcess
from tests.s3_server import Objects, S3Server, error_response
from tests.service.conftest import StartService
from tests.service.image_hosts import calls, image_host
from tests.service.running import Service, calls_about, eventually

_numbers = itertools.count()


@pytest.fixture
def bucket(s3: S3Server) -> Iterator[str]:
    name = f"shown{next(_numbers)}"
    s3.buckets[name] = {}
    yield name
    s3.hides = lambda _key: False
    s3.refuses = lambda _request: None


def settings_of(s3: S3Server, bucket: str) -> dict[str, str]:
    keys = {"S3_ACCESS_KEY_ID": "a-key", "S3_SECRET_ACCESS_KEY": "a-secret"}
    return {"IMAGE_STORE": "s3", "S3_ENDPOINT": s3.url, "S3_BUCKET": bucket} | keys


def test_an_image_that_the_bucket_does_not_show_yet_is_not_paid_again(
    start_service: StartService, upstream: EmulatorProcess, s3: S3Server, bucket: str
) -> None:
    service: Service = start_service(upstream.url, **settings_of(s3, bucket))
    made = service.made(prompt="shown late")
    s3.hides = lambda key: "/probe-" not in key
    for _ in range(3):
        answer = service.submit(prompt="shown late")
        assert (answer.status, answer.json["code"], "Retry-After" in answer.headers) == (503, "store_unavailable", True)
    s3.hides = lambda _key: False
    assert service.submit(prompt="shown late").json["cached"] is True
    assert service.get(made["data"][0]["url"]).status == 200
    assert len(calls_about(upstream, "shown late")) == 1


def age(objects: Objects) -> None:
    """Let all objects be saved an hour ago."""
    for key, found in list(objects.items()):
        objects[key] = replace(found, modified_at_s=time.time() - 3600)


def test_an_image_that_only_the_cache_still_has_is_made_again_once(
    start_service: StartService, upstream: EmulatorProcess, s3: S3Server, bucket: str
) -> None:
    service: Service = start_service(upstream.url, **settings_of(s3, bucket))
    url = service.made(prompt="deleted in the bucket")["data"][0]["url"].removeprefix(service.url)
    service.end()
    age(s3.buckets[bucket])
    service.start()
    assert service.get(url).status == 200
    s3.buckets[bucket].clear()
    answer = service.submit(prompt="deleted in the bucket")
    assert (answer.status, answer.json["cached"]) == (202, False)
    task = service.completed(answer.json["taskId"])
    assert service.get(task["data"][0]["url"]).status == 200
    assert len(calls_about(upstream, "deleted in the bucket")) == 2


def test_images_of_a_bucket_that_was_copied_without_metadata_are_served_and_used(
    start_service: StartService, upstream: EmulatorProcess, s3: S3Server, bucket: str
) -> None:
    service: Service = start_service(upstream.url, **settings_of(s3, bucket))
    url = service.made(prompt="moved to another bucket")["data"][0]["url"].removeprefix(service.url)
    service.end()
    for key, found in list(s3.buckets[bucket].items()):
        s3.buckets[bucket][key] = replace(found, metadata={})
    shutil.rmtree(service.folder.parent / "data" / "cache")
    service.start()
    assert service.get(url).status == 200
    assert service.submit(prompt="moved to another bucket").json["cached"] is True
    assert len(calls_about(upstream, "moved to another bucket")) == 1


@pytest.mark.parametrize("form", ["link", "base64"])
def test_a_proxy_without_its_bucket_service_costs_no_image_and_ends_no_process(
    start_service: StartService, s3: S3Server, bucket: str, form: str
) -> None:
    with image_host(form) as url:
        service: Service = start_service(url, **settings_of(s3, bucket))
        service.made(prompt="before")
        service.end()
        age(s3.buckets[bucket])
        service.start()
        s3.refuses = lambda _request: web.Response(status=404, text="404 page not found")
        task_id = service.accepted(prompt="while it is away")
        eventually(lambda: service.task(task_id)["reason"] == "store_unavailable")
        assert service.submit(prompt="before").error == (503, "store_unavailable")
        eventually(lambda: "Images can't be saved in the image store" in service.log)
        s3.refuses = lambda _request: None
        task = service.completed(task_id)
        assert (task["attempts"], "possiblyBilledTwice" in task) == (1, False)
        assert service.get(task["data"][0]["url"]).status == 200
        assert service.submit(prompt="before").json["cached"] is True
        assert calls(service) == 1


def left_bucket(service: Service, image_store: str) -> None:
    """Restart a service with another store and without its cache; the settings of its bucket stay."""
    service.end()
    shutil.rmtree(service.folder.parent / "data" / "cache")
    service.settings["IMAGE_STORE"] = image_store
    service.start()


@pytest.mark.parametrize("image_store", ["disk", "redis", "upstream"])
def test_images_in_a_bucket_are_served_and_not_paid_again_after_a_change_of_the_store(
    start_service: StartService, upstream: EmulatorProcess, s3: S3Server, bucket: str, image_store: str
) -> None:
    service: Service = start_service(upstream.url, **settings_of(s3, bucket))
    prompt = f"before a change to {image_store}"
    url = service.made(prompt=prompt)["data"][0]["url"].removeprefix(service.url)
    count = len(s3.buckets[bucket])
    left_bucket(service, image_store)
    assert service.get(url).status == 200
    assert service.submit(prompt=prompt).json["cached"] is True
    service.made(prompt=prompt, n=2)
    assert [call["n"] for call in calls_about(upstream, prompt)] == [1, 1]
    assert len(s3.buckets[bucket]) == count, "nothing is written there"


def test_an_image_in_a_bucket_that_is_away_after_a_change_of_the_store_is_not_paid_again(
    start_service: StartService, upstream: EmulatorProcess, s3: S3Server, bucket: str
) -> None:
    service: Service = start_service(upstream.url, **settings_of(s3, bucket))
    url = service.made(prompt="left and away")["data"][0]["url"].removeprefix(service.url)
    s3.refuses = lambda _request: web.Response(status=503)
    left_bucket(service, "disk")
    assert "The bucket that IMAGE_STORE=s3 filled does not answer" in service.log
    assert service.get(url).error == service.submit(prompt="left and away").error == (503, "store_unavailable")
    s3.refuses = lambda _request: None
    assert service.get(url).status == 200
    assert service.submit(prompt="left and away").json["cached"] is True
    assert len(calls_about(upstream, "left and away")) == 1


def test_an_image_in_a_bucket_that_refuses_us_after_a_change_of_the_store_is_made_again(
    start_service: StartService, upstream: EmulatorProcess, s3: S3Server, bucket: str
) -> None:
    service: Service = start_service(upstream.url, **settings_of(s3, bucket))
    service.made(prompt="left for ever")
    s3.refuses = lambda _request: error_response(HTTPStatus.FORBIDDEN, "InvalidAccessKeyId")
    left_bucket(service, "disk")
    assert "Images that IMAGE_STORE=s3 left in the bucket are not served: S3_ACCESS_KEY_ID" in service.log
    task = service.made(prompt="left for ever")
    assert service.get(task["data"][0]["url"]).status == 200
    assert len(calls_about(upstream, "left for ever")) == 2


def uploaded_id(service: Service, image: bytes) -> object:
    answer = service.request("POST", "/api/uploads", image, headers={"Content-Type": "image/png"})
    assert answer.status in (200, 201), answer.body
    return answer.json["uploadId"]


@pytest.mark.parametrize("image_store", ["disk", "redis"])
def test_a_bucket_that_may_only_be_read_after_a_change_of_the_store_gives_what_is_used_again(
    start_service: StartService, upstream: EmulatorProcess, s3: S3Server, bucket: str, image_store: str
) -> None:
    service: Service = start_service(upstream.url, **settings_of(s3, bucket))
    prompt, image = f"left to be read with {image_store}", noise_png(20_000)
    upstream.script({"fault": "ok", "match": prompt}, {"fault": "400", "match": prompt})
    failed = service.finished(service.accepted(prompt=prompt, n=5))
    upload_id = uploaded_id(service, image)
    left_bucket(service, image_store)
    objects = dict(s3.buckets[bucket])
    s3.refuses = lambda request: (
        error_response(HTTPStatus.FORBIDDEN, "AccessDenied") if request.method in ("PUT", "DELETE") else None
    )
    assert uploaded_id(service, image) == upload_id
    again = service.made(prompt=prompt, n=5)
    assert [made["sha256"] for made in again["data"][:4]] == [made["sha256"] for made in failed["data"]]
    assert [call["n"] for call in calls_about(upstream, prompt)] == [4, 1, 1]
    assert [service.get(made["url"]).status for made in again["data"]] == [200] * 5
    assert s3.buckets[bucket] == objects


def test_a_bucket_that_is_away_after_a_change_of_the_store_stops_no_use_of_images_that_redis_has(
    start_service: StartService, s3: S3Server, bucket: str, upstream: EmulatorProcess
) -> None:
    service: Service = start_service(upstream.url, **settings_of(s3, bucket))
    left_bucket(service, "redis")
    s3.refuses = lambda _request: web.Response(status=503)
    prompt, image = "beside a bucket that is away", noise_png(20_000)
    upstream.script({"fault": "ok", "match": prompt}, {"fault": "400", "match": prompt})
    failed = service.finished(service.accepted(prompt=prompt, n=5))
    assert uploaded_id(service, image) == uploaded_id(service, image)
    again = service.made(prompt=prompt, n=5)
    assert [made["sha256"] for made in again["data"][:4]] == [made["sha256"] for made in failed["data"]]
    assert [call["n"] for call in calls_about(upstream, prompt)] == [4, 1, 1]
