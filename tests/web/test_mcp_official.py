"""The official client of MCP with tasks that take longer than a call waits: handles, the extension of tasks, scopes."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from typing import Any, Literal

import httpx2
import pytest
from mcp import Client
from mcp.client.extension import ClaimContext, ClientExtension, ResultClaim
from mcp.client.streamable_http import streamable_http_client
from mcp_types import CallToolResult, Request, Result
from pydantic import Field

from imagegen.web.api import tasks
from imagegen.web.mcp import endpoint
from tests.emulator_fixtures import EmulatedUpstream
from tests.mcp_wire import pause
from tests.web.conftest import StartService


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait 0.3 s for a task, with progress each 0.1 s."""
    monkeypatch.setattr(endpoint, "WAIT_S", 0.3)
    monkeypatch.setattr(tasks, "REPORT_S", 0.1)


class TaskHandle(Result):
    """Handle of a task in place of a result, or its state."""

    result_type: Literal["task"] = "task"
    task_id: str = Field(alias="taskId")
    status: str
    poll_interval_ms: int = Field(alias="pollIntervalMs")


class TaskState(Result):
    result_type: str = Field(alias="resultType")
    status: str = ""
    result: dict[str, Any] | None = None


class TaskRequest(Request[dict[str, Any], str]):
    name_param = "taskId"


class Tasks(ClientExtension):
    """The extension, as a client has it: a handle is polled until the result of its call is there."""

    identifier = "io.modelcontextprotocol/tasks"

    def __init__(self) -> None:
        self.handles: list[TaskHandle] = []
        self.has_handle = asyncio.Event()
        self.session: Any = None

    def claims(self) -> Sequence[ResultClaim[Any]]:
        return (ResultClaim(result_type="task", model=TaskHandle, resolve=self.resolve),)

    async def ask(self, method: str, task_id: str, **more: Any) -> TaskState:
        request = TaskRequest(method=method, params={"taskId": task_id, **more})
        state: TaskState = await self.session.send_request(request, TaskState)
        return state

    async def resolve(self, handle: TaskHandle, context: ClaimContext) -> CallToolResult:
        self.handles.append(handle)
        self.session = context.session
        self.has_handle.set()
        while (state := await self.ask("tasks/get", handle.task_id)).status == "working":
            await asyncio.sleep(0.05)
        return CallToolResult.model_validate(state.result or {"content": [], "isError": True})


def address(service: Any) -> str:
    return str(service.make_url("/mcp"))


@pytest.mark.parametrize("mode", ["auto", "legacy"])
async def test_a_slow_call_is_a_handle_and_then_the_image(
    start_paid: StartService, upstream: EmulatedUpstream, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    service = await start_paid()
    await pause(service)
    seen: list[float] = []
    seen_twice = asyncio.Event()

    async def record(progress: float, total: float | None, message: str | None) -> None:
        seen.append(progress)
        if len(seen) == 2:
            seen_twice.set()

    async with Client(address(service), mode=mode) as client:
        found = await client.call_tool("generate_image", {"prompt": "slow"})
        handle: Any = found.structured_content
        assert (handle["status"], handle["next"]) == ("pending", "call get_image_task")
        monkeypatch.setattr(endpoint, "WAIT_S", 60.0)
        joining = client.call_tool("generate_image", {"prompt": "slow"}, progress_callback=record)
        joined = asyncio.create_task(joining)
        await seen_twice.wait()
        await pause(service, on=False)
        again: Any = (await joined).structured_content
        assert (again["taskId"], again["status"]) == (handle["taskId"], "completed")
        got: Any = (await client.call_tool("get_image_task", {"taskId": handle["taskId"]})).structured_content
        assert (got["status"], len(got["urls"])) == ("completed", 1)
    assert len(upstream.ledger.paid) == 1


async def test_a_client_with_the_extension_polls_the_task_itself(
    start_paid: StartService, upstream: EmulatedUpstream
) -> None:
    service, tasks = await start_paid(), Tasks()
    await pause(service)
    async with Client(address(service), extensions=[tasks]) as client:
        call = asyncio.create_task(client.call_tool("generate_image", {"prompt": "slow"}))
        await tasks.has_handle.wait()
        await pause(service, on=False)
        found: Any = await call
        assert (found.structured_content["status"], len(found.structured_content["urls"])) == ("completed", 1)
        (handle,) = tasks.handles
        assert (handle.status, handle.poll_interval_ms > 0) == ("working", True)
        assert (await tasks.ask("tasks/update", handle.task_id, inputResponses={})).result_type == "complete"
    assert len(upstream.ledger.paid) == 1


async def test_a_cancel_by_the_extension_ends_the_task(start_paid: StartService, upstream: EmulatedUpstream) -> None:
    service, tasks = await start_paid(), Tasks()
    await pause(service)
    async with Client(address(service), extensions=[tasks]) as client:
        call = asyncio.create_task(client.call_tool("generate_image", {"prompt": "slow"}))
        await tasks.has_handle.wait()
        await tasks.ask("tasks/cancel", tasks.handles[0].task_id)
        assert (await call).is_error
        assert (await tasks.ask("tasks/get", tasks.handles[0].task_id)).status == "cancelled"
    assert not upstream.ledger.calls


async def test_a_failed_task_is_a_completed_one_of_the_extension(
    start_paid: StartService, upstream: EmulatedUpstream
) -> None:
    service, tasks = await start_paid(), Tasks()
    upstream.script("400_policy")
    await pause(service)
    async with Client(address(service), extensions=[tasks]) as client:
        call = asyncio.create_task(client.call_tool("generate_image", {"prompt": "slow"}))
        await tasks.has_handle.wait()
        await pause(service, on=False)
        found: Any = await call
        assert (found.is_error, found.structured_content["error"]["code"]) == (True, "content_policy")


async def test_a_client_that_leaves_ends_the_wait_and_not_the_task(
    start_paid: StartService, upstream: EmulatedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint, "WAIT_S", 60.0)
    service = await start_paid()
    await pause(service)
    began = asyncio.Event()

    async def begin(progress: float, total: float | None, message: str | None) -> None:
        began.set()

    async with Client(address(service)) as client:
        call = asyncio.create_task(client.call_tool("generate_image", {"prompt": "left"}, progress_callback=begin))
        await began.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
    await pause(service, on=False)
    await upstream.ledger.wait_for(lambda ledger: len(ledger.paid) == 1)
    async with Client(address(service)) as client:
        found: Any = {"status": "processing"}
        while found["status"] == "processing":
            found = (await client.call_tool("generate_image", {"prompt": "left"})).structured_content
    assert found["status"] == "completed"
    assert len(upstream.ledger.paid) == 1


async def test_a_key_has_tasks_and_a_budget_of_its_own(start_paid: StartService, upstream: EmulatedUpstream) -> None:
    secrets = ("secret-of-a-key", "secret-of-another")
    hashes = {f"k{place}": hashlib.sha256(text.encode()).hexdigest() for place, text in enumerate(secrets)}
    service = await start_paid(api_keys=hashes, budget_daily_micro_usd=1_000)
    one, other = [httpx2.AsyncClient(headers={"Authorization": f"Bearer {text}"}, timeout=60) for text in secrets]
    async with one, other:
        async with Client(streamable_http_client(address(service), http_client=one)) as client:
            made: Any = (await client.call_tool("generate_image", {"prompt": "a"})).structured_content
            while made["status"] != "completed":
                made = (await client.call_tool("get_image_task", {"taskId": made["taskId"]})).structured_content
            over = await client.call_tool("generate_image", {"prompt": "b"})
            assert (over.is_error, over.structured_content["error"]["code"]) == (True, "budget_exceeded")
            assert over.structured_content["error"]["estimatedCostUsd"] > 0
        async with Client(streamable_http_client(address(service), http_client=other)) as client:
            hidden = await client.call_tool("get_image_task", {"taskId": made["taskId"]})
            unknown = await client.call_tool("get_image_task", {"taskId": "0" * 32})
            assert hidden.structured_content == unknown.structured_content
            assert hidden.content == unknown.content
            assert (await client.call_tool("cancel_image_task", {"taskId": made["taskId"]})).is_error
    assert len(upstream.ledger.paid) == 1
