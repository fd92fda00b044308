"""Tests of how long clients are held, the form of the images that they get, and the asynchronous routes."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import orjson
import pytest

from imagegen.web.openai import keepalive
from tests.emulator_fixtures import EmulatedUpstream
from tests.support import eventually, over_rows
from tests.web.openai.conftest import Serve, Service

SLOW = {"fault": "ok", "delay_s": 1.5}
HELD = {"fault": "ok", "held": 1}
SDK = {"x-stainless-retry-count": "0", "x-stainless-read-timeout": "0.3"}
ASYNC = "/v1/images/generations/async"


async def test_a_client_that_never_repeats_is_held_for_the_longest_wait(
    serve: Serve, upstream: EmulatedUpstream
) -> None:
    upstream.script("hang")
    service = await serve(v1_max_wait_s=0.7)
    asked_at = time.monotonic()
    early = await service.generate()
    assert (early.status, (await early.json())["error"]["code"]) == (503, "unfinished")
    assert 0.6 < time.monotonic() - asked_at < 20
    assert early.headers["retry-after"] == "1"


async def test_a_client_that_never_repeats_is_held_while_an_sdk_is_answered(
    service: Service, upstream: EmulatedUpstream
) -> None:
    upstream.script(HELD | {"times": 2})
    held = asyncio.create_task(service.generate())
    assert (await service.generate(SDK)).status == 503
    await upstream.ledger.wait_for(lambda ledger: ledger.in_flight == 2)
    upstream.release()
    assert (await held).status == 200


async def test_a_held_client_is_sent_spaces(
    serve: Serve, upstream: EmulatedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keepalive, "KEEPALIVE_S", 0.1)
    service = await serve(v1_keepalive=True)
    upstream.script(SLOW)
    asked_at = time.monotonic()
    answer = await service.generate()
    text = await answer.text()
    took_s = time.monotonic() - asked_at
    assert (answer.status, answer.content_type, answer.headers["x-request-id"] != "") == (200, "application/json", True)
    assert 1 <= len(text) - len(text.lstrip(" ")) <= took_s / keepalive.KEEPALIVE_S + 1
    assert len(orjson.loads(text)["data"]) == 1


async def test_a_quick_answer_has_no_spaces_and_its_status(serve: Serve) -> None:
    service = await serve(v1_keepalive=True, max_attempts=1)
    assert (await (await service.generate()).read()).startswith(b"{")
    assert (await service.generate(prompt="{{fault:422_nsfw}}")).status == 400


async def test_an_sdk_is_sent_no_spaces(
    serve: Serve, upstream: EmulatedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keepalive, "KEEPALIVE_S", 0.1)
    service = await serve(v1_keepalive=True)
    upstream.script(HELD)
    assert (await service.generate(SDK)).status == 503


@pytest.mark.parametrize(
    ("fault", "max_wait_s", "code"), [("422_nsfw", 60.0, "content_policy_violation"), ("hang", 4.0, "unfinished")]
)
async def test_a_late_error_of_a_held_client_is_in_the_body(
    serve: Serve, upstream: EmulatedUpstream, monkeypatch: pytest.MonkeyPatch, fault: str, max_wait_s: float, code: str
) -> None:
    monkeypatch.setattr(keepalive, "KEEPALIVE_S", 0.1)
    service = await serve(v1_keepalive=True, v1_max_wait_s=max_wait_s, max_attempts=1)
    upstream.script({"fault": fault, "held": 1})
    answer = await service.begin("POST", "/v1/images/generations", json={"prompt": "a cat"})
    await upstream.ledger.wait_for(lambda ledger: ledger.in_flight)
    upstream.release()
    assert (answer.status, (await answer.json())["error"]["code"]) == (200, code)


async def test_a_client_that_got_a_late_unfinished_joins_its_task(
    serve: Serve, upstream: EmulatedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keepalive, "KEEPALIVE_S", 0.1)
    service = await serve(v1_keepalive=True, v1_max_wait_s=0.3)
    upstream.script(HELD)
    assert "error" in await (await service.generate()).json()  # its status is 200 if spaces were sent in time
    await upstream.ledger.wait_for(lambda ledger: ledger.in_flight)
    upstream.release()

    async def repeated() -> bool:
        return "data" in await (await service.generate()).json()

    await eventually(repeated)
    assert upstream.ledger.total == 1


@pytest.mark.parametrize(
    ("setting", "model", "fields", "kind"),
    [
        (None, "some/model", {}, "url"),
        (None, "gpt-image-2", {}, "b64_json"),
        (None, "openai/chatgpt-image-latest", {}, "b64_json"),
        (None, "short", {}, "b64_json"),
        (None, "gpt-image-2", {"response_format": "url"}, "url"),
        ("url", "gpt-image-2", {}, "url"),
        ("b64_json", "some/model", {}, "b64_json"),
        ("b64_json", "some/model", {"response_format": "url"}, "url"),
        ("url", "some/model", {"response_format": "base64"}, "b64_json"),
    ],
)
async def test_the_form_of_the_images_is_as_clients_expect(
    serve: Serve, setting: str | None, model: str, fields: dict[str, Any], kind: str
) -> None:
    service = await serve(v1_response_format=setting, model_aliases={"short": "gpt-image-2"})
    answer = await service.generate(model=model, **fields)
    (entry,) = (await answer.json())["data"]
    assert (entry["type"], kind in entry) == (kind, True)


async def test_an_alias_of_another_model_answers_as_its_name_would(serve: Serve) -> None:
    service = await serve(model_aliases={"gpt-image-1": "some/model"})
    (entry,) = (await (await service.generate(model="gpt-image-1")).json())["data"]
    assert entry["type"] == "b64_json"


async def test_a_link_is_the_default_if_only_the_provider_has_the_bytes(serve: Serve) -> None:
    service = await serve(image_store="upstream")
    (entry,) = (await (await service.generate(model="gpt-image-2")).json())["data"]
    assert entry["type"] == "url"


async def test_an_asynchronous_call_is_polled_to_its_images(service: Service, upstream: EmulatedUpstream) -> None:
    upstream.script(HELD)
    accepted = await service.generate(path=ASYNC, n=2)
    body = await accepted.json()
    task_id = body["id"]
    assert (accepted.status, accepted.headers["Location"]) == (202, f"/v1/images/tasks/{task_id}")
    assert int(accepted.headers["Retry-After"]) >= 1
    assert body == {
        "id": task_id,
        "task_id": task_id,
        "object": "image.generation.task",
        "status": "processing",
        "created_at": body["created_at"],
        "expires_at": body["created_at"] + 86_400,
        "poll_url": f"{service.url}/v1/images/tasks/{task_id}",
    }
    poll = body["poll_url"].removeprefix(service.url)
    running = await service.request("GET", poll)
    assert (running.status, await running.json()) == (200, body)
    assert int(running.headers["Retry-After"]) >= 1
    await upstream.ledger.wait_for(lambda ledger: ledger.in_flight)
    upstream.release()

    async def completed() -> dict[str, Any] | None:
        found: dict[str, Any] = await (await service.request("GET", poll)).json()
        return found if found["status"] != "processing" else None

    await eventually(completed)
    done = await completed()
    assert done is not None
    assert done | {"expires_at": body["expires_at"]} == body | {
        "status": "completed",
        "http_status": 200,
        "image_url": done["image_url"],
        "result": {"created": body["created_at"], "data": done["result"]["data"]},
    }
    links = [entry["url"] for entry in done["result"]["data"]]
    assert (len(set(links)), links[0]) == (2, done["image_url"])
    for link in links:
        assert await service.fetch_image(link)


async def test_a_failed_asynchronous_task_has_the_status_and_the_error(serve: Serve) -> None:
    service = await serve(max_attempts=1)
    accepted = await (await service.generate(path=ASYNC, prompt="{{fault:422_nsfw}}")).json()

    async def failed() -> dict[str, Any] | None:
        answer = await service.request("GET", f"/v1/images/tasks/{accepted['id']}")
        found: dict[str, Any] = await answer.json()
        return found if found["status"] == "failed" else None

    await eventually(failed)
    task = await failed()
    assert task is not None
    assert (task["http_status"], task["error"]["code"]) == (400, "content_policy_violation")
    assert "result" not in task


async def test_equal_asynchronous_calls_are_different_images(service: Service, upstream: EmulatedUpstream) -> None:
    answers = await asyncio.gather(*(service.generate(path=ASYNC) for _ in range(3)))
    assert len({(await answer.json())["id"] for answer in answers}) == 3
    repeat = await service.generate({"x-stainless-retry-count": "1"}, path=ASYNC)
    assert (await repeat.json())["id"] in {(await answer.json())["id"] for answer in answers}


@over_rows("path", ["/v1/images/tasks/{}", "/images/tasks/{}", "/v1/v1/images/tasks/{}/", "/v1//images//tasks/{}"])
@over_rows("task_id", ["0" * 32, "nothing"])
async def test_an_unknown_asynchronous_task_is_a_404(service: Service, path: str, task_id: str) -> None:
    answer = await service.request("GET", path.format(task_id))
    error = (await answer.json())["error"]
    assert (answer.status, error["type"], error["code"]) == (404, "invalid_request_error", "not_found")


@over_rows("path", ["/images/generations/async", "/v1/v1/images/generations/async", "/v1//images/generations//async/"])
async def test_asynchronous_calls_have_all_paths(service: Service, path: str) -> None:
    answer = await service.generate(path=path)
    assert (answer.status, answer.headers["Location"].startswith("/v1/images/tasks/")) == (202, True)
    assert (await service.generate(path=path, n=99)).status == 400
