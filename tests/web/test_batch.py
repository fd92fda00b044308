"""Tests of batches: each entry gets a separate result, in order."""

from __future__ import annotations

from typing import Any

from imagegen.web.handler_services import SERVICES
from tests.emulator_fixtures import EmulatedUpstream
from tests.support import over_rows
from tests.web.conftest import Client, StartService

SMALL = {"width": 64, "height": 64}


async def batch(client: Client, *entries: object, **headers: str) -> list[dict[str, Any]]:
    answer = await client.post("/api/images/batch", json={"requests": list(entries)}, headers=headers)
    body = await answer.json()
    assert answer.status == 200, body
    assert body["success"] is True
    assert len(body["results"]) == len(entries)
    return list(body["results"])


def request_body(prompt: str, **fields: object) -> dict[str, object]:
    return {"prompt": prompt, **SMALL, **fields}


async def test_each_entry_is_answered_in_order(start_paid: StartService, upstream: EmulatedUpstream) -> None:
    upstream.script({"fault": "ok", "held": 1, "times": 2})
    service = await start_paid()
    first, second = await batch(service, request_body("a"), request_body("b"))
    single = await (await service.post("/api/images/generate", json=request_body("a"))).json()
    assert first["taskId"] == single["taskId"] != second["taskId"]
    assert [entry["statusCode"] for entry in (first, second)] == [202, 202]
    assert first.keys() - {"statusCode"} == single.keys() - {"coalesced"}
    assert (first["success"], first["cached"]) == (True, False)
    await upstream.ledger.wait_for(lambda ledger: ledger.in_flight == 2)
    upstream.release()
    for entry in (first, second):
        done = await (await service.get(f"/api/images/{entry['taskId']}?wait=10")).json()
        assert done["status"] == "completed"
    hit, _ = await batch(service, request_body("a"), request_body("c"))
    assert (hit["statusCode"], hit["cached"]) == (200, True)


async def test_one_bad_entry_spoils_no_other(service: Client) -> None:
    results = await batch(
        service, request_body("a"), {"prompt": "", "width": 7, "stps": 4}, "x", None, request_body("b")
    )
    assert [entry["statusCode"] for entry in results] == [202, 400, 400, 400, 202]
    bad = results[1]
    assert (bad["success"], bad["code"], bad["retryable"]) == (False, "invalid_request", False)
    assert {fault["field"] for fault in bad["details"]} == {
        "requests[1].prompt",
        "requests[1].width",
        "requests[1].stps",
    }
    assert [fault["field"] for fault in results[2]["details"]] == ["requests[2]"]
    assert results[1]["requestId"]


async def test_the_same_request_twice_is_one_task(start_paid: StartService, upstream: EmulatedUpstream) -> None:
    service = await start_paid()
    results = await batch(service, *[request_body("a")] * 10)
    assert len({entry["taskId"] for entry in results}) == 1
    assert sum("coalesced" in entry for entry in results) == 9
    await service.get(f"/api/images/{results[0]['taskId']}?wait=10")
    assert upstream.ledger.total == 1


@over_rows(
    ("body", "field"),
    [
        ({}, "requests"),
        ({"requests": []}, "requests"),
        ({"requests": {}}, "requests"),
        ({"requests": None}, "requests"),
        ({"requests": [request_body("a")] * 51}, "requests"),
        ({"requests": [request_body("a")], "request": []}, "request"),
    ],
)
async def test_a_batch_is_a_list_of_1_to_50(service: Client, body: object, field: str) -> None:
    answer = await service.post("/api/images/batch", json=body)
    refused = await answer.json()
    assert (answer.status, refused["code"]) == (400, "invalid_request")
    assert [fault["field"] for fault in refused["details"]] == [field]


async def test_50_entries_are_fine(service: Client) -> None:
    results = await batch(service, *(request_body("a", seed=seed) for seed in range(50)))
    assert {entry["statusCode"] for entry in results} == {202}
    assert len({entry["taskId"] for entry in results}) == 50


async def test_entries_over_the_generation_limit_get_their_own_429(start_service: StartService) -> None:
    service = await start_service(rate_limit_max=10, image_rate_limit_max=3)
    results = await batch(service, *map(request_body, "abcde"))
    assert [entry["statusCode"] for entry in results] == [202, 202, 202, 429, 429]
    late = results[-1]
    assert (late["code"], late["retryable"], late["message"]) == ("rate_limited", True, "请求频率过高，请稍后再试")
    assert 1 <= late["retryAfterSeconds"] <= 60
    assert (await service.post("/api/images/generate", json=request_body("f"))).status == 429
    assert {entry["statusCode"] for entry in await batch(service, request_body("g"))} == {429}


async def test_a_batch_counts_once_for_the_general_limit(start_service: StartService) -> None:
    service = await start_service(rate_limit_max=2)
    for _ in range(2):
        await batch(service, *map(request_body, "abcde"))
    assert (await service.post("/api/images/batch", json={"requests": [request_body("a")]})).status == 429


async def test_only_entries_that_exceed_the_queue_are_rejected(start_service: StartService) -> None:
    service = await start_service(sandbox_delay_s=30.0, worker_concurrency=1, max_queue=3)
    results = await batch(service, *map(request_body, "abcdefgh"))
    codes = [entry["statusCode"] for entry in results]
    assert set(codes) == {202, 503}
    assert codes.count(202) in {3, 4}
    assert {entry["code"] for entry in results if entry["statusCode"] == 503} == {"queue_full"}


async def test_a_draining_service_takes_no_batch(service: Client) -> None:
    service.app[SERVICES].readiness.draining = True
    answer = await service.post("/api/images/batch", json={"requests": [request_body("a")]})
    assert (answer.status, (await answer.json())["code"]) == (503, "draining")


async def test_the_texts_follow_the_client(service: Client) -> None:
    results = await batch(service, request_body("a"), {}, **{"Accept-Language": "en"})
    assert [entry["message"].isascii() for entry in results] == [True, True]
