"""Tests of waiting for a task's outcome by POST and GET, on this and on another instance."""

from __future__ import annotations

import asyncio
import time

import pytest

from imagegen.app import QUEUE
from imagegen.queue import change_relay
from imagegen.web.handler_services import SERVICES
from tests.emulator_fixtures import EmulatedUpstream
from tests.support import eventually, over_rows
from tests.web.conftest import Client, StartService, WaitForDiscovery

SMALL = {"width": 64, "height": 64}


def request_body(prompt: str, **fields: object) -> dict[str, object]:
    return {"prompt": prompt, **SMALL, **fields}


async def post(client: Client, prompt: str, **headers: str) -> str:
    answer = await client.post("/api/images/generate", json=request_body(prompt), headers=headers)
    assert answer.status in {200, 202}, await answer.text()
    task_id: str = (await answer.json())["taskId"]
    return task_id


def waiters(client: Client) -> int:
    return client.app[SERVICES].feed.count


async def test_a_waiting_post_returns_the_finished_task(service: Client) -> None:
    answer = await service.post("/api/images/generate", json=request_body("a"), headers={"Prefer": "wait=10"})
    body = await answer.json()
    assert answer.status == 200
    assert answer.headers["Preference-Applied"] == "wait=10"
    assert answer.headers["X-Cache"] == "MISS"
    assert answer.headers["Location"] == f"/api/images/{body['taskId']}"
    assert (body["status"], body["cached"], body["progress"], len(body["data"])) == ("completed", False, 100, 1)
    assert body["data"][0]["url"].startswith("http://")


async def test_a_wait_may_be_a_query_parameter_and_applies_to_hits(service: Client) -> None:
    task_id = await post(service, "a", Prefer="wait=10")
    answer = await service.post("/api/images/generate?wait=10", json=request_body("a"))
    body = await answer.json()
    assert answer.status == 200
    assert (body["taskId"], body["status"], body["cached"]) == (task_id, "completed", True)
    assert answer.headers["Preference-Applied"] == "wait=10"


async def test_a_wait_that_ends_first_answers_with_the_state(start_service: StartService) -> None:
    service = await start_service(sandbox_delay_s=30.0)
    task_id = await post(service, "a")
    await eventually(lambda: service.app[QUEUE].task_cache.live[task_id].progress)
    posted = await service.post("/api/images/generate?wait=1", json=request_body("a"))
    body = await posted.json()
    assert posted.status == 202
    assert body["cached"] is False
    assert body["status"] == "processing"
    assert int(posted.headers["Retry-After"]) >= 1
    began = time.monotonic()
    response = await service.get(f"/api/images/{body['taskId']}", headers={"Prefer": "respond-async, wait=1"})
    assert 0.9 < time.monotonic() - began < 20
    assert (await response.json())["status"] == "processing"
    assert response.headers["Preference-Applied"] == "wait=1"
    assert int(response.headers["Retry-After"]) >= 1


async def test_a_get_waits_for_the_end(start_service: StartService) -> None:
    service = await start_service(sandbox_delay_s=0.3)
    task_id = await post(service, "a")
    body = await (await service.get(f"/api/images/{task_id}?wait=10")).json()
    assert body["status"] == "completed"


async def test_a_finished_task_is_not_waited_for(service: Client) -> None:
    task_id = await post(service, "a", Prefer="wait=10")
    first = await service.get(f"/api/images/{task_id}", headers={"Prefer": "wait=60"})
    etag = first.headers["ETag"]
    again = await service.get(f"/api/images/{task_id}?wait=60", headers={"If-None-Match": etag})
    assert (first.status, again.status) == (200, 304)


async def test_a_waiting_post_of_a_failing_task_returns_the_reason(
    start_paid: StartService, upstream: EmulatedUpstream
) -> None:
    upstream.script("422")
    service = await start_paid()
    answer = await service.post("/api/images/generate?wait=10", json=request_body("a"))
    body = await answer.json()
    assert answer.status == 200
    assert (body["status"], body["error"]["code"], body["cached"]) == ("failed", "content_policy", False)


@over_rows("wait", ["0", "61", "x", "", "1.5", "-1", "٣"])
async def test_a_wait_outside_1_to_60_is_rejected_first(service: Client, wait: str) -> None:
    for answer in (
        await service.post("/api/images/generate", params={"wait": wait}, json=request_body(f"with {wait}")),
        await service.get(f"/api/images/{'0' * 32}", params={"wait": wait}),
    ):
        body = await answer.json()
        assert (answer.status, body["code"], body["details"][0]["field"]) == (400, "invalid_request", "wait")
    assert (await service.post("/api/images/generate", json=request_body(f"with {wait}"))).headers["X-Cache"] == "MISS"


@over_rows(
    ("prefer", "applied"),
    [("wait=7", "wait=7"), ("Wait = 9; x", "wait=9"), ("a, wait=100", "wait=60"), ("wait=0", None), ("wait=x", None)],
)
async def test_an_invalid_preference_is_ignored_and_a_long_one_capped(
    service: Client, prefer: str, applied: str | None
) -> None:
    answer = await service.post("/api/images/generate", json=request_body("a"), headers={"Prefer": prefer})
    assert answer.status in {200, 202}
    assert answer.headers.get("Preference-Applied") == applied


async def test_an_unknown_task_is_not_waited_for(service: Client) -> None:
    answer = await service.get(f"/api/images/{'0' * 32}?wait=60")
    assert answer.status == 404
    assert (await answer.json())["status"] == "not_found"


async def test_a_wait_on_another_instance_ends_long_before_the_next_poll(
    start_service: StartService, wait_for_discovery: WaitForDiscovery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(change_relay, "REFRESH_S", 60.0)
    client_a = await start_service(sandbox_delay_s=2.0)
    task_id = await post(client_a, "a")
    client_b = await start_service()
    await wait_for_discovery(client_a, client_b)

    async def finished_at(client: Client) -> float:
        answer = await client.get(f"/api/images/{task_id}?wait=60")
        assert (await answer.json())["status"] == "completed"
        return time.monotonic()

    here, there = await asyncio.gather(finished_at(client_a), finished_at(client_b))
    assert abs(there - here) < 20


async def test_a_wait_begun_after_remote_completion_returns_immediately(
    start_paid: StartService, upstream: EmulatedUpstream, wait_for_discovery: WaitForDiscovery
) -> None:
    upstream.script({"fault": "ok", "held": 1})
    client_a = await start_paid()
    task_id = await post(client_a, "a")
    await upstream.ledger.wait_for(lambda ledger: ledger.in_flight)
    client_b = await start_paid()
    await wait_for_discovery(client_a, client_b)
    await client_a.get(f"/api/images/{task_id}")
    assert (await (await client_b.get(f"/api/images/{task_id}")).json())["status"] == "processing"
    upstream.release()
    await client_a.get(f"/api/images/{task_id}?wait=10")
    began = time.monotonic()
    assert (await (await client_b.get(f"/api/images/{task_id}?wait=60")).json())["status"] == "completed"
    assert time.monotonic() - began < 20


async def test_a_waited_post_counts_once_for_the_limits(start_service: StartService) -> None:
    service = await start_service(sandbox_delay_s=0.3, rate_limit_max=2, image_rate_limit_max=1)
    posted = await service.post("/api/images/generate?wait=10", json=request_body("a"))
    assert posted.headers["X-RateLimit-Remaining"] == "0"
    task_id = (await posted.json())["taskId"]
    assert (await service.get(f"/api/images/{task_id}?wait=10")).status == 200
    assert (await service.get(f"/api/images/{task_id}")).status == 429


async def test_a_client_that_leaves_leaves_nothing_behind(start_service: StartService) -> None:
    service = await start_service(sandbox_delay_s=30.0)
    task_id = await post(service, "a")
    await eventually(lambda: service.app[QUEUE].task_cache.live[task_id].progress)
    before = len(asyncio.all_tasks())
    waits = [asyncio.create_task(service.get(f"/api/images/{task_id}?wait=60")) for _ in range(20)]
    await eventually(lambda: waiters(service) == 20)
    for wait in waits:
        wait.cancel()
    await asyncio.gather(*waits, return_exceptions=True)
    await eventually(lambda: waiters(service) == 0)
    await eventually(lambda: len(asyncio.all_tasks()) <= before)


async def test_waits_end_when_the_service_stops(start_service: StartService) -> None:
    service = await start_service(sandbox_delay_s=30.0)
    task_id = await post(service, "a")
    waiting = asyncio.create_task(service.get(f"/api/images/{task_id}?wait=60"))
    await eventually(lambda: waiters(service) == 1)
    context = service.app[SERVICES]
    context.readiness.draining = True
    context.feed.wake_all()
    answer = await asyncio.wait_for(waiting, 20)
    assert answer.status == 200
    assert (await answer.json())["status"] in ("pending", "processing")


async def test_many_waiters_cost_no_more_commands_than_one(
    start_service: StartService, wait_for_discovery: WaitForDiscovery
) -> None:
    client_a = await start_service(sandbox_delay_s=1.5)
    task_id = await post(client_a, "a")
    client_b = await start_service()
    await wait_for_discovery(client_a, client_b)
    redis = client_b.app[QUEUE].connection.commands

    async def used() -> int:
        stats = await redis.info("commandstats")
        return sum(stats.get(f"cmdstat_{name}", {"calls": 0})["calls"] for name in ("mget", "get", "publish"))

    before = await used()
    waits = [client.get(f"/api/images/{task_id}?wait=10") for client in (client_a, client_b) for _ in range(50)]
    answers = await asyncio.gather(*waits)
    assert {(await answer.json())["status"] for answer in answers} == {"completed"}
    assert await used() - before <= 20  # a hundred waiters; the few are those of the two instances, each second
