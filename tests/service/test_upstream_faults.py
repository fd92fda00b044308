"""The outcome of a task for each response of the upstream: state, code and number of calls."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest

from tests.emulator_fixtures import EmulatorProcess
from tests.service.conftest import StartService
from tests.service.running import KEY, Service, at_once, calls_about, eventually

ATTEMPTS = 3


@dataclass(frozen=True)
class ExpectedOutcome:
    """Error code, number of upstream calls, part of the message and retryability of a failed task."""

    code: str
    calls: int
    message: str = ""
    retryable: bool = False


def refused(code: str, message: str = "") -> ExpectedOutcome:
    return ExpectedOutcome(code, 1, message)


AGAIN: dict[str, Any] = {"calls": ATTEMPTS, "retryable": True}
BAD = ExpectedOutcome("upstream_bad_response", 2)
LOST: dict[str, Any] = {"calls": 2, "retryable": True}
"""The second call that was sent and got no response ends the task."""

EXPECTED = {
    "400_multiple": refused("upstream_invalid_request", "height must be a multiple of 16"),
    "400_size": refused("upstream_invalid_request", "width must be between 64 and 1792"),
    "400_steps": refused("upstream_invalid_request", "steps must be between 1 and 4"),
    "400_not_image": refused("model_not_available", "Model is not supported for image generation"),
    "400_non_serverless": refused("model_not_available", "Unable to access non-serverless model"),
    "400_policy": refused("content_policy"),
    "401": refused("upstream_auth", "operator"),
    "402": refused("upstream_billing", "Credit limit exceeded"),
    "429_quota": refused("upstream_billing", "operator"),
    "400_billing": refused("upstream_billing", "Billing hard limit has been reached"),
    "400_azure_policy": refused("content_policy", "content management policy"),
    "403": refused("upstream_auth"),
    "404_model": refused("model_not_available", "Unable to access model"),
    "404_path": refused("upstream_invalid_request"),
    "413": refused("upstream_invalid_request", "Request entity too large"),
    "413_text": refused("upstream_invalid_request"),
    "415": refused("upstream_invalid_request"),
    "422_nsfw": refused("content_policy", "image may contain NSFW content"),
    "422_policy": refused("content_policy"),
    "long_error": refused("upstream_invalid_request", "very long"),
    "408": ExpectedOutcome("upstream_error", **LOST),
    "425": ExpectedOutcome("upstream_error", **AGAIN),
    "500": ExpectedOutcome("upstream_error", message="Internal server error", **AGAIN),
    "500_null": ExpectedOutcome("upstream_error", message="Internal Server Error", **AGAIN),
    "502": ExpectedOutcome("upstream_error", **LOST),
    "503": ExpectedOutcome("upstream_overloaded", message="overloaded", **AGAIN),
    "504": ExpectedOutcome("upstream_error", **LOST),
    "520": ExpectedOutcome("upstream_error", **LOST),
    "522": ExpectedOutcome("upstream_error", **LOST),
    "499": ExpectedOutcome("upstream_error", **LOST),
    "598": ExpectedOutcome("upstream_error", **LOST),
    "524": ExpectedOutcome("upstream_error", **LOST),
    "529": ExpectedOutcome("upstream_overloaded", **AGAIN),
    "error_in_200": ExpectedOutcome("upstream_error", **AGAIN),
    "hang": ExpectedOutcome("upstream_timeout", **LOST),
    "trickle interval_s=0.05": ExpectedOutcome("upstream_timeout", **LOST),
    "reset": ExpectedOutcome("upstream_error", **LOST),
    "close": ExpectedOutcome("upstream_error", **LOST),
    "reset_mid_answer": ExpectedOutcome("upstream_error", **LOST),
    "truncated": ExpectedOutcome("upstream_error", **LOST),
    "empty": BAD,
    "not_json": BAD,
    "broken_json": BAD,
    "wrong_shape": BAD,
    "wrong_root": BAD,
    "no_images": BAD,
    "redirect": refused("upstream_bad_response"),
    "fewer_images images=0": BAD,
}


@pytest.fixture(scope="module")
def service(start_for_module: StartService, upstream: EmulatorProcess) -> Service:
    return start_for_module(upstream.url, WORKER_CONCURRENCY="60", UPSTREAM_TIMEOUT="5", MAX_ATTEMPTS=str(ATTEMPTS))


@pytest.fixture(scope="module")
def usual(start_for_module: StartService, upstream: EmulatorProcess) -> Service:
    """Start a service with the usual times and attempts, which takes what a model may refuse."""
    return start_for_module(upstream.url, MODEL_RULES="off", REDIS_PREFIX="usual")


@pytest.fixture(scope="module")
def task_ids(service: Service) -> dict[str, str]:
    """Ids of concurrent tasks by fault, each with another model, so that no failure affects another."""
    bodies = [{"prompt": f"expected {{{{fault:{fault}}}}}", "model": f"m/{fault}"} for fault in EXPECTED]
    ids = at_once([partial(service.accepted, **body) for body in bodies])
    return dict(zip(EXPECTED, ids, strict=True))


@pytest.mark.parametrize("fault", EXPECTED)
def test_an_upstream_fault_has_its_state_code_and_number_of_calls(
    service: Service, upstream: EmulatorProcess, task_ids: dict[str, str], fault: str
) -> None:
    expected, task = EXPECTED[fault], service.finished(task_ids[fault])
    assert (task["success"], task["status"]) == (True, "failed")
    assert (task["error"]["code"], task["error"]["retryable"]) == (expected.code, expected.retryable)
    assert task["message"].startswith("图像生成失败：")
    detail = task["message"].removeprefix("图像生成失败：")
    assert expected.message in detail
    assert 0 < len(detail) <= 300
    assert detail.isprintable()
    assert "<" not in detail
    assert len(calls_about(upstream, f"expected {{{{fault:{fault}}}}}")) == expected.calls


@pytest.mark.parametrize(
    "fault", [name for name, expected in EXPECTED.items() if expected.calls == 2 and expected.retryable]
)
def test_a_possible_payment_without_an_image_is_reported(
    service: Service, task_ids: dict[str, str], fault: str
) -> None:
    assert service.finished(task_ids[fault])["possiblyBilledTwice"] == 2


def test_the_service_continues_after_all_faults(service: Service, task_ids: dict[str, str]) -> None:
    for task_id in task_ids.values():
        service.finished(task_id)
    assert service.made(prompt="after all of them", n=4)["attempts"] == 1
    assert service.get("/readyz").status == 200


def test_no_key_is_shown(service: Service) -> None:
    task_id = service.accepted(prompt=f'{{{{fault:400 body=\'{{"error":{{"message":"key {KEY} is bad"}}}}\'}}}}')
    assert KEY not in str(service.finished(task_id))
    assert KEY not in service.log


PASSING = {
    "500 times=2": 3,
    "503 times=1": 2,
    "hang times=1": 2,
    "reset times=1": 2,
    "reset_before_read times=1": 2,
    "no_images times=1": 2,
    "not_json times=1": 2,
    "flapping": 2,
}


@pytest.fixture(scope="module")
def passing(service: Service) -> dict[str, str]:
    bodies = [{"prompt": f"passing {{{{fault:{fault}}}}}", "model": f"m/passing {fault}"} for fault in PASSING]
    ids = at_once([partial(service.accepted, **body) for body in bodies])
    return dict(zip(PASSING, ids, strict=True))


@pytest.mark.parametrize("fault", PASSING)
def test_a_transient_fault_is_survived(
    service: Service, upstream: EmulatorProcess, passing: dict[str, str], fault: str
) -> None:
    task = service.completed(passing[fault])
    assert len(calls_about(upstream, f"passing {{{{fault:{fault}}}}}")) == PASSING[fault]
    maybe_paid = fault.split(maxsplit=1)[0] in ("hang", "reset", "reset_before_read", "no_images", "not_json")
    assert task.get("possiblyBilledTwice", 0) == int(maybe_paid)


LIMITS = ["429_model", "429_credit", "429_dynamic", "429_retry_after retry_after=0.3", "429 reset=0.3"]


def test_waiting_for_a_rate_limit_counts_no_attempt(start_service: StartService, upstream: EmulatorProcess) -> None:
    service = start_service(upstream.url, MAX_ATTEMPTS="1")
    bodies = [{"prompt": f"limited {{{{fault:{row} times=1}}}}", "model": f"m/{row}"} for row in LIMITS]
    tasks = [service.completed(task_id) for task_id in [service.accepted(**body) for body in bodies]]
    assert [(task["attempts"], task.get("possiblyBilledTwice", 0)) for task in tasks] == [(1, 0)] * len(LIMITS)
    assert len(calls_about(upstream, "limited")) == 2 * len(LIMITS)


def test_a_task_shows_that_it_waits_for_a_rate_limit(service: Service) -> None:
    task_id = service.accepted(prompt="says so {{fault:429 retry_after=5 times=1}}", model="m/says-so")
    task = eventually(lambda: seen if (seen := service.task(task_id)).get("reason") == "upstream_rate_limited" else {})
    assert (task["status"], task["progress"]) == ("pending", 0)
    assert task["message"] == "任务pending中 (0%)"
    assert task["createdAt"] < task["retryAt"]
    completed = service.completed(task_id)
    assert completed["finishedAt"] >= task["retryAt"][:19]


def test_a_task_shows_that_it_waits_for_a_retry(service: Service) -> None:
    submitted = service.submit(prompt="again {{fault:500 retry_after=5 times=1}}", model="m/again").json
    task_id = submitted["taskId"]
    waiting = eventually(lambda: seen if (seen := service.task(task_id)).get("reason") == "retrying" else {})
    assert (waiting["status"], waiting["attempts"]) == ("pending", 1)
    assert waiting["retryAt"]
    completed = service.completed(task_id)
    assert completed["attempts"] == 2
    assert submitted["sequence"] < waiting["sequence"] < completed["sequence"]


def test_a_parameter_that_the_model_refuses_is_left_out_once_with_a_warning(
    usual: Service, upstream: EmulatorProcess
) -> None:
    task = usual.made(prompt="without steps", steps=20, model="Qwen/Qwen-Image-2.0")
    assert len(task["warnings"]) == 1
    assert "steps" in task["warnings"][0]
    assert task["attempts"] == 1
    assert [call["body"].get("steps") for call in calls_about(upstream, "without steps")] == [20, None]


def test_each_parameter_that_the_model_refuses_is_left_out(usual: Service, upstream: EmulatorProcess) -> None:
    order = {"steps": 20, "guidanceScale": 3, "model": "Qwen/Qwen-Image-2.0", "extra": {"x_style": 1}}
    task = usual.made(prompt="two refused", **order)
    assert [warning.split()[0] for warning in task["warnings"]] == ["guidance_scale", "steps"]
    bodies = [call["body"] for call in calls_about(upstream, "two refused")]
    assert ["steps" in body for body in bodies] == [True, True, False]
    assert all(body["x_style"] == 1 for body in bodies)


def test_a_model_with_one_image_a_call_gets_one_call_each(service: Service, upstream: EmulatorProcess) -> None:
    task = service.made(prompt="one image a call {{fault:400_n times=1}}", n=3, seed=5, model="m/one-image")
    assert [entry["index"] for entry in task["data"]] == [0, 1, 2]
    assert "warnings" not in task
    assert [call["n"] for call in calls_about(upstream, "one image a call")] == [3, 1, 1, 1]


def test_a_refused_key_is_one_warning_for_the_operator(start_service: StartService, upstream: EmulatorProcess) -> None:
    service: Service = start_service(upstream.url)
    tasks = [service.finished(service.accepted(prompt=f"key {i} {{{{fault:401}}}}")) for i in range(3)]
    assert all("operator" in task["message"] and "find your API key" not in task["message"] for task in tasks)
    warnings = [line for line in service.log.splitlines() if "WARNING" in line and "TOGETHER_API_KEY" in line]
    assert len(warnings) == 1
    assert "find your API key" in warnings[0]


@pytest.mark.parametrize("fault", ["500", "502", "reset"])
def test_tasks_that_always_fail_end_and_do_not_stop_the_others(
    start_service: StartService, upstream: EmulatorProcess, fault: str
) -> None:
    service: Service = start_service(upstream.url, RETRY_BASE_SECONDS="0.5")
    bad = [service.accepted(prompt=f"always {i} {fault} {{{{fault:{fault}}}}}") for i in range(8)]
    good = [service.accepted(prompt=f"beside {i} {fault}") for i in range(20)]
    for task_id in good:
        service.completed(task_id, within_s=30.0)
    calls = 3 if fault == "500" else 2
    assert {service.finished(task_id)["attempts"] for task_id in bad} == {calls}
    made = len(calls_about(upstream, f"{fault} {{{{fault:{fault}}}}}"))
    excused = 8 if fault == "500" else 0  # failures while the model is taken for dead, of a slow machine
    assert 8 * calls <= made <= 8 * calls + excused


def test_tasks_of_a_paused_model_do_not_delay_others(usual: Service, upstream: EmulatorProcess) -> None:
    first = usual.accepted(prompt="rests {{fault:429_retry_after retry_after=60}}", model="m/rests")
    eventually(lambda: usual.task(first).get("reason") == "upstream_rate_limited")
    resting = [usual.accepted(prompt=f"behind it {i}", model="m/rests") for i in range(30)]
    assert usual.completed(usual.accepted(prompt="another model", model="m/works"), within_s=30.0)
    assert {usual.task(task_id)["reason"] for task_id in resting} == {"upstream_rate_limited"}
    assert calls_about(upstream, "behind it") == []


def test_missing_images_are_requested_once_more(service: Service, upstream: EmulatorProcess) -> None:
    task = service.made(prompt="two of four {{fault:fewer_images images=2 times=1}}", n=4, seed=5, model="m/fewer")
    assert [entry["index"] for entry in task["data"]] == [0, 1, 2, 3]
    assert "warnings" not in task
    first, second = calls_about(upstream, "two of four")
    assert (first["n"], second["n"]) == (4, 2)
    assert second["seed"] not in range(first["seed"], first["seed"] + 4)
    assert len({entry["sha256"] for entry in task["data"]}) == 4


def test_a_task_with_missing_images_completes_with_a_warning(service: Service, upstream: EmulatorProcess) -> None:
    task = service.made(prompt="one a call {{fault:fewer_images images=1}}", n=4, model="m/one-a-call")
    assert (len(task["data"]), len(task["warnings"])) == (2, 1)
    assert len(calls_about(upstream, "one a call")) == 2


@pytest.mark.parametrize("fault", ["huge_body bytes=60000000", "gzip_bomb", "long_error"])
def test_an_oversized_response_is_not_read_to_its_end(usual: Service, fault: str) -> None:
    task = usual.finished(usual.accepted(prompt=f"too much {{{{fault:{fault}}}}}", model=f"m/{fault[:8]}"))
    code = "upstream_invalid_request" if fault == "long_error" else "upstream_bad_response"
    assert task["error"] == {"code": code, "retryable": False}
    assert usual.made(prompt=f"after {fault}", model=f"m/{fault[:8]}")["status"] == "completed"
