"""Images in a bucket that shows them late, or that has lost them."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
from aiohttp import web

from tests.emulator_fixtures import EmulatorProcess
from tests.s3_server import Objects, S3Server
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
