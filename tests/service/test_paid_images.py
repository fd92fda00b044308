"""Paid images survive an outage of their host or of the disk."""

from __future__ import annotations

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import pytest

from tests.emulator_fixtures import EmulatorProcess
from tests.service.conftest import StartService
from tests.service.image_hosts import calls, image_host
from tests.service.running import Service, at_once, calls_about, eventually

LOG_BYTES = 1_000_000
"""What a file may have while images are refused: more than the service's log."""


def test_images_on_a_host_that_fails_for_a_while_are_paid_once(
    start_service: StartService, upstream: EmulatorProcess
) -> None:
    service: Service = start_service(upstream.url, WORKER_CONCURRENCY="5")
    prompts = [f"host away {number} {{{{fault:image_500 link_times=4}}}}" for number in range(10)]
    ids = at_once([partial(service.accepted, prompt=prompt) for prompt in prompts])
    tasks = [service.completed(task_id) for task_id in ids]
    assert {(task["attempts"], task.get("possiblyBilledTwice")) for task in tasks} == {(1, None)}
    assert len(calls_about(upstream, "host away")) == 10


def test_a_kill_while_the_image_host_is_down_costs_nothing(
    start_service: StartService, upstream: EmulatorProcess
) -> None:
    service: Service = start_service(upstream.url)
    task_id = service.accepted(prompt="killed {{fault:image_500 link_times=7}}")
    eventually(lambda: service.task(task_id)["reason"] == "retrying")
    service.kill()
    task = service.start().completed(task_id)
    assert "possiblyBilledTwice" not in task
    assert len(calls_about(upstream, "killed")) == 1


@contextmanager
def no_large_files(service: Service) -> Iterator[None]:
    """Limit the file size of the service below that of its images."""
    before = resource.prlimit(service.pid, resource.RLIMIT_FSIZE, (LOG_BYTES, resource.RLIM_INFINITY))
    yield
    with suppress(ProcessLookupError):
        resource.prlimit(service.pid, resource.RLIMIT_FSIZE, before)


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="only Linux limits another process")
@pytest.mark.parametrize("form", ["link", "base64"])
def test_images_that_the_disk_refuses_wait_and_are_paid_once(start_service: StartService, form: str) -> None:
    with image_host(form) as url:
        service: Service = start_service(url, WORKER_CONCURRENCY="3")
        with no_large_files(service):
            ids = at_once([partial(service.accepted, prompt=f"full {number}") for number in range(8)])
            eventually(lambda: sum(service.task(task_id)["reason"] == "store_unavailable" for task_id in ids) >= 3)
            assert service.get("/readyz").status == 503
            assert {service.task(task_id)["status"] for task_id in ids} <= {"pending", "processing"}
            assert calls(service) <= 3
        tasks = [service.completed(task_id) for task_id in ids]
        assert {(task["attempts"], task.get("possiblyBilledTwice")) for task in tasks} == {(1, None)}
        assert {task["data"][0]["bytes"] for task in tasks} == {service_bytes(service, tasks[0])}
        assert calls(service) == 8


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="only Linux limits another process")
def test_a_stop_while_the_disk_refuses_paid_links_costs_nothing(start_service: StartService) -> None:
    with image_host("link") as url:
        service: Service = start_service(url, WORKER_CONCURRENCY="2")
        with no_large_files(service):
            task_id = service.accepted(prompt="stopped")
            eventually(lambda: service.task(task_id)["reason"] == "store_unavailable")
            service.signal(signal.SIGTERM)
            assert service.wait() == 0
        task = service.start().completed(task_id)
        assert "possiblyBilledTwice" not in task
        assert calls(service) == 0


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="only Linux limits another process")
def test_paid_images_wait_while_there_are_no_file_descriptors(
    start_service: StartService, upstream: EmulatorProcess
) -> None:
    """The first image of this process: a module imported only now could not be read."""
    service: Service = start_service(upstream.url)
    upstream.script({"fault": "ok", "held": 1})
    task_id = service.accepted(prompt="descriptors")
    eventually(lambda: calls_about(upstream, "descriptors"))
    before = resource.prlimit(service.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(service.pid, resource.RLIMIT_NOFILE, (3, before[1]))
    upstream.release()
    eventually(lambda: "Paid images can't be fetched now" in service.log or "waits for its store" in service.log)
    resource.prlimit(service.pid, resource.RLIMIT_NOFILE, before)
    assert "possiblyBilledTwice" not in service.completed(task_id)
    assert len(calls_about(upstream, "descriptors")) == 1


def service_bytes(service: Service, task: dict[str, Any]) -> int:
    return len(service.get(task["data"][0]["url"]).body)
