"""Redis that is restored from a backup while no instance runs: tasks of the backup were paid and finished since."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from redis import Redis

from tests.emulator_fixtures import EmulatorProcess
from tests.ports import free_port
from tests.service.conftest import StartService
from tests.service.running import Service, calls_about, eventually, redis_server, release

DYING = Path(__file__).with_name("dying.py")
BUDGET = {"BUDGET_DAILY_USD": "5", "UNKNOWN_PRICE_USD": "0.01"}


class RestoredRedis:
    """Redis server over TCP that can be saved, and put back to what was saved."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stack = ExitStack()
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}"

    def start(self) -> None:
        self._stack.enter_context(redis_server(self._folder, self.port))

    def stop(self) -> None:
        self._stack.close()

    def save(self) -> None:
        with Redis(port=self.port) as redis:
            redis.save()
        shutil.copyfile(self._folder / "dump.rdb", self._folder / "backup.rdb")

    def restore(self) -> None:
        self.stop()
        shutil.copyfile(self._folder / "backup.rdb", self._folder / "dump.rdb")
        self.start()


@contextmanager
def _running(folder: Path) -> Iterator[RestoredRedis]:
    folder.mkdir()
    redis = RestoredRedis(folder)
    redis.start()
    try:
        yield redis
    finally:
        redis.stop()


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RestoredRedis]:
    with _running(tmp_path / "redis") as redis:
        yield redis


def spent(service: Service) -> float:
    return float(service.get_as_admin("/api/usage").json["total"]["spent"])


def test_what_was_made_since_the_backup_is_found_in_the_store_and_not_paid_again(
    start_service: StartService, upstream: EmulatorProcess, redis: RestoredRedis
) -> None:
    upstream.clear()
    settings = {"REDIS_URL": redis.url, "WORKER_CONCURRENCY": "1", "LEASE_SECONDS": "2", **BUDGET}
    service = start_service(upstream.url, **settings)
    running = service.accepted(prompt="it runs {{fault:ok held=1}}")
    waiting = [service.accepted(prompt="it waits", n=2), service.accepted(prompt="it waits too", model="unknown/model")]
    service.until(running, "processing")
    redis.save()
    release(upstream, "it runs")
    before = [service.completed(task_id) for task_id in (running, *waiting)]
    service.end()
    redis.restore()
    service = start_service(upstream.url, **settings)
    after = [service.completed(task_id) for task_id in (running, *waiting)]
    for first, last in zip(before, after, strict=True):
        assert [image["sha256"] for image in last["data"]] == [image["sha256"] for image in first["data"]]
        assert last["cost"]["charged"] == first["cost"]["charged"]
        assert last.get("possiblyBilledTwice") is None
    assert service.get(after[1]["data"][1]["url"]).status == 200
    assert len(upstream.ledger()["calls"]) == 3
    assert spent(service) == pytest.approx(sum(task["cost"]["charged"] for task in after))
    service.end()


def test_a_kill_between_the_save_of_an_image_and_the_end_of_its_task_costs_no_second_call(
    start_service: StartService, upstream: EmulatorProcess, redis: RestoredRedis, tmp_path: Path
) -> None:
    upstream.clear()
    (kill_file := tmp_path / "kill").write_text("saved")
    settings = {"REDIS_URL": redis.url, "LEASE_SECONDS": "2", "KILL_FILE": str(kill_file), **BUDGET}
    service = start_service(upstream.url, program=DYING, **settings)
    task_id = service.accepted(prompt="it dies then")
    assert service.wait() == -9
    service = start_service(upstream.url, program=DYING, **settings)
    task = service.completed(task_id)
    assert task.get("possiblyBilledTwice") is None
    assert task["cost"]["charged"] == task["cost"]["estimated"]
    assert len(upstream.ledger()["calls"]) == 1
    assert service.get(task["data"][0]["url"]).status == 200
    service.end()


def test_a_task_that_is_generated_again_gets_no_image_of_before(
    start_service: StartService, upstream: EmulatorProcess, redis: RestoredRedis
) -> None:
    upstream.clear()
    settings = {"REDIS_URL": redis.url, "WORKER_CONCURRENCY": "1", "LEASE_SECONDS": "2"}
    service = start_service(upstream.url, **settings)
    task = service.made(prompt="anew")
    blocked = service.accepted(prompt="before it {{fault:ok held=1}}")
    service.until(blocked, "processing")
    no_cache = {"Cache-Control": "no-cache"}
    assert service.request("POST", "/api/images/generate", {"prompt": "anew"}, headers=no_cache).status == 202
    service.kill()
    service = start_service(upstream.url, **settings)
    upstream.release()
    again = service.completed(task["taskId"])
    assert again["data"][0]["sha256"] != task["data"][0]["sha256"]
    assert len(calls_about(upstream, "anew")) == 2
    service.end()


def test_tasks_that_waited_in_the_line_of_their_client_are_not_paid_again_either(
    start_service: StartService, upstream: EmulatorProcess, redis: RestoredRedis
) -> None:
    upstream.clear()
    key = "a-key-of-32-characters-for-tests"
    settings = {"REDIS_URL": redis.url, "WORKER_CONCURRENCY": "1", "LEASE_SECONDS": "2", "API_KEYS": f"web:{key}"}
    prompts = ["first {{fault:ok held=1}}", *(f"then number {number}" for number in range(5))]

    headers = {"Authorization": f"Bearer {key}"}

    def images() -> list[str]:
        tasks = [service.get(f"/api/images/{task_id}?wait=30", **headers).json for task_id in task_ids]
        return [task["data"][0]["sha256"] for task in tasks if task["status"] == "completed"]

    service = start_service(upstream.url, **settings)
    submits = [service.request("POST", "/api/images/generate", {"prompt": text}, headers=headers) for text in prompts]
    task_ids = [submit.json["taskId"] for submit in submits]
    redis.save()
    release(upstream, "first")
    before = eventually(lambda: images() if len(images()) == len(prompts) else None)
    service.end()
    redis.restore()
    service = start_service(upstream.url, **settings)
    assert eventually(lambda: images() if len(images()) == len(prompts) else None) == before
    assert len(upstream.ledger()["calls"]) == len(prompts)
    service.end()
