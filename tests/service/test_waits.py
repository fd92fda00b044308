"""Timeouts of the contract. All of them start with the module and run concurrently."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from functools import partial

import pytest

from tests.emulator_fixtures import EmulatorProcess
from tests.ports import free_port
from tests.service.conftest import StartService
from tests.service.running import Answer, Service, calls_about, eventually
from tests.service.wire import JSON, connect, head, last_answer

UNREACHED_S = 40.0


@pytest.fixture(scope="module", autouse=True)
def stalled(start_for_module: StartService) -> Iterator[socket.socket]:
    """Send a request with a body that stops halfway."""
    with connect(start_for_module(), 20) as connection:
        connection.sendall(head(JSON, "Content-Length: 100") + b'{"prompt": "a c')
        yield connection


@pytest.fixture(scope="module")
def absent_port() -> int:
    return free_port()


@pytest.fixture(scope="module", autouse=True)
def unreached(
    start_for_module: StartService, tmp_path_factory: pytest.TempPathFactory, absent_port: int
) -> tuple[Service, str]:
    """Start a service without a reachable upstream and a task that waits for it."""
    service = start_for_module(f"http://127.0.0.1:{absent_port}", home=tmp_path_factory.mktemp("unreached"))
    return service, service.accepted(prompt="nobody is there")


def test_tasks_wait_for_an_unreachable_upstream(unreached: tuple[Service, str], absent_port: int) -> None:
    service, task_id = unreached
    waiting = eventually(lambda: seen if (seen := service.task(task_id)).get("reason") == "upstream_overloaded" else {})
    assert (waiting["status"], waiting["attempts"]) == ("pending", 0)
    with EmulatorProcess(port=absent_port) as upstream:
        task = service.completed(task_id, within_s=UNREACHED_S)
        assert (task["attempts"], task.get("possiblyBilledTwice", 0)) == (1, 0)
        assert len(upstream.ledger()["calls"]) == 1


def test_a_task_that_cannot_meet_its_deadline_fails(start_service: StartService, upstream: EmulatorProcess) -> None:
    service: Service = start_service(upstream.url, TASK_DEADLINE="20")
    limited = service.accepted(prompt="late {{fault:429 retry_after=60}}", model="m/late")
    task = service.finished(limited)
    assert task["error"] == {"code": "upstream_rate_limited", "retryable": True}


def not_found(service: Service, path: str) -> Answer | None:
    answer = service.get(path)
    return answer if answer.status == 404 else None


def test_an_expired_task_is_resubmitted_with_a_higher_sequence(
    start_service: StartService, upstream: EmulatorProcess
) -> None:
    service: Service = start_service(upstream.url, RESULT_TTL="6")
    completed = service.made(prompt="short-lived")
    failed = service.finished(service.accepted(prompt="a short-lived failure {{fault:422}}"))
    task_id = completed["taskId"]
    for gone in (task_id, failed["taskId"]):
        path = f"/api/images/{gone}"
        answer = eventually(partial(not_found, service, path))
        assert answer.json == {"success": False, "status": "not_found", "message": "任务不存在或已过期"}
    assert service.get(f"/api/images/{task_id}/0").status == 404
    again = service.submit(prompt="short-lived")
    assert (again.status, again.json["taskId"], again.json["cached"]) == (202, task_id, False)
    assert service.completed(task_id)["sequence"] > again.json["sequence"] > completed["sequence"]
    assert len(calls_about(upstream, "short-lived")) == 3


def test_the_budget_returns_after_the_rate_limit_window(start_service: StartService) -> None:
    service: Service = start_service(IMAGE_RATE_LIMIT_MAX="2", RATE_LIMIT_WINDOW="6000")
    assert [service.submit(prompt=f"{number}").status for number in range(3)] == [202, 202, 429]
    eventually(lambda: service.submit(prompt="again").status == 202)


def test_a_body_that_stalls_for_10_s_is_aborted(stalled: socket.socket) -> None:
    assert last_answer(stalled).error == (408, "body_timeout")
