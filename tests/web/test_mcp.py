"""Tests of POST /mcp by scripted messages: both wires, their errors, waits, limits, budgets and scopes."""

from __future__ import annotations

import base64
import hashlib
import io
from typing import Any

import jsonschema
import pytest
from PIL import Image

from imagegen.tasks.validation import GenerationParams
from imagegen.web.api import tasks
from imagegen.web.mcp import endpoint
from imagegen.web.mcp.tool_definitions import listing
from imagegen.web.openapi.json_schemas import Schemas
from tests.emulator_fixtures import EmulatedUpstream
from tests.mcp_wire import (
    LEGACY,
    SCHEMAS,
    TASKS,
    call,
    events,
    headers_of,
    message,
    modern,
    pause,
    result,
    send,
    tokens,
)
from tests.support import eventually
from tests.web.conftest import Client, StartService

IMAGE_USD = 0.000708
"""Of FLUX.1-schnell at 512 x 512."""


@pytest.fixture
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait 0.3 s for a task, with progress each 0.1 s."""
    monkeypatch.setattr(endpoint, "WAIT_S", 0.3)
    monkeypatch.setattr(tasks, "REPORT_S", 0.1)


async def test_discovery_names_versions_tools_and_tasks(service: Client) -> None:
    found = await result(service, modern("server/discover"))
    assert found["resultType"] == "complete"
    assert found["supportedVersions"][0] == "2026-07-28"
    assert found["capabilities"] == {"tools": {}} | TASKS
    listed = await result(service, modern("tools/list"))
    assert [tool["name"] for tool in listed["tools"]] == [
        "generate_image",
        "edit_image",
        "get_image_task",
        "cancel_image_task",
        "list_image_models",
        "quote_image",
    ]
    assert (listed["ttlMs"] > 0, listed["cacheScope"]) == (True, "public")
    assert tokens(listed) < 6_000


def test_the_arguments_of_tools_are_the_fields_of_the_api() -> None:
    fields = Schemas([GenerationParams]).components["GenerationParams"]["properties"]
    for tool in listing():
        is_submit = "prompt" in tool["inputSchema"]["properties"]
        jsonschema.Draft202012Validator.check_schema(tool["inputSchema"])
        jsonschema.Draft202012Validator.check_schema(tool["outputSchema"])
        assert "$ref" not in str(tool)
        for name, schema in tool["inputSchema"]["properties"].items():
            if is_submit and name in fields and name != "imageUrl":
                assert schema.keys() | {"pattern", "items"} >= fields[name].keys()
                assert all(fields[name][key] == value for key, value in schema.items() if key != "items")


@pytest.mark.parametrize("path", ["/mcp/", "/mcp//"])
async def test_a_slash_more_is_the_same_route(service: Client, path: str) -> None:
    sent = modern("tools/list")
    answer = await service.post(path, json=sent, headers=headers_of(sent))
    assert answer.status == 200
    assert len((await answer.json())["result"]["tools"]) == 6
    refused = await service.post(path, json={})
    assert (await refused.json())["jsonrpc"] == "2.0"


async def test_the_older_wire_begins_with_initialize_and_keeps_no_session(service: Client) -> None:
    for wanted, agreed in ((LEGACY, LEGACY), ("2024-11-05", "2024-11-05"), ("1999-01-01", LEGACY), (7, LEGACY)):
        response = await service.post("/mcp", json=message("initialize", protocolVersion=wanted, capabilities={}))
        begun = (await response.json())["result"]
        assert (begun["protocolVersion"], begun["serverInfo"]["name"]) == (agreed, "imagegen")
        assert "Mcp-Session-Id" not in response.headers
        assert begun["capabilities"] == {"tools": {}}
    noted = await service.post("/mcp", json={"jsonrpc": "2.0", "method": "notifications/initialized"})
    assert (noted.status, await noted.read()) == (202, b"")
    version = {"MCP-Protocol-Version": LEGACY}
    assert (await (await service.post("/mcp", json=message("ping"), headers=version)).json())["result"] == {}
    response = await service.post("/mcp", json=message("resources/list"), headers=version)
    assert (response.status, (await response.json())["error"]["code"]) == (200, -32601)
    for method in ("get", "delete"):
        assert (await getattr(service, method)("/mcp")).status == 405


async def test_a_client_without_a_version_gets_no_block_that_its_version_lacks(service: Client) -> None:
    body = message("tools/call", name="generate_image", arguments={"prompt": "a fox"})
    found = (await (await service.post("/mcp", json=body)).json())["result"]
    assert {block["type"] for block in found["content"]} == {"text", "image"}
    assert found["structuredContent"]["urls"][0] in found["content"][0]["text"]
    assert "resultType" not in found


async def test_a_result_has_links_one_thumbnail_and_few_tokens(paid: Client, upstream: EmulatedUpstream) -> None:
    found = await result(paid, call("generate_image", prompt="a fox", n=3, seed=5))
    assert (found["resultType"], found["isError"]) == ("complete", False)
    seen = found["structuredContent"]
    assert (seen["status"], seen["width"], seen["height"], seen["seed"], seen["cached"]) == (
        "completed",
        512,
        512,
        5,
        False,
    )
    assert seen["costUsd"] == pytest.approx(3 * IMAGE_USD)
    links = [block["uri"] for block in found["content"] if block["type"] == "resource_link"]
    assert links == seen["urls"]
    assert len(links) == 3
    for link in links:
        assert (await paid.get(link[link.index("/api/") :])).status == 200
    (thumbnail,) = [block for block in found["content"] if block["type"] == "image"]
    data = base64.b64decode(thumbnail["data"])
    assert len(data) < 20_000
    with Image.open(io.BytesIO(data)) as image:
        assert (image.format, max(image.size) <= 256) == ("WEBP", True)
    assert tokens(found) < 2_000
    again = (await result(paid, call("generate_image", prompt="a fox", n=3, seed=5)))["structuredContent"]
    assert (again["cached"], again["costUsd"], again["urls"]) == (True, 0.0, seen["urls"])
    assert sum(each.n for each in upstream.ledger.paid) == 3


async def test_sixteen_signed_links_are_under_2000_tokens(start_paid: StartService) -> None:
    secret = "a-secret-of-a-key"
    service = await start_paid(api_keys={"agent": hashlib.sha256(secret.encode()).hexdigest()})
    assert (await send(service, call("generate_image", prompt="many")))[0] == 401
    own = {"Authorization": f"Bearer {secret}"}
    found = await result(service, call("generate_image", prompt="many", n=16), own)
    urls = found["structuredContent"]["urls"]
    assert len({url for url in urls if "sig=" in url}) == 16
    assert (await service.get(urls[0][urls[0].index("/api/") :])).status == 200
    assert tokens(found) < 2_000


async def test_the_bytes_come_only_with_full_detail(service: Client) -> None:
    full = await result(service, call("generate_image", prompt="a fox", width=64, height=64, n=2, detail="full"))
    images = [block for block in full["content"] if block["type"] == "image"]
    assert [block["mimeType"] for block in images] == ["image/png"] * 2
    for url, block in zip(full["structuredContent"]["urls"], images, strict=True):
        assert await (await service.get(url[url.index("/api/") :])).read() == base64.b64decode(block["data"])


@pytest.mark.usefixtures("short_waits")
async def test_a_slow_task_is_a_handle_and_then_the_image(paid: Client, upstream: EmulatedUpstream) -> None:
    await pause(paid)
    handle = found = (await result(paid, call("generate_image", prompt="slow")))["structuredContent"]
    assert (handle["status"], handle["next"]) == ("pending", "call get_image_task")
    await pause(paid, on=False)
    while found["status"] != "completed":
        found = (await result(paid, call("get_image_task", taskId=handle["taskId"])))["structuredContent"]
    assert found["urls"]
    assert len(upstream.ledger.paid) == 1


async def test_progress_comes_at_once_and_then_in_time(paid: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "REPORT_S", 0.1)
    await pause(paid)
    body = call("generate_image", prompt="slow", meta={"progressToken": "p"})
    response = await paid.post("/mcp", json=body, headers=headers_of(body))
    assert response.headers["Content-Type"] == "text/event-stream"
    assert response.headers["X-Accel-Buffering"] == "no"
    blocks = [await response.content.readuntil(b"\r\n\r\n") for _ in range(3)]
    response.close()
    progress = events(b"".join(blocks).decode())
    values = [each["params"]["progress"] for each in progress]
    assert len(values) == 3
    assert values == sorted(set(values))
    assert {each["params"]["progressToken"] for each in progress} == {"p"}


@pytest.mark.usefixtures("short_waits")
async def test_progress_ends_with_the_handle_of_an_unfinished_task(paid: Client) -> None:
    await pause(paid)
    body = call("generate_image", prompt="slow", meta={"progressToken": "p"})
    response = await paid.post("/mcp", json=body, headers=headers_of(body))
    *progress, last = events(await response.text())
    assert {each["params"]["progressToken"] for each in progress} == {"p"}
    assert (last["id"], last["result"]["structuredContent"]["status"]) == (body["id"], "pending")
    plain = headers_of(body) | {"Accept": "application/json"}
    assert (await paid.post("/mcp", json=body, headers=plain)).headers["Content-Type"].startswith("application/json")


async def test_a_closed_connection_ends_the_wait_and_not_the_task(paid: Client, upstream: EmulatedUpstream) -> None:
    upstream.script({"fault": "ok", "delay_s": 0.4})
    body = call("generate_image", prompt="left", meta={"progressToken": 1})
    response = await paid.post("/mcp", json=body, headers=headers_of(body))
    await response.content.readany()
    response.close()
    seen = (await result(paid, call("generate_image", prompt="left")))["structuredContent"]
    assert seen["status"] == "completed"
    assert len(upstream.ledger.paid) == 1


@pytest.mark.usefixtures("short_waits")
async def test_the_extension_of_tasks_has_our_tasks(paid: Client, upstream: EmulatedUpstream) -> None:
    upstream.script("ok", {"fault": "ok", "delay_s": 30})
    await pause(paid)
    created = await result(paid, call("generate_image", prompt="slow", capabilities=TASKS))
    assert (created["resultType"], created["status"]) == ("task", "working")
    assert created["ttlMs"] > 0
    poll = modern("tasks/get", taskId=created["taskId"], capabilities=TASKS)
    seen = await result(paid, poll)
    assert (seen["resultType"], seen["pollIntervalMs"] > 0) == ("complete", True)
    await pause(paid, on=False)

    async def ended() -> bool:
        return bool((await result(paid, poll))["status"] != "working")

    await eventually(ended)
    seen = await result(paid, poll)
    assert seen["status"] == "completed"
    jsonschema.validate(seen["result"]["structuredContent"], SCHEMAS["generate_image"])
    other = await result(paid, call("generate_image", prompt="other", capabilities=TASKS))
    cancel = modern("tasks/cancel", taskId=other["taskId"], capabilities=TASKS)
    assert (await result(paid, cancel))["resultType"] == "complete"
    state = modern("tasks/get", taskId=other["taskId"], capabilities=TASKS)
    assert (await result(paid, state))["status"] == "cancelled"
    assert await result(paid, modern("tasks/update", taskId=other["taskId"], inputResponses={}, capabilities=TASKS))
    for task_id in ("0" * 32, "x"):
        unknown = modern("tasks/get", taskId=task_id, capabilities=TASKS)
        assert (await send(paid, unknown))[1]["error"]["code"] == -32602
    status, answer = await send(paid, modern("tasks/get", taskId=created["taskId"]))
    assert (status, answer["error"]["code"]) == (400, -32021)


@pytest.mark.usefixtures("short_waits")
async def test_a_task_is_cancelled_and_a_finished_one_stays(
    paid: Client, upstream: EmulatedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    upstream.script({"fault": "ok", "delay_s": 30})
    handle = (await result(paid, call("generate_image", prompt="slow")))["structuredContent"]
    gone = (await result(paid, call("cancel_image_task", taskId=handle["taskId"])))["structuredContent"]
    assert gone["status"] == "cancelled"
    monkeypatch.setattr(endpoint, "WAIT_S", 60.0)
    done = (await result(paid, call("generate_image", prompt="quick")))["structuredContent"]
    kept = (await result(paid, call("cancel_image_task", taskId=done["taskId"])))["structuredContent"]
    assert (kept["status"], kept["urls"]) == ("completed", done["urls"])
    unknown = await result(paid, call("cancel_image_task", taskId="0" * 32))
    assert (unknown["isError"], unknown["structuredContent"]["error"]["code"]) == (True, "not_found")


async def test_a_failed_task_is_a_result_with_its_cause(paid: Client, upstream: EmulatedUpstream) -> None:
    upstream.script("400_policy")
    found = await result(paid, call("generate_image", prompt="no"))
    assert (found["isError"], found["structuredContent"]["status"]) == (True, "failed")
    assert found["structuredContent"]["error"]["code"] == "content_policy"
    assert "Change the prompt" in found["content"][0]["text"]


async def test_refusals_are_results_with_a_remedy(start_paid: StartService, upstream: EmulatedUpstream) -> None:
    service = await start_paid(budget_daily_micro_usd=1_500, image_rate_limit_max=4)
    wrong = await result(service, call("generate_image", prompt="a", width=7, detail="all"))
    assert wrong["isError"]
    assert "detail" in wrong["content"][0]["text"]
    wrong = await result(service, call("generate_image", prompt="a", width=7, webhok=1))
    assert {detail.split(":")[0] for detail in wrong["structuredContent"]["error"]["details"]} == {"width", "webhok"}
    over = (await result(service, call("generate_image", prompt="a", n=16)))["structuredContent"]["error"]
    assert (over["code"], over["estimatedCostUsd"]) == ("budget_exceeded", pytest.approx(16 * IMAGE_USD))
    assert over["resetsAt"]
    capped = await result(service, call("generate_image", prompt="a", n=2, maxCostUsd=0.001))
    assert capped["structuredContent"]["error"]["code"] == "max_cost_exceeded"
    assert "0.001416 USD" in capped["content"][0]["text"]
    limited = (await result(service, call("generate_image", prompt="a")))["structuredContent"]["error"]
    assert (limited["code"], limited["retryAfterSeconds"] > 0) == ("rate_limited", True)
    assert not upstream.ledger.calls
    assert not (await result(service, call("list_image_models")))["isError"]


async def test_a_quote_submits_nothing(paid: Client, upstream: EmulatedUpstream) -> None:
    wanted = {"prompt": "a fox", "n": 2, "width": 1024, "height": 1024}
    seen = (await result(paid, call("quote_image", **wanted)))["structuredContent"]
    assert (seen["cached"], seen["joins"], seen["queuePosition"]) == (False, False, 1)
    assert seen["costUsd"] == pytest.approx(2 * 4 * IMAGE_USD, rel=0.01)
    assert seen["limits"]["maxN"] == 4
    assert not upstream.ledger.calls
    made = (await result(paid, call("generate_image", **wanted)))["structuredContent"]
    assert made["taskId"] == seen["taskId"]
    again = (await result(paid, call("quote_image", **wanted)))["structuredContent"]
    assert (again["cached"], again["costUsd"], again["etaSeconds"]) == (True, 0.0, 0.0)
    unknown = (await result(paid, call("quote_image", prompt="a", model="nobody/knows")))["structuredContent"]
    assert (unknown["costUsd"], unknown["limits"]) == (None, None)
    assert (await result(paid, call("quote_image", prompt="a", width=7)))["isError"]


async def test_models_are_listed_in_short_or_one_in_full(paid: Client) -> None:
    found = await result(paid, call("list_image_models"))
    assert tokens(found) < 2_000
    assert found["structuredContent"]["models"][0]["id"] == "black-forest-labs/FLUX.1-schnell"
    few = (await result(paid, call("list_image_models", filter="KONTEXT")))["structuredContent"]["models"]
    assert {model["id"].lower().count("kontext") for model in few} == {1}
    one = (await result(paid, call("list_image_models", model=few[0]["id"])))["structuredContent"]["model"]
    assert one["capabilities"]["edit"] is True
    assert (await result(paid, call("list_image_models", model="none")))["isError"]
    assert (await result(paid, call("list_image_models", filter=[])))["isError"]


async def test_an_image_of_this_service_is_edited_by_its_link(service: Client) -> None:
    made = (await result(service, call("generate_image", prompt="a fox", width=64, height=64)))["structuredContent"]
    arguments = {"prompt": "in red", "imageUrl": made["urls"][0], "width": 64, "height": 64}
    quoted = (await result(service, call("quote_image", **arguments)))["structuredContent"]
    edited = (await result(service, call("edit_image", **arguments)))["structuredContent"]
    assert (edited["status"], edited["taskId"]) == ("completed", quoted["taskId"])
    link, task_id = made["urls"][0], made["taskId"]
    for wrong in (link.replace(task_id, "0" * 32), link.replace(f"{task_id}/0", f"{task_id}/7"), "", None):
        refused = await result(service, call("edit_image", prompt="in red", imageUrl=wrong))
        assert refused["structuredContent"]["error"]["details"][0].startswith("imageUrl:")


async def test_a_key_sees_and_joins_its_own_tasks_only(start_paid: StartService) -> None:
    secrets = ("secret-of-a-key", "secret-of-another")
    keys = {f"k{place}": hashlib.sha256(text.encode()).hexdigest() for place, text in enumerate(secrets)}
    service = await start_paid(api_keys=keys)
    as_a, as_b = ({"Authorization": f"Bearer {text}"} for text in secrets)
    own = (await result(service, call("generate_image", prompt="a"), as_a))["structuredContent"]
    other = (await result(service, call("generate_image", prompt="a"), as_b))["structuredContent"]
    assert own["taskId"] != other["taskId"]
    seen = await result(service, call("get_image_task", taskId=own["taskId"]), as_b)
    unknown = await result(service, call("get_image_task", taskId="0" * 32), as_b)
    assert seen == unknown
    stolen = await result(service, call("edit_image", prompt="a", imageUrl=own["urls"][0]), as_b)
    assert stolen["isError"]
    status, answer = await send(service, modern("tools/list"))
    assert (status, answer["error"]["data"]["code"]) == (401, "unauthorized")


WRONG_ARGUMENTS: tuple[dict[str, Any], ...] = (
    {},
    {"name": 7},
    {"name": []},
    {"name": "no_tool"},
    {"name": "generate_image", "arguments": []},
    {"name": "generate_image", "arguments": "x"},
    {"name": "generate_image", "arguments": {"prompt": "a"}, "_meta": []},
    {"name": "generate_image", "arguments": {"prompt": {"a": 1}}},
    {"name": "generate_image", "arguments": {"prompt": "a", "webhook": {"url": "https://example.com"}}},
    {"name": "generate_image", "arguments": {"prompt": "a", "imageUrl": "data:image/png;base64,AAAA"}},
    {"name": "edit_image", "arguments": {"prompt": "a", "imageUrl": ["x"], "referenceImages": [7]}},
    {"name": "edit_image", "arguments": {"prompt": "a", "imageUrl": "data:image/png;base64," + "A" * 50_000}},
    {"name": "get_image_task", "arguments": {"taskId": 7}},
    {"name": "get_image_task", "arguments": {"taskId": ""}},
    {"name": "cancel_image_task", "arguments": {"taskId": ""}},
    {"name": "get_image_task", "arguments": {"taskId": "../x", "\ud7ff": 1}},
    {"name": "cancel_image_task", "arguments": {"taskId": None}},
    {"name": "quote_image", "arguments": {"prompt": "a", "imageUrl": "data:image/png;base64,AAAA"}},
    {"name": "quote_image", "arguments": {"prompt": "a", "imageUrl": "upload:" + "0" * 64}},
)


async def test_a_token_that_is_too_long_to_be_repeated_gets_no_progress(service: Client) -> None:
    params = {"name": "generate_image", "arguments": {"prompt": "a"}}
    for token, content_type in (("t" * 1000, "text/event-stream"), ("t" * 1001, "application/json")):
        response = await service.post("/mcp", json=message("tools/call", **params, _meta={"progressToken": token}))
        assert (response.status, response.content_type) == (200, content_type)


async def test_faults_of_a_task_id_and_of_other_arguments_are_named_as_they_are(service: Client) -> None:
    refused = await result(service, call("get_image_task", taskId=7, task="x", **{"il y a": 1, "深": 2}))
    assert refused["structuredContent"]["error"]["details"] == [
        "taskId: must be a string: the taskId of an earlier result",
        "task: is no argument of this tool",
        "il y a: is no argument of this tool",
        "\\u6df1: is no argument of this tool",
    ]


async def test_wrong_arguments_are_no_fault_of_the_service(service: Client) -> None:
    for params in WRONG_ARGUMENTS:
        response = await service.post("/mcp", json=message("tools/call", **params))
        answer = await response.json()
        assert response.status in (200, 400)
        assert "error" in answer or answer["result"]["isError"] or params.get("_meta") == []


async def test_bodies_that_are_no_json_have_the_form_of_json_rpc_too(service: Client) -> None:
    for body, headers, status in (
        (b"x", {"Content-Type": "text/plain"}, 415),
        (io.BytesIO(b'{"a":"' + b"x" * 2**20 + b'"}'), {"Content-Type": "application/json"}, 413),
    ):
        response = await service.post("/mcp", data=body, headers=headers)
        assert response.status == status
        assert (await response.json())["error"]["data"]["statusCode"] == status


async def test_images_that_an_event_cannot_hold_are_left_to_the_next_call(
    start_paid: StartService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("imagegen.web.mcp.endpoint.MAX_STREAMED_BYTES", 100)
    service = await start_paid()
    body = call("generate_image", prompt="large", detail="full", meta={"progressToken": 1})
    response = await service.post("/mcp", json=body, headers=headers_of(body))
    last = events(await response.text())[-1]["result"]
    assert "call get_image_task with detail full" in last["content"][-1]["text"]
    task_id = last["structuredContent"]["taskId"]
    full = await result(service, call("get_image_task", taskId=task_id, detail="full"))
    assert full["content"][-1]["type"] == "image"
