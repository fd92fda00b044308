"""Values in Redis captured from the version before: a deploy reads them, loses no task and pays nothing twice."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from tests.emulator_fixtures import EmulatorProcess
from tests.ports import free_port
from tests.service.conftest import StartService
from tests.service.running import Service, calls_about, redis_server

CAPTURED = Path(__file__).parent.parent / "data" / "stored_by_0_1.json"
CAPTURED_AT_S = 1_795_891_541
OWNER = "old-instance"
_TIMESTAMP = re.compile(r"(?<![0-9a-f])17958\d{5}(?=\d{0,6}(?![0-9a-f]))")


def captured() -> tuple[dict[str, str], dict[str, Any]]:
    """Return the task ids by prompt, and the keys. All times are moved to now, since tasks have deadlines."""
    offset_s = int(time.time()) - CAPTURED_AT_S - 5
    text = _TIMESTAMP.sub(lambda match: str(int(match[0]) + offset_s), CAPTURED.read_text())
    values = json.loads(text)
    return values["tasks"], values["keys"]


def load(client: redis.Redis, keys: dict[str, Any]) -> None:
    """Write the captured keys. The old instance owns its running tasks."""
    for name, key in keys.items():
        full_name, value = f"{{imagegen}}:{name}", key["value"]
        match key["type"]:
            case "string":
                client.set(full_name, value.encode("latin-1"))
            case "zset":
                client.zadd(full_name, {member: score + 1e6 for member, score in value})
            case "stream":
                for entry_id, fields in value:
                    client.xadd(full_name, {field: text.encode("latin-1") for field, text in fields.items()}, entry_id)
                client.xgroup_create(full_name, "pool", "0")
                running = [name.removeprefix("run:") for name in keys if name.startswith("run:")]
                count = sum(any(task_id in fields["d"] for task_id in running) for _, fields in value)
                client.xreadgroup("pool", OWNER, {full_name: ">"}, count=count)
        if key["ttl_ms"] > 0:
            client.pexpire(full_name, key["ttl_ms"])


@pytest.fixture(scope="module")
def deployed(
    tmp_path_factory: pytest.TempPathFactory, start_for_module: StartService, upstream: EmulatorProcess
) -> Iterator[tuple[Service, dict[str, str]]]:
    port = free_port()
    with redis_server(tmp_path_factory.mktemp("redis"), port), redis.Redis(port=port) as client:
        ids, keys = captured()
        load(client, keys)
        settings = {"REDIS_URL": f"redis://127.0.0.1:{port}", "LEASE_SECONDS": "2"}
        yield start_for_module(upstream.url, **settings), ids


def test_a_finished_task_of_the_version_before_is_shown(deployed: tuple[Service, dict[str, str]]) -> None:
    service, ids = deployed
    completed = service.task(ids["completed \u4e00 task"])
    assert (completed["status"], len(completed["data"]), completed["attempts"]) == ("completed", 2, 1)
    assert [image["seed"] for image in completed["data"]] == [7, 7]
    assert completed["data"][0]["sha256"].startswith("ccec7bb5977a")
    failed = service.task(ids["refused task"])
    assert (failed["status"], failed["error"]["code"]) == ("failed", "upstream_invalid_request")
    assert service.task(ids["cancelled task"])["status"] == "cancelled"


def test_an_idempotency_key_of_the_version_before_is_recognised(deployed: tuple[Service, dict[str, str]]) -> None:
    service, ids = deployed
    answer = service.request(
        "POST", "/api/images/generate", {"prompt": "refused task"}, headers={"Idempotency-Key": "one-key"}
    )
    assert answer.json["taskId"] == ids["refused task"]


@pytest.mark.parametrize("prompt", ["waiting task", "waiting with webhook"])
def test_a_waiting_task_of_the_version_before_runs_once(
    deployed: tuple[Service, dict[str, str]], upstream: EmulatorProcess, prompt: str
) -> None:
    service, ids = deployed
    assert service.completed(ids[prompt])["attempts"] == 1
    assert [call["n"] for call in calls_about(upstream, prompt)] == [3 if prompt == "waiting task" else 1]


@pytest.mark.parametrize("prompt", ["held task 0", "held task 1", "held task 2"])
def test_a_running_call_of_the_version_before_is_repeated_once(
    deployed: tuple[Service, dict[str, str]], prompt: str
) -> None:
    service, ids = deployed
    task = service.completed(ids[prompt])
    assert (task["attempts"], task["possiblyBilledTwice"]) == (2, 1)


def test_a_waiting_retry_continues_the_count_of_the_version_before(deployed: tuple[Service, dict[str, str]]) -> None:
    service, ids = deployed
    lost, busy = service.completed(ids["lost answer task"]), service.completed(ids["busy task"])
    assert (lost["attempts"], lost["possiblyBilledTwice"]) == (2, 1)
    assert (busy["attempts"], busy.get("possiblyBilledTwice", 0)) == (2, 0)
