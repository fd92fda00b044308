"""Budgets and costs from the view of a client."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from tests.emulator_fixtures import EmulatorProcess
from tests.service.conftest import StartService
from tests.service.running import Service, calls_about, eventually

IMAGE_USD = 0.000708
"""Of FLUX.1-schnell at 512 x 512: 0.0027 dollars a megapixel."""


ADMIN_TOKEN = "an-admin-token-of-a-test"


def usd(images: int) -> str:
    return f"{images * IMAGE_USD:.6f}"


StartLimited = Callable[..., Service]


@pytest.fixture
def limited(start_service: StartService, upstream: EmulatorProcess) -> StartLimited:
    """Return a function that starts a service with a budget for some images."""

    def start(images: int, **settings: str) -> Service:
        return start_service(upstream.url, BUDGET_DAILY_USD=usd(images), **settings)

    return start


def cost(estimated: float | None, charged: float | None, saved: float = 0.0) -> dict[str, object]:
    return {"currency": "USD", "estimated": estimated, "charged": charged, "saved": saved}


def test_submits_over_the_budget_are_refused_and_what_is_there_stays_free(limited: StartLimited) -> None:
    service = limited(3)
    assert service.submit(prompt="one").json["cost"] == cost(IMAGE_USD, None)
    assert service.submit(prompt="two", n=2).json["cost"] == cost(round(2 * IMAGE_USD, 6), None)
    refused = service.submit(prompt="three")
    assert refused.error == (402, "budget_exceeded")
    midnight = time.strftime("%Y-%m-%dT00:00:00.000Z", time.gmtime(time.time() + 86_400))
    assert refused.json["resetsAt"] == midnight
    assert midnight in refused.json["message"]
    openai = service.request("POST", "/v1/images/generations", {"prompt": "three", "size": "512x512"})
    assert (openai.status, openai.headers["x-should-retry"]) == (429, "false")
    assert openai.json["error"]["code"] == openai.json["error"]["type"] == "insufficient_quota"
    batch = service.request("POST", "/api/images/batch", {"requests": [{"prompt": "one"}, {"prompt": "three"}]})
    assert [entry["statusCode"] for entry in batch.json["results"]] == [200, 402] or [
        entry["statusCode"] for entry in batch.json["results"]
    ] == [202, 402]
    assert batch.json["results"][1]["resetsAt"] == midnight
    done = service.completed(service.accepted(prompt="two", n=2))
    assert done["cost"] == cost(round(2 * IMAGE_USD, 6), round(2 * IMAGE_USD, 6))
    hit = service.submit(prompt="two", n=2)
    assert (hit.json["cached"], hit.json["cost"]["saved"]) == (True, round(2 * IMAGE_USD, 6))
    part = service.submit(prompt="two", n=1)
    assert (part.status, part.json["cost"]) == (200, cost(0.0, 0.0, IMAGE_USD))
    assert service.submit(prompt="two", n=3).error == (402, "budget_exceeded")


def test_a_key_has_its_own_budget_and_shares_that_of_all(limited: StartLimited) -> None:
    service = limited(3, ADMIN_TOKEN=ADMIN_TOKEN)

    def key(name: str, **limits: object) -> dict[str, str]:
        admin = {"Authorization": f"Bearer {ADMIN_TOKEN}"}
        answer = service.request("POST", "/api/admin/keys", {"name": name, **limits}, headers=admin)
        assert answer.status == 201, answer.body
        return {"Authorization": f"Bearer {answer.json['secret']}"}

    def status(prompt: str, headers: dict[str, str]) -> int:
        return service.request("POST", "/api/images/generate", {"prompt": prompt}, headers=headers).status

    small, large = key("small", dailyUsd=1.5 * IMAGE_USD), key("large", dailyUsd=100 * IMAGE_USD)
    assert [status(f"small {number}", small) for number in range(2)] == [202, 402]
    assert [status(f"large {number}", large) for number in range(3)] == [202, 202, 402]


def test_what_was_certainly_not_paid_is_given_back(limited: StartLimited) -> None:
    service = limited(1)
    failed = service.finished(service.accepted(prompt="refused {{fault:400_policy}}"))
    assert failed["cost"] == cost(IMAGE_USD, 0.0)
    task_id = service.accepted(prompt="next")
    assert service.completed(task_id)["cost"] == cost(IMAGE_USD, IMAGE_USD)
    assert service.submit(prompt="third").status == 402


def test_a_lost_call_is_charged_and_not_repeated_without_budget(
    limited: StartLimited, upstream: EmulatorProcess
) -> None:
    service = limited(1)
    failed = service.finished(service.accepted(prompt="lost {{fault:reset}}"))
    assert failed["error"]["code"] == "upstream_error"
    assert "budget" in failed["message"]
    assert failed["cost"] == cost(IMAGE_USD, IMAGE_USD)
    assert failed["possiblyBilledTwice"] == 1
    assert len(calls_about(upstream, "lost {{fault:reset}}")) == 1


def test_a_lost_call_is_repeated_within_the_budget_and_charged_twice(
    limited: StartLimited, upstream: EmulatorProcess
) -> None:
    service = limited(2)
    failed = service.finished(service.accepted(prompt="lost again {{fault:reset}}"))
    assert failed["cost"] == cost(IMAGE_USD, round(2 * IMAGE_USD, 6))
    assert len(calls_about(upstream, "lost again {{fault:reset}}")) == 2
    assert service.submit(prompt="more").status == 402


def test_missing_images_are_not_requested_again_without_budget(
    limited: StartLimited, upstream: EmulatorProcess
) -> None:
    service = limited(2)
    task = service.made(prompt="fewer {{fault:fewer_images images=1}}", n=2)
    assert len(task["data"]) == 1
    assert any("budget" in warning for warning in task["warnings"])
    assert len(calls_about(upstream, "fewer {{fault:fewer_images images=1}}")) == 1


def test_a_cancelled_task_gives_back_what_it_had_not_sent(limited: StartLimited) -> None:
    service = limited(2, WORKER_CONCURRENCY="1")
    running = service.accepted(prompt="runs {{fault:hang}}")
    service.until(running, "processing")
    waiting = service.accepted(prompt="waits")
    assert service.request("DELETE", f"/api/images/{waiting}").json["cost"] == cost(IMAGE_USD, 0.0)
    assert service.accepted(prompt="takes its place")
    eventually(lambda: service.task(running)["progress"] >= 10)
    assert service.request("DELETE", f"/api/images/{running}").json["cost"] == cost(IMAGE_USD, IMAGE_USD)
    assert service.submit(prompt="more").status == 402


def test_an_unknown_price_is_refused_under_a_budget_and_null_without(
    start_service: StartService, upstream: EmulatorProcess
) -> None:
    service = start_service(upstream.url)
    assert service.made(prompt="a", model="nobody/knows-it")["cost"] is None
    budget = start_service(upstream.url, BUDGET_DAILY_USD="5")
    refused = budget.submit(prompt="b", model="nobody/knows-it")
    assert refused.error == (400, "price_unknown")
    assert "nobody/knows-it" in refused.json["message"]
    assert budget.submit(prompt="a", model="nobody/knows-it").status == 200  # it is there, and costs nothing
    body = {"prompt": "b", "model": "nobody/knows-it"}
    assert budget.request("POST", "/v1/images/generations", body).json["error"]["code"] == "price_unknown"
    priced = start_service(upstream.url, BUDGET_DAILY_USD="5", UNKNOWN_PRICE_USD="0.25")
    assert priced.made(prompt="b", model="nobody/knows-it", n=2)["cost"] == cost(0.5, 0.5)


def test_the_sandbox_costs_nothing_under_a_budget(start_service: StartService) -> None:
    service = start_service(BUDGET_DAILY_USD="0")
    assert service.made(prompt="free", model="nobody/knows-it")["cost"] == cost(0.0, 0.0)
