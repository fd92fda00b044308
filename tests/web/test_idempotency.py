"""Tests of idempotency keys, and of fresh images by `Cache-Control: no-cache`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest
from aiohttp import ClientResponse

from imagegen.app import QUEUE, STORE
from imagegen.tasks.image import StoredImage
from imagegen.web.handler_services import SERVICES
from tests.emulator_fixtures import EmulatedUpstream
from tests.support import eventually, over_rows
from tests.web.conftest import Client, StartService, WaitForDiscovery

SMALL = {"width": 64, "height": 64}
FRESH = {"Cache-Control": "no-cache"}


async def post(client: Client, prompt: str = "a", **headers: str) -> ClientResponse:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return await client.post("/api/images/generate", json={"prompt": prompt, **SMALL}, headers=named)


async def finished(client: Client, task_id: str) -> dict[str, Any]:
    body: dict[str, Any] = await (await client.get(f"/api/images/{task_id}?wait=10")).json()
    assert body["status"] in {"completed", "failed", "cancelled"}
    return body


async def generated(client: Client, prompt: str = "a", **headers: str) -> dict[str, Any]:
    return await finished(client, (await (await post(client, prompt, **headers)).json())["taskId"])


async def count_stored_keys(client: Client) -> int:
    queue = client.app[QUEUE]
    return len(await queue.connection.commands.keys(queue.keys.idempotency("*")))


# Keys.


async def test_a_repeat_gets_the_task_of_the_first_request(
    start_paid: StartService, upstream: EmulatedUpstream
) -> None:
    service = await start_paid()
    first = await post(service, Idempotency_Key="k", Cache_Control="no-cache")
    assert first.status == 202
    done = await finished(service, (await first.json())["taskId"])
    again = await post(service, Idempotency_Key="k", Cache_Control="no-cache")
    body = await again.json()
    assert (again.status, body["taskId"], body["cached"]) == (200, done["taskId"], True)
    assert body["sequence"] == done["sequence"]
    assert upstream.ledger.total == 1


@pytest.mark.parametrize("value", [b"", b"\xff a b", b"a b", None])
async def test_a_foreign_value_of_a_key_is_replaced(start_service: StartService, value: bytes | None) -> None:
    service = await start_service(sandbox_delay_s=30.0)
    queue = service.app[QUEUE]
    await post(service, Idempotency_Key="k")
    (name,) = await queue.connection.commands.keys(queue.keys.idempotency("*"))
    await queue.connection.commands.delete(name)
    await (queue.connection.commands.lpush(name, "x") if value is None else queue.connection.commands.set(name, value))
    answers = await asyncio.gather(post(service, Idempotency_Key="k"), post(service, "b", Idempotency_Key="other"))
    assert [answer.status for answer in answers] == [202, 202]
    assert (await post(service, "c", Idempotency_Key="k")).status == 422
    assert (await post(service, "c", Idempotency_Key="other")).status == 422


async def test_a_repeat_joins_the_running_task(start_service: StartService) -> None:
    service = await start_service(sandbox_delay_s=30.0)
    await post(service, Idempotency_Key="k")
    again = await post(service, Idempotency_Key="k", Cache_Control="no-cache")
    body = await again.json()
    assert (again.status, body["cached"], body["coalesced"]) == (202, False, True)


async def test_a_repeat_of_a_failed_task_pays_nothing(start_paid: StartService, upstream: EmulatedUpstream) -> None:
    upstream.script("401")
    service = await start_paid()
    failed = await generated(service, Idempotency_Key="k")
    again = await post(service, Idempotency_Key="k")
    body = await again.json()
    assert (again.status, body["status"], body["taskId"]) == (202, "failed", failed["taskId"])
    assert upstream.ledger.total == 1
    assert (await generated(service, Idempotency_Key="other"))["status"] == "completed"


async def test_fifty_concurrent_requests_for_fresh_images_make_one_call(
    start_paid: StartService, upstream: EmulatedUpstream
) -> None:
    service = await start_paid()
    await generated(service)
    answers = await asyncio.gather(*(post(service, Idempotency_Key="k", Cache_Control="no-cache") for _ in range(50)))
    assert len({(await answer.json())["taskId"] for answer in answers}) == 1
    assert {answer.status for answer in answers} <= {200, 202}
    await finished(service, (await answers[0].json())["taskId"])
    assert [answer.headers["X-Cache"] for answer in answers].count("REFRESH") == 1
    assert upstream.ledger.total == 2


async def test_fifty_concurrent_requests_on_two_instances_make_one_call(
    start_paid: StartService, upstream: EmulatedUpstream, wait_for_discovery: WaitForDiscovery
) -> None:
    clients = [await start_paid(), await start_paid()]
    await wait_for_discovery(*clients)
    answers = await asyncio.gather(
        *(post(clients[number % 2], Idempotency_Key="k", Cache_Control="no-cache") for number in range(50))
    )
    task_ids = {(await answer.json())["taskId"] for answer in answers}
    assert len(task_ids) == 1
    assert (await finished(clients[0], task_ids.pop()))["status"] == "completed"
    assert upstream.ledger.total == 1


async def test_another_body_under_the_same_key_is_rejected(service: Client) -> None:
    await post(service, "a", Idempotency_Key="k")
    answer = await post(service, "b", Idempotency_Key="k")
    body = await answer.json()
    assert (answer.status, body["code"]) == (422, "idempotency_mismatch")
    assert (await post(service, "b", Idempotency_Key="k2")).status == 202


async def test_the_order_of_fields_does_not_change_the_body(service: Client) -> None:
    for body in ({"prompt": "a", "n": 1}, {"n": 1, "prompt": "a"}):
        answer = await service.post("/api/images/generate", json=body, headers={"Idempotency-Key": "k"})
        assert answer.status in {200, 202}


@over_rows("key", ["", '""', "with space", "é", '"quo ted"', "x" * 256, '"' + "x" * 256 + '"'])
async def test_a_bad_key_is_rejected_by_name(service: Client, key: str) -> None:
    answer = await post(service, Idempotency_Key=key)
    body = await answer.json()
    assert (answer.status, body["code"], body["details"][0]["field"]) == (400, "invalid_request", "Idempotency-Key")
    assert await count_stored_keys(service) == 0


async def test_two_keys_are_rejected(service: Client) -> None:
    headers = [("Idempotency-Key", "a"), ("Idempotency-Key", "b")]
    answer = await service.post("/api/images/generate", json={"prompt": "a"}, headers=headers)
    assert answer.status == 400


@pytest.mark.parametrize("key", ["x" * 255, "!~", '"' + "x" * 255 + '"', 'a"b'], ids=lambda key: key[:12])
async def test_a_key_of_up_to_255_visible_characters_is_accepted(service: Client, key: str) -> None:
    assert (await post(service, Idempotency_Key=key)).status == 202


async def test_a_quoted_key_is_the_bare_one(service: Client) -> None:
    await post(service, "a", Idempotency_Key="k")
    assert (await post(service, "b", Idempotency_Key='"k"')).status == 422
    await post(service, "a", Idempotency_Key='q"')
    assert (await post(service, "b", Idempotency_Key=r'"q\""')).status == 422


async def test_a_rejected_body_does_not_use_up_the_key(service: Client) -> None:
    headers = {"Idempotency-Key": "k"}
    for body in ({"prompt": ""}, {"prompt": "a", "width": 1}, {}):
        assert (await service.post("/api/images/generate", json=body, headers=headers)).status == 400
    assert (await post(service, Idempotency_Key="k")).status == 202


async def test_a_full_queue_does_not_use_up_the_key(start_service: StartService) -> None:
    service = await start_service(sandbox_delay_s=30.0, worker_concurrency=1, max_queue=1)
    queue = service.app[QUEUE]
    await post(service, "runs")
    await eventually(lambda: any(task.progress for task in queue.task_cache.live.values()))
    assert (await post(service, "waits")).status == 202
    for prompt in ("a", "b"):
        answer = await post(service, prompt, Idempotency_Key="k")
        assert (answer.status, (await answer.json())["code"]) == (503, "queue_full")
    assert await count_stored_keys(service) == 0


async def test_a_draining_service_does_not_use_up_the_key(service: Client) -> None:
    service.app[SERVICES].readiness.draining = True
    assert (await post(service, Idempotency_Key="k")).status == 503
    assert await count_stored_keys(service) == 0


async def test_a_key_without_a_task_is_free_for_the_same_body(service: Client) -> None:
    """Simulate a process that died after storing the key and before the task."""
    queue = service.app[QUEUE]
    task_id = (await (await post(service, Idempotency_Key="k")).json())["taskId"]
    await finished(service, task_id)
    await queue.connection.commands.delete(queue.keys.record(task_id))
    queue.task_cache.forget(task_id)
    answer = await post(service, Idempotency_Key="k")
    assert (answer.status, answer.headers["X-Cache"]) == (202, "MISS")


async def test_a_key_costs_one_command_and_lives_a_day(start_service: StartService) -> None:
    service = await start_service(sandbox_delay_s=30.0)
    queue = service.app[QUEUE]

    async def commands() -> int:
        stats = await queue.connection.commands.info("commandstats")
        skipped = {"cmdstat_info", "cmdstat_ping"}
        return sum(stat["calls"] for name, stat in stats.items() if name not in skipped)

    await post(service, "warm up")
    await post(service, "warm up", Idempotency_Key="w")
    plain, keyed = list[int](), list[int]()
    for number in range(5):  # loops of the service may send commands too, but not each time
        before = await commands()
        await post(service, "warm up")
        between = await commands()
        await post(service, "warm up", Idempotency_Key=f"k{number}")
        plain.append(between - before)
        keyed.append(await commands() - between)
    assert min(keyed) - min(plain) <= 1
    [key] = [key for key in await queue.connection.commands.keys(queue.keys.idempotency("*")) if key][:1]
    assert 86_000_000 < await queue.connection.commands.pttl(key) <= 86_400_000


async def test_a_batch_is_accepted_once_under_its_key(start_paid: StartService, upstream: EmulatedUpstream) -> None:
    service = await start_paid()
    body = {"requests": [{"prompt": "a", **SMALL}, {"prompt": "b", **SMALL}]}
    for _ in range(2):
        answer = await service.post("/api/images/batch", json=body, headers={"Idempotency-Key": "k", **FRESH})
        results = (await answer.json())["results"]
        for result in results:
            await finished(service, result["taskId"])
    assert upstream.ledger.total == 2


# Fresh images.


async def test_fresh_images_are_generated_under_the_same_id(
    start_paid: StartService, upstream: EmulatedUpstream
) -> None:
    service = await start_paid()
    old = await generated(service)
    answer = await post(service, Cache_Control="max-age=0, No-Cache")
    body = await answer.json()
    assert (answer.status, answer.headers["X-Cache"]) == (202, "REFRESH")
    assert (body["taskId"], body["cached"]) == (old["taskId"], False)
    new = await finished(service, body["taskId"])
    assert new["status"] == "completed"
    assert new["sequence"] > old["sequence"]
    assert not any("stale" in image for image in new["data"])
    assert upstream.ledger.total == 2


async def test_fresh_images_of_a_new_request_are_generated(
    start_paid: StartService, upstream: EmulatedUpstream
) -> None:
    service = await start_paid()
    answer = await post(service, Cache_Control="no-cache")
    assert (answer.status, answer.headers["X-Cache"]) == (202, "MISS")


async def test_a_request_for_fresh_images_joins_a_running_task(
    start_paid: StartService, upstream: EmulatedUpstream
) -> None:
    upstream.script("hang")
    service = await start_paid()
    await post(service)
    answers = await asyncio.gather(*(post(service, Cache_Control="no-cache") for _ in range(20)))
    assert {answer.headers["X-Cache"] for answer in answers} == {"COALESCED"}
    await upstream.ledger.wait_for(lambda ledger: ledger.total)
    assert upstream.ledger.total == 1


async def test_the_old_images_stay_until_all_new_ones_exist(
    start_paid: StartService, upstream: EmulatedUpstream
) -> None:
    service = await start_paid(worker_concurrency=1)
    answer = await service.post("/api/images/generate?wait=10", json={"prompt": "a", "n": 3, **SMALL})
    old = (await answer.json())["data"]
    upstream.script({"fault": "image_slow", "interval_s": 0.002, "index": 2})
    fresh = await service.post("/api/images/generate", json={"prompt": "a", "n": 3, **SMALL}, headers=FRESH)
    task_id = (await fresh.json())["taskId"]
    seen = []
    async with service.get(f"/api/images/{task_id}/events") as events:
        async for line in events.content:
            if line.startswith(b"event: "):
                seen.append(line[7:].strip().decode())
            body = await (await service.get(f"/api/images/{task_id}")).json()
            if body["status"] in {"pending", "processing"}:
                assert [image["sha256"] for image in body["data"]] == [image["sha256"] for image in old]
                assert all(image["stale"] for image in body["data"])
    new = await finished(service, task_id)
    assert "warnings" not in new, new["warnings"]
    assert {image["sha256"] for image in new["data"]}.isdisjoint(image["sha256"] for image in old)
    assert not any("stale" in image for image in new["data"])
    assert seen.count("image") == 3
    assert seen[-4:] == ["image"] * 3 + ["completed"]


async def test_the_old_images_stay_if_the_fresh_generation_fails(
    start_paid: StartService, upstream: EmulatedUpstream
) -> None:
    service = await start_paid()
    old = await generated(service)
    upstream.script("401")
    new = await generated(service, Cache_Control="no-cache")
    assert new["status"] == "completed"
    assert [image["sha256"] for image in new["data"]] == [image["sha256"] for image in old["data"]]
    assert not any("stale" in image for image in new["data"])
    assert any("upstream_auth" in warning for warning in new["warnings"])
    assert new["data"][0]["expiresAt"] > old["data"][0]["expiresAt"]
    assert (await service.session.get(new["data"][0]["url"])).status == 200
    assert upstream.ledger.total == 2


@pytest.mark.parametrize("way", ["submit", "fresh", "retry"])
async def test_the_old_images_stay_if_fresh_generations_are_cancelled_again_and_again(
    start_paid: StartService, upstream: EmulatedUpstream, way: str
) -> None:
    service = await start_paid()
    old = await generated(service)
    path = f"/api/images/{old['taskId']}"
    again: dict[str, Callable[[], Awaitable[object]]] = {
        "submit": lambda: post(service),
        "fresh": lambda: post(service, Cache_Control="no-cache"),
        "retry": lambda: service.post(path + "/retry"),
    }
    upstream.set_fault("hang")
    for submit in (again["fresh"], again[way], again[way]):
        await submit()
        shown = await (await service.delete(path)).json()
        assert shown["status"] == "cancelled"
        assert [(image["sha256"], image["stale"]) for image in shown["data"]] == [(old["data"][0]["sha256"], True)]
        assert (await service.session.get(old["data"][0]["url"])).status == 200
    upstream.set_fault(None)
    new = await generated(service)
    assert (new["status"], "stale" in new["data"][0]) == ("completed", False)


async def test_old_images_are_stored_as_long_as_their_task(
    start_paid: StartService, upstream: EmulatedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = await start_paid()
    old = await generated(service)
    expiries: list[float] = []
    store = service.app[STORE]
    extend = store.extend_expiry

    async def record_expiry(task_id: str, images: Sequence[StoredImage], expires_at_s: float) -> None:
        expiries.append(expires_at_s)
        await extend(task_id, images, expires_at_s)

    monkeypatch.setattr(store, "extend_expiry", record_expiry)
    upstream.script("401")
    await generated(service, Cache_Control="no-cache")
    task = await service.app[SERVICES].queue.get(old["taskId"])
    assert task
    assert task.expires_at
    assert len(expiries) == 1
    assert expiries[0] >= task.expires_at
    assert task.images[0].sha256 == old["data"][0]["sha256"]


async def test_a_fresh_generation_taken_over_still_shows_the_old_images(
    start_paid: StartService, upstream: EmulatedUpstream
) -> None:
    client_a = await start_paid()
    old = await generated(client_a)
    upstream.script("hang")
    await post(client_a, Cache_Control="no-cache")
    await upstream.ledger.wait_for(lambda ledger: ledger.total == 2)
    upstream.script("hang")
    await client_a.server.close()
    client_b = await start_paid()
    await upstream.ledger.wait_for(lambda ledger: ledger.total == 3)
    body = await (await client_b.get(f"/api/images/{old['taskId']}")).json()
    assert body["status"] == "processing"
    assert [(image["sha256"], image["stale"]) for image in body["data"]] == [(old["data"][0]["sha256"], True)]
