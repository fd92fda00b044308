"""Tests of cancels by several clients of one task over HTTP: each leaves it, and the last one ends it."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from typing import Any

from emulator_fixtures import EmulatedUpstream
from support import AS_ADMIN
from web.conftest import Client, StartService

from imagegen.client import AsyncImageClient

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


async def test_of_three_clients_two_leave_and_the_third_gets_its_image(
    start_two: StartTwo, upstream: EmulatedUpstream
) -> None:
    upstream.script({"fault": "ok", "delay_s": 1})
    paid = {"provider": "together", "together_api_key": "any", "together_api_url": upstream.url}
    one, two = await start_two(api_keys=KEYS, cache_scope="shared", **paid)
    task_id = (await submit(one, AS["a"], "for three"))["taskId"]
    for service, name in ((two, "b"), (one, "c")):
        assert (await submit(service, AS[name], "for three"))["coalesced"]
    for _ in range(2):
        assert await left(two, task_id, AS["a"])
        assert await left(one, task_id, AS["b"])
    task = await (await one.get(f"/api/images/{task_id}?wait=20", headers=AS["c"])).json()
    assert (task["status"], len(task["data"])) == ("completed", 1)
    assert "left" not in task
    assert len(upstream.ledger.calls) == 1
    assert (await cancel(one, task_id, AS["c"]))[0] == 409


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
