"""Tests of cancel and retry: in each state, from each instance, and during completion."""

from __future__ import annotations

import asyncio
import random
import time
from typing import Any

import pytest
from aiohttp import ClientResponse

from imagegen.app import QUEUE
from imagegen.queue import change_relay
from tests.emulator_fixtures import EmulatedUpstream
from tests.support import eventually, over_rows
from tests.web.conftest import Client, StartService, StartTwo, WaitForDiscovery

SMALL = {"width": 64, "height": 64}
UNKNOWN = "0" * 32


async def post(client: Client, prompt: str, **fields: object) -> str:
    answer = await client.post("/api/images/generate", json={"prompt": prompt, **SMALL, **fields})
    assert answer.status in {200, 202}, await answer.text()
    task_id: str = (await answer.json())["taskId"]
    return task_id


async def state(client: Client, task_id: str) -> str:
    return str((await (await client.get(f"/api/images/{task_id}")).json())["status"])


async def finished(client: Client, task_id: str) -> dict[str, Any]:
    body: dict[str, Any] = await (await client.get(f"/api/images/{task_id}?wait=10")).json()
    assert body["status"] in {"completed", "failed", "cancelled"}
    return body


async def at_rest(client: Client) -> bool:
    queue = client.app[QUEUE]
    pending = await queue.connection.commands.xpending(queue.keys.stream, "pool")
    return not pending["pending"] and not await queue.connection.commands.xlen(queue.keys.stream)


async def assert_rejected(answer: ClientResponse, code: str) -> None:
    body = await answer.json()
    assert (answer.status, body["code"], body["success"]) == (409, code, False)


# Cancel.


async def test_a_pending_task_is_cancelled_before_any_call(
    start_paid: StartService, upstream: EmulatedUpstream
) -> None:
    service = await start_paid(worker_concurrency=1)
    upstream.script({"fault": "hang", "match": "first"})
    first = await post(service, "first")
    await upstream.ledger.wait_for(lambda ledger: ledger.total == 1)
    second = await post(service, "second")
    answer = await service.delete(f"/api/images/{second}")
    body = await answer.json()
    assert answer.status == 200
    assert (body["success"], body["status"], body["taskId"]) == (True, "cancelled", second)
    assert body["message"] == "任务已取消"
    assert (await service.post(f"/api/images/{first}/cancel")).status == 200
    await eventually(lambda: at_rest(service))
    assert upstream.ledger.total == 1


async def test_cancelling_a_running_task_aborts_the_call_and_frees_the_slot(
    start_paid: StartService, upstream: EmulatedUpstream
) -> None:
    service = await start_paid(worker_concurrency=1)
    upstream.script({"fault": "hang", "match": "long"})
    task_id = await post(service, "long")
    await upstream.ledger.wait_for(lambda ledger: ledger.total == 1)
    assert (await (await service.post(f"/api/images/{task_id}/cancel")).json())["status"] == "cancelled"
    await upstream.ledger.wait_for(lambda ledger: ledger.in_flight == 0)
    assert (await finished(service, await post(service, "next")))["status"] == "completed"
    assert await state(service, task_id) == "cancelled"


@over_rows("method", ["delete", "post"])
async def test_a_finished_task_can_not_be_cancelled(service: Client, method: str) -> None:
    task_id = await post(service, "a")
    await finished(service, task_id)
    path = f"/api/images/{task_id}" + ("/cancel" if method == "post" else "")
    await assert_rejected(await service.request(method, path), "already_finished")
    assert await state(service, task_id) == "completed"


async def test_a_cancelled_task_is_finished(start_service: StartService) -> None:
    service = await start_service(sandbox_delay_s=30.0)
    task_id = await post(service, "a")
    assert (await service.delete(f"/api/images/{task_id}")).status == 200
    await assert_rejected(await service.delete(f"/api/images/{task_id}"), "already_finished")


@over_rows("task_id", [UNKNOWN, "odd", "%7Bodd%7D"])
async def test_an_unknown_task_is_neither_cancelled_nor_retried(service: Client, task_id: str) -> None:
    for answer in (
        await service.delete(f"/api/images/{task_id}"),
        await service.post(f"/api/images/{task_id}/cancel"),
        await service.post(f"/api/images/{task_id}/retry"),
    ):
        assert answer.status == 404
        assert await answer.json() == {"success": False, "status": "not_found", "message": "任务不存在或已过期"}


async def test_a_route_for_changes_accepts_only_post(service: Client) -> None:
    task_id = await post(service, "a")
    for verb in ("cancel", "retry"):
        answer = await service.get(f"/api/images/{task_id}/{verb}")
        assert (answer.status, answer.headers["Allow"]) == (405, "POST")


async def test_a_cancel_from_another_instance_stops_the_call_here(
    start_paid: StartService, upstream: EmulatedUpstream, wait_for_discovery: WaitForDiscovery
) -> None:
    client_a = await start_paid(lease_s=600.0)  # the renewal would stop the call as well
    upstream.script("hang")
    task_id = await post(client_a, "a")
    await upstream.ledger.wait_for(lambda ledger: ledger.total == 1)
    client_b = await start_paid(lease_s=600.0)
    await wait_for_discovery(client_a, client_b)
    assert (await client_b.delete(f"/api/images/{task_id}")).status == 200
    await upstream.ledger.wait_for(lambda ledger: ledger.in_flight == 0)
    assert [await state(client, task_id) for client in (client_a, client_b)] == ["cancelled", "cancelled"]


async def test_all_joined_clients_see_the_cancel(start_service: StartService) -> None:
    service = await start_service(sandbox_delay_s=60.0)
    task_id = await post(service, "a")
    body = {"prompt": "a", **SMALL}
    waiting = [
        asyncio.create_task(service.post("/api/images/generate?wait=60", json=body)),
        asyncio.create_task(service.get(f"/api/images/{task_id}?wait=60")),
    ]
    await eventually(lambda: service.app[QUEUE].feed.count == 2)
    await service.delete(f"/api/images/{task_id}")
    answers = await asyncio.wait_for(asyncio.gather(*waiting), 30)
    assert [(await answer.json())["status"] for answer in answers] == ["cancelled", "cancelled"]


async def test_a_task_that_waits_for_its_retry_is_cancelled(
    start_paid: StartService, upstream: EmulatedUpstream
) -> None:
    upstream.script("500")
    service = await start_paid(retry_base_s=30.0)
    task_id = await post(service, "a")
    await eventually(lambda: service.app[QUEUE].task_cache.live[task_id].retry_at)
    assert (await service.delete(f"/api/images/{task_id}")).status == 200
    await eventually(lambda: at_rest(service))
    assert upstream.ledger.total == 1


async def test_a_cancel_that_races_with_completion_has_one_outcome(
    start_paid: StartService,
    upstream: EmulatedUpstream,
    wait_for_discovery: WaitForDiscovery,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Race 200 times from both instances: after a 200 the task stays cancelled, after a 409 it is completed.

    Two of twenty do not race, so that both outcomes come on a slow machine too.
    """
    random.seed(7)
    monkeypatch.setattr(change_relay, "REFRESH_S", 0.2)
    clients = [await start_paid(worker_concurrency=20), await start_paid(worker_concurrency=20)]
    await wait_for_discovery(*clients)

    began = time.monotonic()
    warm = await asyncio.gather(*(post(clients[number % 2], f"warm {number}") for number in range(20)))
    await asyncio.gather(*(finished(clients[0], task_id) for task_id in warm))
    usual_s = min(time.monotonic() - began, 0.5)

    async def race(number: int) -> tuple[str, int]:
        task_id = await post(clients[number % 2], f"race {number}" + " {{fault:hang}}" * (number % 20 == 0))
        if number % 20 == 1:
            await finished(clients[number % 2], task_id)
        else:
            await asyncio.sleep(random.uniform(0, 1.5 * usual_s))
        answer = await clients[number // 2 % 2].delete(f"/api/images/{task_id}")
        return task_id, answer.status

    outcomes: dict[str, int] = {}
    for first in range(0, 200, 20):
        outcomes |= dict(await asyncio.gather(*map(race, range(first, first + 20))))
    await eventually(lambda: at_rest(clients[0]))
    expected = {task_id: "cancelled" if status == 200 else "completed" for task_id, status in outcomes.items()}
    assert set(outcomes.values()) == {200, 409}
    for client in clients:
        newest = {task_id: await client.app[QUEUE].client_queue.fresh(task_id) for task_id in outcomes}
        assert {task_id: task and task.state for task_id, task in newest.items()} == expected
        assert {task_id: await state(client, task_id) for task_id in outcomes} == expected
    queues = [client.app[QUEUE] for client in clients]
    await eventually(lambda: not any(queue.task_cache.live for queue in queues))
    await eventually(lambda: not any(queue.worker_queue._dispatcher.held for queue in queues))


async def test_two_cancels_at_once_agree(start_two: StartTwo) -> None:
    client_a, client_b = await start_two(sandbox_delay_s=30.0)
    task_id = await post(client_a, "a")
    answers = await asyncio.gather(
        *(client.delete(f"/api/images/{task_id}") for client in (client_a, client_b) for _ in range(5))
    )
    assert 200 in {answer.status for answer in answers} <= {200, 409}
    assert [await state(client, task_id) for client in (client_a, client_b)] == ["cancelled", "cancelled"]


# Retry.


async def test_a_failed_task_is_retried_under_its_id(start_paid: StartService, upstream: EmulatedUpstream) -> None:
    upstream.script("401")
    service = await start_paid()
    task_id = await post(service, "a")
    failed = await finished(service, task_id)
    assert failed["status"] == "failed"
    answer = await service.post(f"/api/images/{task_id}/retry")
    body = await answer.json()
    assert answer.status == 202
    assert answer.headers["Location"] == f"/api/images/{task_id}"
    assert int(answer.headers["Retry-After"]) >= 1
    assert (body["taskId"], body["cached"]) == (task_id, False)
    assert body["sequence"] > failed["sequence"]
    again = await finished(service, task_id)
    assert (again["status"], again["attempts"]) == ("completed", 1)


async def test_a_task_cancelled_on_another_instance_is_retried(
    start_two: StartTwo,
) -> None:
    client_a, client_b = await start_two(sandbox_delay_s=1.5)
    task_id = await post(client_a, "a")
    assert (await client_b.delete(f"/api/images/{task_id}")).status == 200
    assert (await client_a.post(f"/api/images/{task_id}/retry")).status == 202

    async def is_retried() -> bool:
        return await state(client_b, task_id) != "cancelled"

    await eventually(is_retried)
    assert (await finished(client_b, task_id))["status"] == "completed"


async def test_running_and_completed_tasks_are_not_retried(
    start_paid: StartService, upstream: EmulatedUpstream
) -> None:
    upstream.script({"fault": "ok", "held": 1})
    service = await start_paid()
    task_id = await post(service, "a")
    await upstream.ledger.wait_for(lambda ledger: ledger.in_flight)
    await assert_rejected(await service.post(f"/api/images/{task_id}/retry"), "not_retryable")
    upstream.release()
    await finished(service, task_id)
    await assert_rejected(await service.post(f"/api/images/{task_id}/retry"), "not_retryable")


async def test_two_retries_at_once_pay_once(
    start_paid: StartService, upstream: EmulatedUpstream, wait_for_discovery: WaitForDiscovery
) -> None:
    upstream.script("401")
    client_a, client_b = await start_paid(), await start_paid()
    await wait_for_discovery(client_a, client_b)
    task_id = await post(client_a, "a")
    await finished(client_a, task_id)
    answers = await asyncio.gather(
        *(client.post(f"/api/images/{task_id}/retry") for client in (client_a, client_b) for _ in range(5))
    )
    statuses = {answer.status for answer in answers}
    assert 202 in statuses
    assert statuses <= {202, 409}  # 409 if the task is already running
    await finished(client_a, task_id)
    assert upstream.ledger.total == 2


async def test_a_retry_counts_against_the_generation_limit(
    start_paid: StartService, upstream: EmulatedUpstream
) -> None:
    upstream.script("401")
    service = await start_paid(rate_limit_max=10, image_rate_limit_max=1)
    task_id = await post(service, "a")
    await finished(service, task_id)
    assert (await service.post(f"/api/images/{task_id}/retry")).status == 429
    assert (await service.delete(f"/api/images/{task_id}")).status == 409
