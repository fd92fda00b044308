"""Tests of POST /v1/images/generations: responses, the shared queue, and how long a client waits."""

from __future__ import annotations

import asyncio
import base64
import time
from pathlib import Path
from typing import Any

import pytest

from imagegen.tasks.task import State
from imagegen.web.handler_services import SERVICES
from imagegen.web.openai.client_calls import Mark, Marking
from imagegen.web.openai.sdk_retries import mark_of, wait_limit_s
from tests.emulator_fixtures import EmulatedUpstream
from tests.support import eventually, over_rows
from tests.web.openai.conftest import Serve, Service

IMPATIENT = {"x-stainless-read-timeout": "0.3"}
REPEAT = {"x-stainless-retry-count": "1"}


def remove_files(folder: Path, task_id: str) -> int:
    """Delete the files of a task and return their number."""
    files = [path for path in folder.rglob("*") if path.is_file() and task_id in str(path)]
    for path in files:
        path.unlink()
    return len(files)


async def test_the_response_fits_both_clients(service: Service, upstream: EmulatedUpstream) -> None:
    began = time.time()
    answer = await service.generate(model="some/model", size="64x128", n=2)
    body = await answer.json()
    assert answer.status == 200
    assert began - 5 < body.pop("created") < time.time() + 5  # it is a time of the server of Redis, as far as known
    links = [entry.pop("url") for entry in body["data"]]
    assert body == {
        "id": body["id"],
        "object": "list",
        "model": "some/model",
        "data": [{"index": 0, "type": "url"}, {"index": 1, "type": "url"}],
    }
    for link in links:
        assert link.startswith(f"{service.url}/api/images/{body['id']}/")
        assert (await service.fetch_image(link)).startswith(b"\xff\xd8")
    assert upstream.ledger.total == 1


@pytest.mark.parametrize("name", ["b64_json", "base64"])
async def test_base64_holds_the_linked_image(service: Service, name: str) -> None:
    (entry,) = (await (await service.generate(response_format=name, seed=1)).json())["data"]
    (linked,) = (await (await service.generate(seed=1)).json())["data"]
    assert (entry["index"], entry["type"], "url" in entry) == (0, "b64_json", False)
    assert base64.b64decode(entry["b64_json"]) == await service.fetch_image(linked["url"])


async def test_links_have_the_public_base(serve: Serve) -> None:
    service = await serve(public_url="https://pictures.example.org")
    (entry,) = (await (await service.generate()).json())["data"]
    assert entry["url"].startswith("https://pictures.example.org/api/images/")


async def test_all_paths_are_one_route_and_one_task(service: Service, upstream: EmulatedUpstream) -> None:
    paths = ("/v1/images/generations", "/images/generations", "/v1/v1/images/generations")
    answers = [await (await service.generate(path=path, seed=1)).json() for path in paths]
    assert answers[0] == answers[1] == answers[2]
    assert upstream.ledger.total == 1


async def test_the_task_equals_the_one_on_the_native_route(service: Service, upstream: EmulatedUpstream) -> None:
    here = await (await service.generate(model=None, seed=7, quality="hd")).json()
    body = {"prompt": "a cat", "width": 1024, "height": 1024, "seed": 7, "quality": "hd"}
    there = await (await service.request("POST", "/api/images/generate", json=body)).json()
    assert (here["id"], there["cached"]) == (there["taskId"], True)
    assert upstream.ledger.total == 1


@pytest.mark.parametrize(("reuse", "fields"), [("always", {}), ("retries", {"seed": 1}), ("retries", {"variant": 3})])
async def test_concurrent_requests_for_the_same_image_pay_once(
    serve: Serve, upstream: EmulatedUpstream, reuse: str, fields: dict[str, Any]
) -> None:
    service = await serve(v1_reuse=reuse)
    upstream.script({"fault": "ok", "delay_s": 0.1})
    answers = await asyncio.gather(*(service.generate(**fields) for _ in range(20)))
    assert {answer.status for answer in answers} == {200}
    assert len({(await answer.json())["id"] for answer in answers}) == 1
    assert upstream.ledger.total == 1


async def test_a_client_is_answered_before_its_timeout_and_may_repeat(
    service: Service, upstream: EmulatedUpstream
) -> None:
    upstream.script({"fault": "ok", "held": 1})
    asked_at = time.monotonic()
    early = await service.generate(IMPATIENT)
    took_s = time.monotonic() - asked_at
    error = (await early.json())["error"]
    assert took_s >= 0.25
    assert (early.status, error["code"], error["type"]) == (503, "unfinished", "server_error")
    assert early.headers["retry-after"] == "1"
    assert "x-should-retry" not in early.headers
    await upstream.ledger.wait_for(lambda ledger: ledger.in_flight)
    upstream.release()
    repeated = await service.generate(REPEAT)
    assert (repeated.status, upstream.ledger.total) == (200, 1)
    assert early.headers["Location"] == f"/api/images/{(await repeated.json())['id']}"


@over_rows(
    ("given", "patience"),
    [
        (None, 54.0),
        ("60", 54.0),
        ("600", 90.0),
        ("3", 2.7),
        ("0.5", 0.45),
        ("None", 54.0),
        ("", 54.0),
        ("-1", 54.0),
        ("0", 54.0),
        ("nan", 54.0),
        ("inf", 54.0),
    ],
)
@over_rows("name", ["x-stainless-read-timeout", "x-stainless-timeout"])
def test_an_sdk_waits_slightly_shorter_than_its_timeout(name: str, given: str | None, patience: float) -> None:
    headers = {"x-stainless-retry-count": "0"} | ({} if given is None else {name: given})
    assert wait_limit_s(headers, 300.0) == pytest.approx(patience)


@over_rows("headers", [{}, {"user-agent": "Together/v1 PythonBindings/1.5.35"}])
def test_a_client_without_marks_waits_for_the_longest_time(headers: dict[str, str]) -> None:
    assert wait_limit_s(headers, 300.0) == pytest.approx(297.0)


async def test_a_client_that_prefers_async_gets_a_location(service: Service, upstream: EmulatedUpstream) -> None:
    upstream.script({"fault": "ok", "delay_s": 0.2})
    accepted = await service.generate({"Prefer": "respond-async"})
    body = await accepted.json()
    assert (accepted.status, accepted.headers["Preference-Applied"]) == (202, "respond-async")
    assert accepted.headers["Location"] == f"/api/images/{body['id']}"
    assert body["status_url"] == service.url + accepted.headers["Location"]
    assert body["status"] in {"pending", "processing"}

    async def done() -> bool:
        answer = await service.request("GET", accepted.headers["Location"])
        return bool((await answer.json())["status"] == "completed")

    await eventually(done)
    assert (await service.generate({"Prefer": "respond-async"} | REPEAT)).status == 200


async def test_an_async_client_may_wait_first(service: Service, upstream: EmulatedUpstream) -> None:
    upstream.script({"fault": "ok", "delay_s": 0.1})
    assert (await service.generate({"Prefer": "respond-async, wait=60"})).status == 200


async def test_no_cache_generates_again_except_for_sdk_retries(serve: Serve, upstream: EmulatedUpstream) -> None:
    service = await serve(v1_reuse="always")
    fresh = {"Cache-Control": "no-cache"}
    first, second, repeated = [
        await (await service.generate(headers)).json() for headers in ({}, fresh, fresh | REPEAT)
    ]
    assert first["id"] == second["id"]
    assert second["data"] == repeated["data"] != first["data"]
    assert upstream.ledger.total == 2


async def test_a_deleted_image_is_generated_again(service: Service, upstream: EmulatedUpstream, tmp_path: Path) -> None:
    task_id = (await (await service.generate(seed=1)).json())["id"]
    assert remove_files(tmp_path, task_id) == 1
    assert (await service.generate(response_format="b64_json", seed=1)).status == 200
    assert upstream.ledger.total == 2


async def test_links_of_the_provider_have_no_bytes_to_give(serve: Serve) -> None:
    service = await serve(image_store="upstream")
    by_link = await (await service.generate(seed=1)).json()
    assert by_link["data"][0]["url"].startswith("http://127.0.0.1")
    refused = await service.generate(response_format="b64_json", seed=1)
    assert (refused.status, (await refused.json())["error"]["param"]) == (400, "response_format")


async def test_dropped_parameters_are_reported(service: Service, upstream: EmulatedUpstream) -> None:
    answer = await service.generate(guidance_scale=3)
    (warning,) = (await answer.json())["warnings"]
    assert warning.startswith("guidance_scale was left out")


async def test_a_stopping_service_answers_immediately_and_closes(service: Service, upstream: EmulatedUpstream) -> None:
    upstream.script("hang")
    waiting = asyncio.create_task(service.generate())
    await upstream.ledger.wait_for(lambda ledger: ledger.total == 1)
    context = service.app[SERVICES]
    context.readiness.draining = True
    context.feed.wake_all()
    answer = await waiting
    assert (answer.status, answer.headers["retry-after"], answer.headers["Connection"]) == (503, "1", "close")
    refused = await service.generate(prompt="another")
    assert (refused.status, (await refused.json())["error"]["code"]) == (503, "draining")


async def test_a_cancelled_task_is_a_conflict_without_retry(service: Service, upstream: EmulatedUpstream) -> None:
    upstream.script("hang")
    waiting = asyncio.create_task(service.generate())
    await upstream.ledger.wait_for(lambda ledger: ledger.total == 1)
    queue = service.app[SERVICES].queue
    task_id = (await (await service.generate({"Prefer": "respond-async"} | REPEAT)).json())["id"]
    await queue.cancel(task_id)
    for answer in (await waiting, await service.generate(REPEAT)):
        assert (answer.status, answer.headers["x-should-retry"]) == (409, "false")
        assert (await answer.json())["error"]["code"] == "cancelled"
    assert upstream.ledger.total == 1


@pytest.mark.parametrize(
    ("fault", "status", "code", "kind", "param"),
    [
        ("422_nsfw", 400, "content_policy_violation", "invalid_request_error", "prompt"),
        ("400_multiple", 400, "upstream_invalid_request", "invalid_request_error", None),
        ("404_model", 404, "model_not_available", "invalid_request_error", "model"),
        ("401", 502, "upstream_auth", "server_error", None),
        ("402", 502, "upstream_billing", "server_error", None),
        ("503", 503, "upstream_overloaded", "server_error", None),
        ("500", 502, "upstream_error", "server_error", None),
        ("no_images", 502, "upstream_bad_response", "server_error", None),
    ],
)
async def test_a_failed_task_is_an_error_response(
    serve: Serve, fault: str, status: int, code: str, kind: str, param: str | None
) -> None:
    service = await serve(max_attempts=1)
    answer = await service.generate(prompt=f"{{{{fault:{fault}}}}}")
    error = (await answer.json())["error"]
    assert error.pop("message")
    assert (answer.status, error) == (status, {"type": kind, "param": param, "code": code})
    assert answer.headers["x-should-retry"] == "false"
    assert ("retry-after" in answer.headers) == (status == 503)


async def test_a_rate_limited_task_past_its_deadline_is_429(serve: Serve) -> None:
    service = await serve(task_deadline_s=6)
    answer = await service.generate(prompt="{{fault:429 retry_after=30}}")
    assert (answer.status, (await answer.json())["error"]["code"]) == (429, "upstream_rate_limited")
    assert 1 <= int(answer.headers["retry-after"]) <= 60


async def test_a_lost_call_is_504_and_sdk_retries_do_not_pay_again(serve: Serve, upstream: EmulatedUpstream) -> None:
    service = await serve(upstream_timeout_s=2.5)
    first = await service.generate(prompt="{{fault:hang}}")
    assert (first.status, first.headers["x-should-retry"]) == (504, "false")
    paid = upstream.ledger.paid_total
    again = await service.generate(REPEAT, prompt="{{fault:hang}}")
    assert (again.status, await again.json()) == (504, await first.json())
    assert upstream.ledger.paid_total == paid == 2


async def test_an_sdk_retry_gets_the_failure_that_it_missed(service: Service, upstream: EmulatedUpstream) -> None:
    prompt = "{{fault:422_nsfw held=1}}"
    early = await service.generate(IMPATIENT, prompt=prompt)
    await upstream.ledger.wait_for(lambda ledger: ledger.in_flight)
    upstream.release()
    failed = early.headers["Location"].rpartition("/")[2]

    async def ended() -> bool:
        task = await service.app[SERVICES].queue.get(failed)
        return task is not None and task.state is State.FAILED

    await eventually(ended)
    assert (await service.generate(REPEAT, prompt=prompt)).status == 400
    assert upstream.ledger.total == 1
    new_call = asyncio.create_task(service.generate(prompt=prompt))
    await upstream.ledger.wait_for(lambda ledger: ledger.total == 2)
    upstream.release()
    assert (await new_call).status == 400


async def test_an_sdk_retry_gets_the_failure_and_a_new_call_is_a_new_try(
    serve: Serve, upstream: EmulatedUpstream
) -> None:
    service = await serve(max_attempts=1)
    upstream.script("503")
    first = await service.generate()
    again = await service.generate(REPEAT)
    assert (again.status, await again.json()) == (503, await first.json())
    assert upstream.ledger.total == 1
    assert (await service.generate()).status == 200


async def test_a_gateway_timeout_costs_two_calls_at_most(serve: Serve, upstream: EmulatedUpstream) -> None:
    service = await serve(retry_base_s=0.01)
    first = await service.generate(prompt="{{fault:524}}")
    assert (first.status, first.headers["x-should-retry"]) == (502, "false")
    for headers in (REPEAT, REPEAT | {"x-stainless-retry-count": "2"}):
        assert (await service.generate(headers, prompt="{{fault:524}}")).status == 502
    assert upstream.ledger.total == 2


async def test_a_possibly_paid_call_is_marked_not_retryable(serve: Serve, upstream: EmulatedUpstream) -> None:
    service = await serve(retry_base_s=0.01, max_attempts=2)
    upstream.script("504", "500")
    answer = await service.generate()
    assert (answer.status, answer.headers["x-should-retry"]) == (502, "false")


@over_rows(
    ("headers", "expected"),
    [
        ({}, Mark(Marking.NEW)),
        ({"x-stainless-retry-count": "0"}, Mark(Marking.UNSURE)),
        ({"x-stainless-retry-count": "2"}, Mark(Marking.REPEAT, 2)),
        ({"x-stainless-retry-count": "many"}, Mark(Marking.REPEAT, 1)),
        ({"user-agent": "OpenAI/Python 3.54.0"}, Mark(Marking.NEW)),
        ({"user-agent": "Together/v1 PythonBindings/1.5.35"}, Mark(Marking.UNSURE)),
        ({"user-agent": "ai/6.0.326 ai-sdk/openai/3.0.141 runtime/node.js/20"}, Mark(Marking.UNSURE)),
        ({"user-agent": "litellm/1.106.2"}, Mark(Marking.UNSURE)),
    ],
)
def test_a_repeat_is_recognized_by_its_headers(headers: dict[str, str], expected: Mark) -> None:
    assert mark_of(headers) == expected
