"""Tests of blind repeats: an agent without an answer repeats its call, and pays only for what can still succeed."""

from __future__ import annotations

from typing import Any

import pytest

from imagegen.app import QUEUE
from tests.emulator_fixtures import EmulatedUpstream
from tests.mcp_wire import call, result
from tests.web.conftest import Client, StartService


async def made(service: Client, **arguments: Any) -> dict[str, Any]:
    return await result(service, call("generate_image", **{"prompt": "a fox"} | arguments))


@pytest.mark.parametrize(("fault", "code"), [("400_policy", "content_policy"), ("400", "upstream_invalid_request")])
async def test_a_request_that_was_refused_is_not_sent_again(
    paid: Client, upstream: EmulatedUpstream, fault: str, code: str
) -> None:
    upstream.script(fault)
    first = await made(paid)
    calls = upstream.ledger.total
    for _ in range(3):
        again = await made(paid)
        assert (again["isError"], again["structuredContent"]) == (True, first["structuredContent"])
        assert again["structuredContent"]["error"]["code"] == code
        assert "pays nothing" in again["content"][0]["text"]
    assert upstream.ledger.total == calls
    assert (await made(paid, variant=1))["structuredContent"]["status"] == "completed"


async def test_a_restarted_service_remembers_the_refusal(start_paid: StartService, upstream: EmulatedUpstream) -> None:
    upstream.script("400_policy")
    service = await start_paid()
    await made(service)
    await service.close()
    again = (await made(await start_paid()))["structuredContent"]
    assert again["error"]["code"] == "content_policy"
    assert upstream.ledger.total == 1


async def test_a_failure_that_may_pass_is_tried_again_and_the_answer_shows_it(
    start_paid: StartService, upstream: EmulatedUpstream
) -> None:
    service = await start_paid(max_attempts=1)
    upstream.script("500")
    first = await made(service)
    assert first["structuredContent"]["error"]["retryable"] is True
    assert "tries again" in first["content"][0]["text"]
    assert (await made(service))["structuredContent"]["status"] == "completed"


async def test_what_the_operator_has_mended_is_tried_again(paid: Client, upstream: EmulatedUpstream) -> None:
    upstream.script({"fault": "404_model"})
    failed = (await made(paid, model="some/model"))["structuredContent"]
    assert failed["error"]["code"] == "model_not_available"
    assert (await made(paid, model="some/model"))["structuredContent"]["status"] == "completed"


async def test_a_program_may_try_a_refused_request_again(paid: Client, upstream: EmulatedUpstream) -> None:
    upstream.script("400_policy")
    await made(paid)
    submitted = await paid.post("/api/images/generate?wait=20", json={"prompt": "a fox"})
    assert (await submitted.json())["status"] == "completed"


async def test_a_cancelled_task_is_begun_again_by_the_same_call(paid: Client, upstream: EmulatedUpstream) -> None:
    upstream.script("hang")
    submitted = await (await paid.post("/api/images/generate", json={"prompt": "a fox"})).json()
    await upstream.ledger.wait_for(lambda ledger: ledger.total == 1)
    cancelled = await result(paid, call("cancel_image_task", taskId=submitted["taskId"]))
    assert cancelled["structuredContent"]["status"] == "cancelled"
    assert (await made(paid))["structuredContent"]["status"] == "completed"


async def test_a_call_is_accepted_while_lost_records_are_written_back(paid: Client, upstream: EmulatedUpstream) -> None:
    paid.app[QUEUE].task_lookup.is_recovering = lambda: True
    assert (await made(paid))["structuredContent"]["status"] == "completed"
    assert len(upstream.ledger.paid) == 1
