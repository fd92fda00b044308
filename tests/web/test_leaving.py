"""Tests of cancels by several clients of one task over HTTP: each leaves it, and the last one ends it."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import orjson
import pytest

from imagegen.client import AsyncImageClient
from imagegen.web.mcp import endpoint
from tests.emulator_fixtures import EmulatedUpstream
from tests.mcp_wire import headers_of, modern
from tests.support import AS_ADMIN, eventually
from tests.web.conftest import Client, Receiver, StartService

SECRETS = {name: f"the-secret-of-{name}-with-32-characters" for name in "abc"}
KEYS = {name: hashlib.sha256(secret.encode()).hexdigest() for name, secret in SECRETS.items()}
AS = {name: {"X-API-Key": secret} for name, secret in SECRETS.items()}

StartTwo = Callable[..., Awaitable[tuple[Client, Client]]]


async def submit(service: Client, headers: dict[str, str], prompt: str = "shared [slow:30]", **fields: Any) -> Any:
    body = {"prompt": prompt, "width": 64, "height": 64} | fields
    response = await service.post("/api/images/generate", json=body, headers=headers)
    assert response.status in {200, 202}, await response.text()
    return await response.json()


async def cancel(service: Client, task_id: str, headers: dict[str, str], query: str = "") -> tuple[int, Any]:
    response = await service.delete(f"/api/images/{task_id}{query}", headers=headers)
    return response.status, await response.json()


async def left(service: Client, task_id: str, headers: dict[str, str]) -> bool:
    """Cancel; return whether the task goes on without the client."""
    status, body = await cancel(service, task_id, headers)
    assert (status, body["success"]) == (200, True)
    assert ("left" in body) == (body["status"] != "cancelled")
    return bool(body.get("left"))


async def occupy(*services: Client) -> list[str]:
    """Occupy the only slot of each service, so that other tasks wait. Return the tasks that do."""
    tasks = [
        (await submit(services[0], AS["a"], f"blocks {number} [slow:60]"))["taskId"] for number in range(len(services))
    ]
    for task_id in tasks:
        await eventually(partial(is_running, services[0], task_id))
    return tasks


async def is_running(service: Client, task_id: str) -> bool:
    response = await service.get(f"/api/images/{task_id}", headers=AS["a"])
    return bool((await response.json())["status"] == "processing")


async def free(service: Client, occupied: list[str]) -> None:
    for task_id in occupied:
        assert not await left(service, task_id, AS["a"])


async def test_of_three_clients_two_leave_and_the_third_gets_its_image(
    start_two: StartTwo, upstream: EmulatedUpstream
) -> None:
    upstream.script({"fault": "ok", "delay_s": 60}, {"fault": "ok", "delay_s": 60})
    paid = {"provider": "together", "together_api_key": "any", "together_api_url": upstream.url}
    one, two = await start_two(api_keys=KEYS, cache_scope="shared", worker_concurrency=1, **paid)
    occupied = await occupy(one, two)
    task_id = (await submit(one, AS["a"], "for three"))["taskId"]
    for service, name in ((two, "b"), (one, "c")):
        assert (await submit(service, AS[name], "for three"))["coalesced"]
    for _ in range(2):
        assert await left(two, task_id, AS["a"])
        assert await left(one, task_id, AS["b"])
    await free(one, occupied)
    task = await (await one.get(f"/api/images/{task_id}?wait=20", headers=AS["c"])).json()
    assert (task["status"], len(task["data"])) == ("completed", 1)
    assert "left" not in task
    assert len(upstream.ledger.calls) == 1 + len(occupied)
    assert (await cancel(one, task_id, AS["c"]))[0] == 409


async def submit_by_v1(service: Client, headers: dict[str, str], prompt: str) -> str:
    body = {"prompt": prompt, "size": "64x64", "seed": 7}
    response = await service.post("/v1/images/generations/async", json=body, headers=headers)
    assert response.status == 202, await response.text()
    return str((await response.json())["id"])


async def call_tool(service: Client, headers: dict[str, str], name: str, **arguments: Any) -> Any:
    body = modern("tools/call", name=name, arguments=arguments)
    response = await service.post("/mcp", json=body, headers=headers_of(body) | headers)
    return (await response.json())["result"]


async def test_clients_of_every_api_count_for_one_task(start_two: StartTwo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "WAIT_S", 0.1)
    one, two = await start_two(api_keys=KEYS, cache_scope="shared")
    prompt = "of every api [slow:30]"
    task_id = await submit_by_v1(one, AS["a"], prompt)
    arguments = {"prompt": prompt, "width": 64, "height": 64, "seed": 7}
    joined = await call_tool(two, AS["b"], "generate_image", **arguments)
    assert joined["structuredContent"]["taskId"] == task_id
    assert (await submit(two, AS["c"], prompt, seed=7))["taskId"] == task_id
    for _ in range(2):
        assert await left(two, task_id, AS["a"])
        gone = await call_tool(one, AS["b"], "cancel_image_task", taskId=task_id)
        assert gone["structuredContent"]["status"] in {"pending", "processing"}
    assert await submit_by_v1(two, AS["a"], prompt) == task_id
    assert await left(one, task_id, AS["c"])
    assert not await left(one, task_id, AS["a"])


async def test_a_task_with_a_webhook_is_not_ended_by_the_cancels_of_others(
    start_two: StartTwo, receiver: Receiver
) -> None:
    one, two = await start_two(
        api_keys=KEYS, cache_scope="shared", webhook_allow_private=True, worker_concurrency=1, sandbox_delay_s=0.0
    )
    occupied, tasks = await occupy(one, two), set()
    for name, other in ("ab", "ba"):
        hooks = {each: {"webhook": {"url": receiver.url}} if each == name else {} for each in "ab"}
        task_id = (await submit(one, AS["a"], f"{name} has a webhook", **hooks["a"]))["taskId"]
        await submit(two, AS["b"], f"{name} has a webhook", **hooks["b"])
        for each in (name, other):
            assert await left(one, task_id, AS[each])
        tasks.add((task_id, "image.completed"))
    await free(two, occupied)
    await eventually(lambda: len(receiver.received) == len(tasks))
    events = [orjson.loads(body) for _, body in receiver.received]
    assert {(event["data"]["taskId"], event["type"]) for event in events} == tasks


async def test_the_client_of_a_webhook_withdraws_it_by_another_cancel(
    start_service: StartService, receiver: Receiver
) -> None:
    service = await start_service(api_keys=KEYS, cache_scope="shared", webhook_allow_private=True)
    task_id = (await submit(service, AS["a"], webhook={"url": receiver.url}))["taskId"]
    await submit(service, AS["b"])
    assert await left(service, task_id, AS["a"])
    assert await left(service, task_id, AS["a"])
    assert not await left(service, task_id, AS["b"])
    await eventually(lambda: receiver.received)
    assert orjson.loads(receiver.received[0][1])["type"] == "image.cancelled"


async def test_a_client_that_came_back_after_a_restart_is_not_cancelled_by_another(start_service: StartService) -> None:
    service = await start_service(api_keys=KEYS, cache_scope="shared")
    task_id = (await submit(service, AS["a"]))["taskId"]
    await submit(service, AS["b"])
    assert await left(service, task_id, AS["a"])
    await service.close()
    service = await start_service(api_keys=KEYS, cache_scope="shared")
    assert (await submit(service, AS["a"]))["coalesced"]
    assert await left(service, task_id, AS["b"])
    assert not await left(service, task_id, AS["a"])


async def test_a_client_that_left_and_submits_again_is_one_of_the_clients_again(start_service: StartService) -> None:
    service = await start_service(api_keys=KEYS, cache_scope="shared")
    headers = AS["a"] | {"Idempotency-Key": "once"}
    task_id = (await submit(service, headers))["taskId"]
    await submit(service, AS["b"])
    assert await left(service, task_id, AS["a"])
    await submit(service, headers)
    assert await left(service, task_id, AS["b"])
    assert not await left(service, task_id, AS["a"])


async def test_a_joined_batch_and_a_joined_webhook_count_as_their_client(start_service: StartService) -> None:
    service = await start_service(api_keys=KEYS, cache_scope="shared", webhook_allow_private=True, webhook_secret=None)
    task_id = (await submit(service, AS["a"]))["taskId"]
    entry = {"prompt": "shared [slow:30]", "width": 64, "height": 64}
    await service.post("/api/images/batch", json={"requests": [entry]}, headers=AS["b"])
    await submit(service, AS["c"], webhook={"url": "http://127.0.0.1:9/hook"})
    assert await left(service, task_id, AS["a"])
    assert await left(service, task_id, AS["b"])
    assert not await left(service, task_id, AS["c"])


async def test_the_operator_cancels_for_all_and_nobody_else_can(start_service: StartService) -> None:
    service = await start_service(api_keys=KEYS, cache_scope="shared")
    task_id = (await submit(service, AS["a"]))["taskId"]
    await submit(service, AS["b"])
    assert await left(service, task_id, AS_ADMIN)
    status, body = await cancel(service, task_id, AS["a"], "?force=true")
    assert (status, body["code"]) == (401, "unauthorized")
    assert (await cancel(service, task_id, AS_ADMIN, "?force=yes"))[1]["details"][0]["field"] == "force"
    status, body = await cancel(service, task_id, AS_ADMIN, "?force=true")
    assert (status, body["status"]) == (200, "cancelled")


async def test_without_keys_a_client_is_an_address(start_service: StartService) -> None:
    service = await start_service(trusted_proxy_hops=1)
    first, other = ({"X-Forwarded-For": f"203.0.113.{number}"} for number in (1, 2))
    task_id = (await submit(service, first))["taskId"]
    assert await left(service, task_id, other)
    await submit(service, other)
    assert await left(service, task_id, first)
    assert not await left(service, task_id, other)
    again = (await submit(service, first, "another [slow:30]"))["taskId"]
    assert (await cancel(service, again, first | AS_ADMIN, "?force=true"))[1]["status"] == "cancelled"


async def test_the_python_client_shows_that_it_left(start_service: StartService) -> None:
    service = await start_service(api_keys=KEYS, cache_scope="shared")
    address = str(service.make_url("")).rstrip("/")
    async with (
        AsyncImageClient(address, api_key=SECRETS["a"]) as one,
        AsyncImageClient(address, api_key=SECRETS["b"]) as two,
    ):
        receipt = await one.submit("shared [slow:30]", width=64, height=64)
        await two.submit("shared [slow:30]", width=64, height=64)
        task = await one.cancel(receipt.task_id)
        assert (task.left, task.is_final) == (True, False)
        task = await two.cancel(receipt.task_id)
        assert (task.left, task.status) == (False, "cancelled")
