"""A deploy: an old and a new version share one queue, and leave entries alone that they can't read."""

from __future__ import annotations

import io
import os
from functools import partial
from pathlib import Path

from PIL import Image

from tests.emulator_fixtures import EmulatorProcess
from tests.ports import free_port
from tests.service.conftest import StartService
from tests.service.running import Service, calls_about, eventually, redis_server

NEWER = Path(__file__).with_name("newer.py")
OLDER = Path(os.environ.get("OLDER_VERSION", Path(__file__).with_name("older.py")))
"""Program of the first schema version; OLDER_VERSION may name the `run.py` of a checkout of 0.2.0 or before."""

LONG = "{{fault:ok delay_s=1.5}}"


def test_a_deploy_loses_no_task_and_pays_each_once(
    start_service: StartService, upstream: EmulatorProcess, tmp_path: Path
) -> None:
    port = free_port()
    with redis_server(tmp_path, port):
        shared = {"REDIS_URL": f"redis://127.0.0.1:{port}", "WORKER_CONCURRENCY": "1", "LEASE_SECONDS": "4"}
        old: Service = start_service(upstream.url, **shared)
        before = [old.accepted(prompt=f"deploy before {number} {LONG}") for number in range(3)]
        new: Service = start_service(upstream.url, program=NEWER, **shared)
        after = [new.accepted(prompt=f"deploy after {number} {LONG}") for number in range(3)]
        assert old.get(f"/api/images/{after[0]}").error == (503, "queue_unavailable")
        assert old.submit(prompt=f"deploy after 0 {LONG}").error == (503, "queue_unavailable")
        old.end()
        for task_id in (*before, *after):
            assert eventually(partial(ended, new, task_id), 30.0) == "completed"
    assert len(calls_about(upstream, "deploy")) == 6


NEW_FIELDS: list[dict[str, object]] = [
    {"quality": "high"},
    {"extra": {"x_style": 1}},
    {"variant": 2},
    {"n": 9},
    {"aspectRatio": "16:9"},
    {"imageLoras": [{"path": "https://example.org/lora", "scale": 0.5}]},
]


def test_an_older_instance_leaves_tasks_with_new_fields_to_a_newer_one(
    start_service: StartService, upstream: EmulatorProcess, tmp_path: Path
) -> None:
    port = free_port()
    with redis_server(tmp_path, port):
        shared = {"REDIS_URL": f"redis://127.0.0.1:{port}", "IMAGE_STORE": "redis", "LEASE_SECONDS": "4"}
        old: Service = start_service(upstream.url, program=OLDER, **shared)
        new: Service = start_service(upstream.url, **shared)
        task_ids = [new.accepted(prompt=f"newer {number} {LONG}", **new_fields(new, number)) for number in range(8)]
        seen = old.get(f"/api/images/{task_ids[0]}")
        assert seen.status == 200 or seen.error == (503, "queue_unavailable")
        plain = [new.accepted(prompt=f"plain {number}") for number in range(8)]
        for task_id in plain:
            assert eventually(partial(ended, old, task_id), 30.0) == "completed"
        for task_id in task_ids:
            assert eventually(partial(ended, new, task_id), 60.0) == "completed", new.task(task_id)
            assert "warnings" not in new.task(task_id)
            assert old.task(task_id)["status"] == "completed"
        old.end()
        new.end()
    sent = calls_about(upstream, "newer")
    assert {call["prompt"] for call in sent} == {f"newer {number} {LONG}" for number in range(8)}
    assert sum(call["n"] for call in sent) == 5 + 9 + 1 + 2 + 1
    assert [call["body"].get("x_style") for call in sent if call["prompt"].startswith("newer 1 ")] == [1]
    assert [call["n"] for call in sent if call["prompt"].startswith("newer 7 ")] == [2, 1]


def new_fields(service: Service, number: int) -> dict[str, object]:
    """Return fields that an older instance does not have, an upload, or those of a request to top up."""
    if number < len(NEW_FIELDS):
        return NEW_FIELDS[number]
    if number == len(NEW_FIELDS):
        file = io.BytesIO()
        Image.new("RGB", (64, 64), "teal").save(file, "PNG")
        answer = service.request("POST", "/api/uploads", file.getvalue(), headers={"Content-Type": "image/png"})
        return {"imageUrl": answer.json["uploadId"], "model": "black-forest-labs/FLUX.1-kontext-pro"}
    service.made(prompt=f"newer {number} {LONG}", n=2)
    return {"n": 3}


def ended(service: Service, task_id: str) -> str | None:
    status = service.task(task_id)["status"]
    return None if status in ("pending", "processing") else str(status)
