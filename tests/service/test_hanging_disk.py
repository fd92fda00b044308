"""Images on a network mount of which the server is away: its calls of the system never end."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path

import pytest

from bench.imagehost import noise_png
from tests.emulator_fixtures import EmulatorProcess
from tests.ports import free_port
from tests.service.conftest import StartService
from tests.service.image_hosts import calls, image_host
from tests.service.running import Service, calls_about, eventually
from tests.support import slowness

PROGRAM = Path(__file__).with_name("hanging_disk.py")


class Mount:
    """The mount of a service's data folder; it hangs while its file exists."""

    def __init__(self, folder: Path, start_service: StartService) -> None:
        self.data_dir = folder / "data"
        self._file = folder / "hangs"
        self._mounts = folder / "mounts"
        self._mounts.write_text(f"29 1 0:40 / {folder} rw,relatime - nfs4 server:/images rw,vers=4.2\n")
        self._start_service = start_service

    def start(self, upstream_url: str, *, ready: bool = True, **settings: str) -> Service:
        files = {"HANG_FILE": str(self._file), "MOUNTS_FILE": str(self._mounts)}
        return self._start_service(upstream_url, ready=ready, program=PROGRAM, **files, **settings)

    @contextmanager
    def hanging(self) -> Iterator[None]:
        self._file.touch()
        try:
            yield
        finally:
            self.answer()

    def answer(self) -> None:
        """End the hang."""
        self._file.unlink(missing_ok=True)


@pytest.fixture
def mount(tmp_path: Path, start_service: StartService) -> Mount:
    return Mount(tmp_path, start_service)


def is_unavailable(service: Service, path: str) -> bool:
    answer = service.get(path)
    return answer.status == 503 and answer.json["code"] == "store_unavailable" and "Retry-After" in answer.headers


def test_a_mount_that_hangs_delays_no_answer_without_its_images_and_no_image_is_paid_again(
    mount: Mount, upstream: EmulatorProcess
) -> None:
    service = mount.start(upstream.url)
    before = service.made(prompt="before the hang")
    url = before["data"][0]["url"].removeprefix(service.url)
    with mount.hanging(), ThreadPoolExecutor(4) as pool:
        reads = [pool.submit(service.get, url) for _ in range(4)]
        began = time.monotonic()
        task_id = service.accepted(prompt="in the hang")
        assert service.task(before["taskId"])["status"] == "completed"
        assert service.get("/healthz").status == 200
        assert time.monotonic() - began < 2 * slowness()
        assert {read.result().status for read in reads} == {503}
        eventually(lambda: service.task(task_id)["reason"] == "store_unavailable")
        assert service.get("/readyz").status == 503
        eventually(lambda: is_unavailable(service, url))
        assert service.request("POST", "/api/images/generate", {"prompt": "before the hang"}).status == 503
    task = service.completed(task_id)
    assert (task["attempts"], "possiblyBilledTwice" in task) == (1, False)
    assert service.get(task["data"][0]["url"]).status == service.get(url).status == 200
    assert len(calls_about(upstream, "in the hang")) == len(calls_about(upstream, "before the hang")) == 1
    assert service.log.count("the disk does not answer") <= 2 + service.log.count("Images can be saved")


@pytest.mark.parametrize("form", ["link", "base64"])
def test_large_images_wait_for_a_mount_that_hangs_and_are_paid_once(mount: Mount, form: str) -> None:
    with image_host(form) as url:
        service = mount.start(url)
        service.made(prompt="before")
        with mount.hanging():
            task_id = service.accepted(prompt="large")
            eventually(lambda: service.task(task_id)["reason"] == "store_unavailable")
        task = service.completed(task_id)
        assert (task["attempts"], "possiblyBilledTwice" in task) == (1, False)
        assert service.get(task["data"][0]["url"]).status == 200
        assert calls(service) == 2


def test_images_in_redis_are_saved_and_served_though_their_cache_hangs(mount: Mount) -> None:
    with image_host("link") as url:
        service = mount.start(url, IMAGE_STORE="redis")
        link = service.made(prompt="before")["data"][0]["url"]
        with mount.hanging():
            assert service.get(link).status == 200
            task = service.made(prompt="in the hang")
            assert (task["attempts"], "possiblyBilledTwice" in task) == (1, False)
            assert service.get(task["data"][0]["url"]).status == 200
        assert calls(service) == 2


def test_a_stop_while_the_mount_hangs_takes_seconds_and_no_paid_link_is_lost(
    mount: Mount, upstream: EmulatorProcess
) -> None:
    service = mount.start(upstream.url)
    with mount.hanging():
        task_id = service.accepted(prompt="stopped in the hang")
        eventually(lambda: service.task(task_id)["reason"] == "store_unavailable")
        service.signal(signal.SIGTERM)
        began = time.monotonic()
        assert service.wait() == 0
        assert time.monotonic() - began < 10 * slowness()
    task = service.start().completed(task_id)
    assert "possiblyBilledTwice" not in task
    assert len(calls_about(upstream, "stopped in the hang")) == 1


def test_an_upload_is_refused_while_the_mount_hangs(mount: Mount, upstream: EmulatorProcess) -> None:
    service = mount.start(upstream.url)
    data, headers = noise_png(600_000), {"Content-Type": "image/png"}
    with mount.hanging():
        answer = service.request("POST", "/api/uploads", data, headers=headers)
        assert (answer.status, answer.json["code"]) == (503, "store_unavailable")
    eventually(lambda: service.request("POST", "/api/uploads", data, headers=headers).status == 201)


def test_a_task_ends_at_its_deadline_though_the_mount_hangs(mount: Mount, upstream: EmulatorProcess) -> None:
    service = mount.start(upstream.url, TASK_DEADLINE="4")
    with mount.hanging():
        task = service.finished(service.accepted(prompt="without an end"))
        assert task["status"] == "failed"
    assert len(calls_about(upstream, "without an end")) == 1


def test_a_start_on_a_mount_that_hangs_serves_all_but_images_until_it_answers(
    mount: Mount, upstream: EmulatorProcess, redis_url: str
) -> None:
    settings = {"REDIS_URL": redis_url, "REDIS_PREFIX": "hanging-start", "HANG_PLACES": str(mount.data_dir)}
    with mount.hanging():
        service = mount.start(upstream.url, ready=False, **settings)
        assert service.get("/api/models").status == 200
        task_id = service.accepted(prompt="before the disk answers")
        eventually(lambda: service.task(task_id)["reason"] == "store_unavailable")
        assert service.get("/readyz").status == 503
        assert service.get("/api/stats", Authorization="Bearer no-token").status == 401
        assert f"DATA_DIR: {mount.data_dir} does not answer" in service.log
    task = service.completed(task_id)
    assert service.get(task["data"][0]["url"]).status == 200
    eventually(lambda: service.get_as_admin("/api/stats").status == 200)
    assert service.get("/readyz").status == 200
    assert len(calls_about(upstream, "before the disk answers")) == 1


def test_a_start_whose_cache_hangs_makes_and_serves_images_in_redis(
    mount: Mount, upstream: EmulatorProcess, redis_url: str
) -> None:
    settings = {"REDIS_URL": redis_url, "REDIS_PREFIX": "hanging-cache", "HANG_PLACES": str(mount.data_dir)}
    with mount.hanging():
        service = mount.start(upstream.url, ready=True, IMAGE_STORE="redis", **settings)
        task = service.made(prompt="without its cache")
        assert service.get(task["data"][0]["url"]).status == 200
    eventually(lambda: "Images can be saved in the disk cache again" in service.log)
    assert service.get(task["data"][0]["url"]).status == 200
    assert len(calls_about(upstream, "without its cache")) == 1


def test_a_start_with_its_redis_on_a_mount_that_hangs_answers_health_checks_until_it_goes_on(
    mount: Mount, upstream: EmulatorProcess
) -> None:
    with mount.hanging(), ThreadPoolExecutor(1) as pool:
        port = free_port()
        starting = pool.submit(mount.start, upstream.url, PORT=str(port), HANG_PLACES=str(mount.data_dir))
        assert eventually(lambda: status_of(port, "/healthz")) == 200
        assert status_of(port, "/readyz") == 503
        mount.answer()
        service = starting.result()
    assert service.made(prompt="after the disk answers")["attempts"] == 1
    assert service.get_as_admin("/api/stats").status == 200


def status_of(port: int, path: str) -> int:
    """Return the status of a response, 0 while there is none."""
    connection = HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    except OSError:
        return 0
    finally:
        connection.close()
