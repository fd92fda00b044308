"""Tests of agents with API keys: each sees its own tasks only, and what its key does not allow is a result."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from imagegen.web.mcp import endpoint
from tests.emulator_fixtures import EmulatedUpstream
from tests.mcp_wire import TASKS, call, events, headers_of, modern, pause, result, send
from tests.support import AS_ADMIN
from tests.web.conftest import Client

IMAGE_USD = 0.000708
"""Of FLUX.1-schnell at 512 x 512."""


async def key(service: Client, name: str, **limits: Any) -> dict[str, str]:
    """Return the headers of a new key."""
    created = await service.post("/api/admin/keys", json={"name": name} | limits, headers=AS_ADMIN)
    assert created.status == 201, await created.text()
    return {"Authorization": f"Bearer {(await created.json())['secret']}"}


async def refused(service: Client, headers: dict[str, str], **arguments: Any) -> dict[str, Any]:
    """Return the error of a call that is refused by a result."""
    found = await result(service, call("generate_image", **{"prompt": "a"} | arguments), headers)
    assert (found["isError"], found["structuredContent"]["status"]) == (True, "refused")
    return dict(found["structuredContent"]["error"])


async def test_another_key_s_task_is_an_unknown_one_for_each_tool_and_method(paid: Client) -> None:
    own, other = await key(paid, "one"), await key(paid, "two")
    made = (await result(paid, call("generate_image", prompt="a"), own))["structuredContent"]
    for name in ("get_image_task", "cancel_image_task"):
        hidden = await result(paid, call(name, taskId=made["taskId"]), other)
        assert hidden == await result(paid, call(name, taskId="0" * 32), other)
        assert hidden["structuredContent"]["error"]["code"] == "not_found"
    for method in ("tasks/get", "tasks/cancel", "tasks/update"):
        answers = []
        for task_id in (made["taskId"], "0" * 32):
            status, answer = await send(paid, modern(method, taskId=task_id, capabilities=TASKS), other)
            answers.append((status, answer["error"]))
        assert answers[0] == answers[1]
        assert (await send(paid, modern(method, taskId=made["taskId"], capabilities=TASKS), own))[0] == 200
    quoted = (await result(paid, call("quote_image", prompt="a"), other))["structuredContent"]
    assert (quoted["cached"], quoted["costUsd"]) == (False, pytest.approx(IMAGE_USD))


async def test_what_a_key_does_not_allow_is_a_result(paid: Client, upstream: EmulatedUpstream) -> None:
    poor = await key(paid, "poor", dailyUsd=0.0001)
    over = await refused(paid, poor)
    assert (over["code"], over["estimatedCostUsd"]) == ("budget_exceeded", pytest.approx(IMAGE_USD))
    small = await key(paid, "small", models=["other/*"], maxMegapixels=0.1)
    assert (await refused(paid, small))["code"] == "not_allowed"
    assert (await refused(paid, small, model="other/model"))["details"][0].startswith("width")
    slow = await key(paid, "slow", imagesRate=1)
    await result(paid, call("generate_image", prompt="b"), slow)
    limited = await refused(paid, slow)
    assert (limited["code"], limited["retryAfterSeconds"] > 0) == ("rate_limited", True)
    assert len(upstream.ledger.paid) == 1


async def test_a_key_with_all_its_tasks_open_has_to_wait(paid: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "WAIT_S", 0.1)
    narrow = await key(paid, "narrow", openTasks=1)
    await pause(paid)
    first = (await result(paid, call("generate_image", prompt="a"), narrow))["structuredContent"]
    assert first["status"] == "pending"
    assert (await refused(paid, narrow, prompt="b"))["code"] == "too_many_open_tasks"
    again = (await result(paid, call("generate_image", prompt="a"), narrow))["structuredContent"]
    assert again["taskId"] == first["taskId"], "a blind repeat joins"


async def test_a_key_that_is_revoked_meanwhile_gets_no_images(paid: Client) -> None:
    await key(paid, "another")  # without any key the service is open
    gone = await key(paid, "gone")
    await pause(paid)
    body = call("generate_image", prompt="a", meta={"progressToken": 1})
    response = await paid.post("/mcp", json=body, headers=headers_of(body) | gone)
    first = await response.content.readuntil(b"\r\n\r\n")
    assert b"notifications/progress" in first
    await paid.delete("/api/admin/keys/gone", headers=AS_ADMIN)
    await pause(paid, on=False)
    async with asyncio.timeout(20):
        last = events((await response.read()).decode())[-1]
    assert last["result"]["structuredContent"]["error"]["code"] == "unauthorized"
    status, answer = await send(paid, modern("tools/list"), gone)
    assert (status, answer["error"]["data"]["code"]) == (401, "unauthorized")
