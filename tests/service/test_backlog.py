"""Waiting tasks and a full backlog from the view of a client."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest

from tests.emulator_fixtures import EmulatorProcess
from tests.service.conftest import StartService
from tests.service.running import Service, at_once, calls_about, eventually, in_flight

HELD = "{{fault:ok held=1}}"


@pytest.fixture(scope="module")
def service(start_for_module: StartService, upstream: EmulatorProcess) -> Service:
    return start_for_module(upstream.url, WORKER_CONCURRENCY="1", MAX_QUEUE="3")


@pytest.fixture
def line(service: Service, upstream: EmulatorProcess, request: pytest.FixtureRequest) -> Iterator[list[str]]:
    """Submit one task that runs until the upstream releases it, and three that wait; return their ids."""
    name = request.node.name
    ids = [service.accepted(prompt=f"{name} 0 {HELD}")]
    eventually(lambda: in_flight(upstream, f"{name} 0"))
    ids += [service.accepted(prompt=f"{name} {number} {HELD}") for number in (1, 2, 3)]
    yield ids
    complete(service, upstream, ids)


def complete(service: Service, upstream: EmulatorProcess, ids: list[str]) -> None:
    """Let the upstream answer until all tasks are completed."""

    def are_completed() -> bool:
        upstream.release()
        return all(service.task(task_id)["status"] == "completed" for task_id in ids)

    eventually(are_completed)


def test_a_pending_task(service: Service, line: list[str]) -> None:
    answer = service.get(f"/api/images/{line[3]}")
    seen = answer.json
    assert (seen["success"], seen["status"], seen["progress"]) == (True, "pending", 0)
    assert seen["message"] == "任务pending中 (0%)"
    assert (seen["reason"], seen["retryAt"], seen["attempts"]) == ("queued", None, 0)
    assert (seen["startedAt"], seen["finishedAt"]) == (None, None)
    assert seen["etaSeconds"] is None or seen["etaSeconds"] > 0
    assert int(answer.headers["Retry-After"]) >= 1
    assert "data" not in seen


def test_the_place_in_the_queue_is_exact(service: Service, upstream: EmulatorProcess, line: list[str]) -> None:
    assert [service.task(task_id)["queuePosition"] for task_id in line[1:]] == [1, 2, 3]
    for number in (1, 2):
        upstream.release()
        eventually(partial(in_flight, upstream, f"test_the_place_in_the_queue_is_exact {number}"))
        assert [service.task(task_id)["queuePosition"] for task_id in line[number + 1 :]] == [1, 2, 3][: 3 - number]


def test_a_full_backlog_refuses_new_tasks_and_joins_existing_ones(
    service: Service, upstream: EmulatorProcess, line: list[str]
) -> None:
    refused = service.submit(prompt="one too many")
    assert refused.error == (503, "queue_full")
    assert int(refused.headers["Retry-After"]) >= 1
    assert refused.json["retryable"] is True
    joined = service.submit(prompt=f"test_a_full_backlog_refuses_new_tasks_and_joins_existing_ones 2 {HELD}")
    assert (joined.status, joined.json["taskId"], joined.json["coalesced"]) == (202, line[2], True)
    complete(service, upstream, line)
    assert service.submit(prompt="one too many").status == 202


def test_concurrent_submits_never_exceed_the_queue_limit(service: Service, upstream: EmulatorProcess) -> None:
    running = service.accepted(prompt=f"before the crowd {HELD}")
    eventually(lambda: in_flight(upstream, "before the crowd"))
    crowd = at_once([partial(service.submit, prompt=f"crowd {number}") for number in range(30)])
    taken = [answer.json["taskId"] for answer in crowd if answer.status == 202]
    assert [answer.error for answer in crowd if answer.status != 202] == [(503, "queue_full")] * (30 - len(taken))
    assert service.task(running)["status"] == "processing"
    assert len(taken) == 3
    upstream.release()
    for task_id in taken:
        service.completed(task_id)


def test_concurrent_calls_never_exceed_the_slots(service: Service, upstream: EmulatorProcess) -> None:
    service.made(prompt="the last one")
    assert upstream.ledger()["peak_in_flight"] == 1
    assert len(calls_about(upstream, "the last one")) == 1


def test_health_costs_no_upstream_call(service: Service, upstream: EmulatorProcess) -> None:
    before = upstream.ledger()["total"]
    assert [service.get(path).status for path in ("/healthz", "/readyz", "/api/health")] == [200, 200, 200]
    assert upstream.ledger()["total"] == before
