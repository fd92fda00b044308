"""A deploy: an old and a new version share one queue, and leave entries alone that they can't read."""

from __future__ import annotations

from pathlib import Path

from emulator_fixtures import EmulatorProcess
from ports import free_port
from service.running import Service, calls_about, eventually, redis_server

NEWER = Path(__file__).with_name("newer.py")
LONG = "{{fault:ok delay_s=1.5}}"


def test_a_deploy_loses_no_task_and_pays_each_once(start_service, upstream: EmulatorProcess, tmp_path: Path) -> None:
    port = free_port()
    with redis_server(tmp_path, port):
        shared = {"REDIS_URL": f"redis://127.0.0.1:{port}", "WORKER_CONCURRENCY": "1"}
        old: Service = start_service(upstream.url, **shared)
        before = [old.accepted(prompt=f"deploy before {number} {LONG}") for number in range(3)]
        new: Service = start_service(upstream.url, program=NEWER, **shared)
        after = [new.accepted(prompt=f"deploy after {number} {LONG}") for number in range(3)]
        assert old.get(f"/api/images/{after[0]}").error == (503, "queue_unavailable")
        assert old.submit(prompt=f"deploy after 0 {LONG}").error == (503, "queue_unavailable")
        old.end()
        for task_id in (*before, *after):
            assert eventually(lambda task_id=task_id: ended(new, task_id), 30.0) == "completed"
    assert len(calls_about(upstream, "deploy")) == 6


def ended(service: Service, task_id: str) -> str | None:
    status = service.task(task_id)["status"]
    return None if status in ("pending", "processing") else str(status)
