"""Tests of the size of results: under 2,000 tokens whatever prompts, providers, settings and queues put into them."""

from __future__ import annotations

import hashlib
from typing import Any

import jsonschema
import orjson
import pytest

from imagegen.web.mcp.result_limits import MAX_RESULT_CHARS, fit, size_of
from tests.emulator_fixtures import EmulatedUpstream
from tests.mcp_wire import SCHEMAS, TASKS, call, modern, result, send, tokens
from tests.web.conftest import Client, StartService

MAX_TOKENS = 2_000
PROMPT = "a fox, " * 4_500 + "and a hen"


async def small(service: Client, name: str, headers: dict[str, str] | None = None, **arguments: Any) -> dict[str, Any]:
    """Return a result that an agent can read."""
    found = await result(service, call(name, **arguments), headers)
    assert tokens(found) < MAX_TOKENS, (name, arguments, tokens(found))
    return found


async def test_prompts_of_32000_characters_are_not_echoed(start_paid: StartService, upstream: EmulatedUpstream) -> None:
    service = await start_paid(max_attempts=1)
    for prompt in (PROMPT, "狐" * 32_000, '"\\' * 16_000):
        upstream.script(
            {"fault": "status", "status": 400, "body": orjson.dumps({"error": {"message": prompt}}).decode()}
        )
        await small(service, "quote_image", prompt=prompt)
        failed = await small(service, "generate_image", prompt=prompt)
        assert failed["structuredContent"]["status"] == "failed"
        await small(service, "get_image_task", taskId=failed["structuredContent"]["taskId"])
        done = await small(service, "generate_image", prompt=prompt[:-1])
        assert done["structuredContent"]["status"] == "completed"
        poll = modern("tasks/get", taskId=done["structuredContent"]["taskId"], capabilities=TASKS)
        assert tokens((await send(service, poll))[1]) < MAX_TOKENS
    assert (await small(service, "generate_image", prompt=PROMPT + " " + PROMPT))["isError"]


HUGE = {
    "ascii": "x" * 500_000,
    "chinese": "错误" * 100_000,
    "escapes": "\\u0001\\\\" * 50_000,
    "html": "<html>" + "<p>no</p>" * 40_000,
}


@pytest.mark.parametrize("text", HUGE.values(), ids=HUGE.keys())
async def test_a_huge_error_of_the_provider_is_cut(
    start_paid: StartService, upstream: EmulatedUpstream, text: str
) -> None:
    service = await start_paid(max_attempts=1)
    for status in (400, 500):
        body = f'{{"error": {{"message": "{text}"}}}}' if "<" not in text else text
        upstream.script({"fault": "status", "status": status, "body": body})
        failed = await small(service, "generate_image", prompt=f"{status}")
        assert failed["structuredContent"]["status"] == "failed"


async def test_wrong_arguments_are_cut_in_their_error(service: Client) -> None:
    wrong: tuple[dict[str, Any], ...] = (
        {f"字段{number}" * 300: number for number in range(200)},
        {f"\u0001{number}" * 300: number for number in range(200)},
        {"prompt": "a", "model": "m" * 100_000},
        {"prompt": "a", "extra": {"深" * 5_000: 1}},
        {"prompt": "a", "referenceImages": ["x" * 10_000] * 16},
        {"prompt": "a", "outputFormat": "f" * 100_000, "aspectRatio": "比" * 10_000, "resolution": "r" * 10_000},
        {"prompt": "a", "detail": "d" * 100_000},
    )
    for arguments in wrong:
        for name in ("generate_image", "edit_image", "quote_image"):
            assert (await small(service, name, **arguments))["isError"]
    for name in ("get_image_task", "cancel_image_task"):
        assert (await small(service, name, taskId="t" * 100_000))["isError"]
    assert (await small(service, "list_image_models", model="m" * 100_000))["isError"]
    await small(service, "list_image_models", filter="f" * 100_000)


async def test_sixteen_links_of_a_long_public_address_are_whole(start_service: StartService) -> None:
    service = await start_service(public_url="https://images.example.org/" + "a-long-prefix/" * 10)
    found = await small(service, "generate_image", prompt="many", n=16, width=64, height=64)
    urls = found["structuredContent"]["urls"]
    assert (len(set(urls)), min(map(len, urls)) > 170) == (16, True)


async def test_sixteen_signed_links_are_all_there(start_service: StartService) -> None:
    key = "a-key-of-a-client"
    service = await start_service(
        public_url="https://images.example.org", api_keys={"client": hashlib.sha256(key.encode()).hexdigest()}
    )
    headers = {"Authorization": f"Bearer {key}"}
    found = await small(service, "generate_image", headers, prompt="many", n=16, width=64, height=64)
    links = [block for block in found["content"] if block["type"] == "resource_link"]
    urls = found["structuredContent"]["urls"]
    assert ([link["uri"] for link in links], len(set(urls))) == (urls, 16)
    assert all("sig=" in url for url in urls)
    path = urls[15].removeprefix("https://images.example.org")
    assert (await service.get(path)).status == 200


async def test_each_model_and_its_quote_are_small(service: Client) -> None:
    await small(service, "list_image_models")
    listing = (await service.get("/api/models")).json()
    for model in (await listing)["models"]:
        await small(service, "list_image_models", model=model["id"])
        await small(service, "quote_image", prompt="a", model=model["id"])


async def test_hundreds_of_tasks_make_no_result_longer(start_paid: StartService, upstream: EmulatedUpstream) -> None:
    upstream.set_fault("hang")
    service = await start_paid(worker_concurrency=1)
    for start in range(0, 300, 50):
        entries = [{"prompt": f"image {number}"} for number in range(start, start + 50)]
        assert (await service.post("/api/images/batch", json={"requests": entries})).status == 200
    quote = await small(service, "quote_image", prompt="one more")
    assert quote["structuredContent"]["queuePosition"] >= 299
    await small(service, "list_image_models")
    task_id = quote["structuredContent"]["taskId"]
    assert (await small(service, "get_image_task", taskId=task_id))["isError"]


def test_a_result_is_cut_until_it_fits_and_keeps_what_is_of_no_use_in_part() -> None:
    urls = [f"https://example.org/{'u' * 150}/{number}" for number in range(16)]
    view: dict[str, Any] = {"taskId": "0" * 32, "status": "failed", "urls": urls, "warnings": ["警告" * 2_000] * 40}
    view |= {
        "error": {"code": "upstream_error", "message": "m" * 9_000, "retryable": False, "details": ["d" * 900] * 30}
    }
    links = [{"type": "resource_link", "uri": url, "name": "a"} for url in urls]
    content, structured = fit([{"type": "text", "text": "t" * 20_000}, *links], view)
    assert size_of(content, structured) <= MAX_RESULT_CHARS
    assert (structured["urls"], structured["taskId"]) == (urls, "0" * 32)
    jsonschema.validate(structured, SCHEMAS["generate_image"])
    assert fit(content, structured) == (content, structured)
