"""Image stores from the view of a client."""

from __future__ import annotations

import urllib.request
from pathlib import Path

import pytest

from tests.emulator_fixtures import EmulatorProcess
from tests.service.conftest import StartService
from tests.service.running import Service, calls_about


def test_links_of_the_provider_are_returned_if_configured(
    start_service: StartService, upstream: EmulatorProcess, tmp_path: Path
) -> None:
    service: Service = start_service(upstream.url, IMAGE_STORE="upstream")
    task = service.made(prompt="stored upstream", n=2, seed=3)
    assert [entry["index"] for entry in task["data"]] == [0, 1]
    for entry in task["data"]:
        assert entry["url"].startswith(f"{upstream.url}/shrt/")
        assert entry["seed"] == 3
        with urllib.request.urlopen(entry["url"], timeout=10) as answer:
            assert answer.headers["Content-Type"] == "image/png"
    shown = service.get(f"/api/images/{task['taskId']}/0")
    assert (shown.status, shown.headers["Location"]) == (302, task["data"][0]["url"])
    assert service.submit(prompt="stored upstream", n=2, seed=3).json["cached"] is True
    assert len(calls_about(upstream, "stored upstream")) == 1
    assert not [path for path in (tmp_path / "data" / "images").rglob("*") if path.is_file()]


def test_images_in_redis_are_served_by_every_instance(start_service: StartService, upstream: EmulatorProcess) -> None:
    first: Service = start_service(upstream.url, IMAGE_STORE="redis")
    second: Service = start_service(upstream.url, IMAGE_STORE="redis")
    task = first.made(prompt="stored in redis")
    upstream.expire_links()
    pictures = [service.get(f"/api/images/{task['taskId']}/0") for service in (first, second)]
    assert [picture.status for picture in pictures] == [200, 200]
    assert len({picture.body for picture in pictures}) == 1


def test_the_oldest_images_are_evicted_over_the_byte_limit(
    start_service: StartService, upstream: EmulatorProcess
) -> None:
    first: Service = start_service(upstream.url)
    size = first.made(prompt="how large")["data"][0]["bytes"]
    first.end()
    service: Service = start_service(upstream.url, IMAGE_STORE_MAX_BYTES=str(size * 3))
    tasks = [service.made(prompt=f"one of many {number}") for number in range(6)]
    statuses = [service.get(task["data"][0]["url"]).status for task in tasks]
    assert statuses[0] == 410
    assert statuses[-1] == 200
    again = service.submit(prompt="one of many 0")
    assert (again.status, again.json["cached"]) == (202, False)
    assert service.get(service.completed(tasks[0]["taskId"])["data"][0]["url"]).status == 200


@pytest.mark.parametrize(("former", "new"), [("disk", "redis"), ("redis", "disk"), ("redis", "upstream")])
def test_paid_images_outlast_a_change_of_the_store(
    start_service: StartService, upstream: EmulatorProcess, former: str, new: str
) -> None:
    prompt = f"moved from {former} to {new}"
    first: Service = start_service(upstream.url, IMAGE_STORE=former)
    link = first.made(prompt=prompt)["data"][0]["url"]
    first.end()
    service: Service = start_service(upstream.url, IMAGE_STORE=new)
    assert service.get(link).status == 200
    assert service.get(f"{link}&size=64").status == 200
    assert service.submit(prompt=prompt).json["cached"] is True
    two = service.made(prompt=prompt, n=2)
    shown = [service.get(f"/api/images/{two['taskId']}/{index}").status for index in range(2)]
    assert shown == [200, 302 if new == "upstream" else 200]
    assert len(calls_about(upstream, prompt)) == 2
