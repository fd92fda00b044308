"""Rate limits from the view of a client."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from functools import partial

import pytest

from tests.service.conftest import StartService
from tests.service.running import Answer, Service, at_once, eventually

MESSAGE = "请求频率过高，请稍后再试"
WINDOW_S = 60

_clients = itertools.count(1)


@pytest.fixture(scope="module")
def service(start_for_module: StartService) -> Service:
    window_ms = str(WINDOW_S * 1000)
    limits = {"RATE_LIMIT_MAX": "6", "IMAGE_RATE_LIMIT_MAX": "3", "RATE_LIMIT_WINDOW": window_ms}
    return start_for_module(TRUSTED_PROXY_HOPS="1", **limits)


class Client:
    """Client with one address behind the proxy."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._address = f"203.0.113.{next(_clients)}"

    def submit(self, prompt: str, forged: str = "") -> Answer:
        return self._service.request("POST", "/api/images/generate", {"prompt": prompt}, headers=self._headers(forged))

    def get(self, path: str, forged: str = "") -> Answer:
        return self._service.request("GET", path, headers=self._headers(forged))

    def _headers(self, forged: str) -> dict[str, str]:
        return {"X-Forwarded-For": f"{forged}, {self._address}" if forged else self._address}


@pytest.fixture
def client(service: Service) -> Client:
    return Client(service)


def check_refusal(answer: Answer) -> None:
    assert answer.error == (429, "rate_limited")
    assert (answer.json["message"], answer.json["retryable"]) == (MESSAGE, True)
    assert 1 <= int(answer.headers["Retry-After"]) <= WINDOW_S
    assert answer.headers["X-RateLimit-Remaining"] == "0"


def test_generations_over_the_limit_of_one_client_are_refused(service: Service, client: Client) -> None:
    taken = [client.submit(f"limited {number}") for number in range(3)]
    assert [answer.status for answer in taken] == [202] * 3
    refused = client.submit("limited 3")
    check_refusal(refused)
    assert refused.headers["X-RateLimit-Limit"] == "3"
    assert Client(service).submit("limited 3").status == 202
    assert client.get(f"/api/images/{taken[0].json['taskId']}").status == 200


def test_every_limited_response_states_the_budget(client: Client) -> None:
    first, second = client.submit("budget 1"), client.submit("budget 2")
    policies = [f'"{name};w={WINDOW_S}' for name in ('general";q=6', 'generation";q=3', 'units";q=192')]
    assert first.headers["RateLimit-Policy"] == ", ".join(policies)
    assert re.fullmatch(r'"general";r=5;t=\d+, "generation";r=2;t=\d+, "units";r=191;t=\d+', first.headers["RateLimit"])
    budgets = [
        (answer.headers["X-RateLimit-Limit"], answer.headers["X-RateLimit-Remaining"]) for answer in (first, second)
    ]
    assert budgets == [("3", "2"), ("3", "1")]
    assert 0 < int(first.headers["X-RateLimit-Reset"]) <= WINDOW_S


def test_all_routes_and_ids_share_one_budget(client: Client) -> None:
    reads = [client.get(f"/api/images/{number:032x}") for number in range(7)]
    assert [answer.status for answer in reads] == [404] * 6 + [429]
    check_refusal(reads[-1])
    check_refusal(client.submit("after many reads"))


@pytest.mark.parametrize("forge", [True, False])
def test_concurrent_requests_get_no_more_than_the_limit(client: Client, forge: bool) -> None:
    asks: list[Callable[[], Answer]] = [
        partial(client.submit, f"crowd {forge} {number}", f"198.51.100.{number}" if forge else "")
        for number in range(20)
    ]
    answers = at_once(asks)
    assert sorted(answer.status for answer in answers) == [202] * 3 + [429] * 17


def test_images_and_health_do_not_count(service: Service, client: Client) -> None:
    task_id = client.submit("a picture").json["taskId"]
    picture = eventually(lambda: seen if (seen := client.get(f"/api/images/{task_id}/0")).status == 200 else None)
    assert "RateLimit" not in picture.headers
    for path in ("/api/health", "/healthz", "/readyz", f"/api/images/{task_id}/0"):
        assert [client.get(path).status for _ in range(8)] == [200] * 8


def test_a_refused_request_spends_nothing(client: Client) -> None:
    for number in range(3):
        client.submit(f"spent {number}")
    for _ in range(5):
        check_refusal(client.submit("spent 3"))
    assert client.get(f"/api/images/{'0' * 32}").headers["X-RateLimit-Remaining"] == "2"


def test_forwarding_headers_are_ignored_without_a_proxy(start_service: StartService) -> None:
    service: Service = start_service(RATE_LIMIT_MAX="2")
    forged = [{"X-Forwarded-For": f"203.0.113.{number}", "Forwarded": f"for=203.0.113.{number}"} for number in range(3)]
    answers = [service.request("GET", f"/api/images/{'0' * 32}", headers=headers) for headers in forged]
    assert [answer.status for answer in answers] == [404, 404, 429]
