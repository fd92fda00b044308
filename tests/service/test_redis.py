"""Redis that is missing, dies, hangs or holds foreign values, from the view of a client."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

from redis import Redis

from tests.emulator_fixtures import EmulatorProcess
from tests.ports import free_port
from tests.service.conftest import StartService
from tests.service.running import Service, calls_about, eventually, redis_server, release

LOST_REDIS = ("The embedded Redis died",)
UNREADABLE = ("in Redis can't be read",)


def test_a_start_waits_for_an_unreachable_redis(
    start_service: Callable[..., Service], upstream: EmulatorProcess, tmp_path: Path
) -> None:
    port = free_port()
    service = start_service(upstream.url, ready=False, REDIS_URL=f"redis://127.0.0.1:{port}")
    assert [service.get(path).status for path in ("/healthz", "/readyz", "/api/health")] == [200, 503, 200]
    for answer in (service.submit(prompt="not yet"), service.get(f"/api/images/{'0' * 32}")):
        assert answer.error == (503, "queue_unavailable")
        assert int(answer.headers["Retry-After"]) >= 1
        assert answer.json["retryable"] is True
    with redis_server(tmp_path, port):
        eventually(lambda: service.get("/readyz").status == 200, within_s=30)
        eventually(lambda: service.submit(prompt="now").status in (200, 202))  # a slow machine may refuse the first
        assert service.made(prompt="now")["status"] == "completed"
        service.end()


def test_running_tasks_continue_while_redis_is_down(
    start_service: Callable[..., Service], upstream: EmulatorProcess, tmp_path: Path
) -> None:
    port, durable = free_port(), ("--appendonly", "yes")
    with redis_server(tmp_path, port, *durable):
        service = start_service(upstream.url, REDIS_URL=f"redis://127.0.0.1:{port}", LEASE_SECONDS="20")
        task_id = service.accepted(prompt="outlives it {{fault:ok held=1}}")
        service.until(task_id, "processing")
    eventually(lambda: service.submit(prompt="while it is away").status == 503)
    assert service.get("/healthz").status == 200
    release(upstream, "outlives it")
    eventually(lambda: all(call["answered_at"] for call in upstream.ledger()["calls"]))
    with redis_server(tmp_path, port, *durable):
        task = service.completed(task_id)
        assert (task["attempts"], task.get("possiblyBilledTwice", 0)) == (1, 0)
        service.end()


def test_a_killed_embedded_redis_returns_without_a_lost_task(
    start_service: StartService, upstream: EmulatorProcess
) -> None:
    service: Service = start_service(upstream.url, WORKER_CONCURRENCY="3", allowed=LOST_REDIS)
    finished = service.made(prompt="finished before the loss")
    prompts = [f"through the loss {number}" for number in range(8)]
    upstream.script({"fault": "ok", "held": 1, "match": "through the loss", "times": 3})
    ids = [service.accepted(prompt=prompt) for prompt in prompts]
    eventually(lambda: upstream.ledger()["in_flight"] == 3)
    (server,) = service.children()
    os.kill(server, signal.SIGKILL)
    upstream.release()
    began = time.monotonic()
    eventually(lambda: service.submit(prompt="after the loss").status in (200, 202), within_s=20)
    print(f"Redis back after {time.monotonic() - began:.2f} s")
    assert service.get(f"/api/images/{finished['taskId']}").json["status"] == "completed"
    for task_id, prompt in zip(ids, prompts, strict=True):
        task = service.completed(task_id)
        assert (task["attempts"], len(calls_about(upstream, prompt))) == (1, 1)
    assert service.made(prompt="after the loss")["status"] == "completed"


def test_no_response_hangs_on_a_hanging_redis(start_service: Callable[..., Service], upstream: EmulatorProcess) -> None:
    service = start_service(upstream.url)
    done = service.made(prompt="done before it hangs")
    (server,) = service.children()
    os.kill(server, signal.SIGSTOP)
    try:
        began = time.monotonic()
        refused = service.submit(prompt="while it hangs")
        took_s = time.monotonic() - began
        assert service.get("/healthz").status == 200
        assert service.task(done["taskId"])["status"] == "completed"
    finally:
        os.kill(server, signal.SIGCONT)
    assert refused.error == (503, "queue_unavailable")
    assert took_s < 15
    eventually(lambda: service.submit(prompt="while it hangs").status in (200, 202))
    service.made(prompt="while it hangs")
    assert len(calls_about(upstream, "while it hangs")) == 1


def test_an_unreadable_record_is_logged_once_until_resubmitted(
    start_service: Callable[..., Service], tmp_path: Path
) -> None:
    port = free_port()
    with redis_server(tmp_path, port), Redis(port=port) as redis:
        service = start_service(REDIS_URL=f"redis://127.0.0.1:{port}", allowed=UNREADABLE)
        task_id = service.made(prompt="spoiled in Redis")["taskId"]
        service.kill()
        for key in redis.scan_iter(f"*{task_id}*"):
            redis.set(key, "no record at all")
        service.start()
        answers = [service.get(f"/api/images/{task_id}") for _ in range(3)]
        assert [(answer.status, answer.json["status"]) for answer in answers] == [(404, "not_found")] * 3
        assert not any(text in answers[0].body for text in (b"Traceback", b".py", b"no record"))
        (line,) = [line for line in service.log.splitlines() if " ERROR " in line]
        assert task_id in line
        assert service.made(prompt="another one")["status"] == "completed"
        assert service.made(prompt="spoiled in Redis")["taskId"] == task_id
        service.end()


def test_a_deleted_redis_folder_makes_the_service_unready(
    start_service: Callable[..., Service], tmp_path: Path
) -> None:
    service = start_service(DATA_DIR=str(tmp_path / "gone"), allowed=("DATA_DIR",))
    service.made(prompt="before it is deleted")
    shutil.rmtree(tmp_path / "gone", ignore_errors=True)
    eventually(lambda: service.get("/readyz").status == 503)
    assert service.get("/healthz").status == 200
    assert service.log.count("was deleted or replaced under the running Redis") == 1
