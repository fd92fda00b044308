"""Tests of the emulator's jobs, GPT image models and refused fields, in the shapes of their services."""

from __future__ import annotations

from typing import Any

import aiohttp
import pytest

from imagegen.emulator.jobs import DIALECTS
from tests.emulator_fixtures import EmulatedUpstream

KEY = {"Authorization": "Bearer a-key"}


async def post(upstream: EmulatedUpstream, path: str = "/v1/images/generations", **body: object) -> tuple[int, Any]:
    async with (
        aiohttp.ClientSession(headers=KEY) as session,
        session.post(upstream.url + path, json={"model": "m", "prompt": "a cat"} | body) as answer,
    ):
        return answer.status, await answer.json()


async def get(upstream: EmulatedUpstream, path: str, **headers: str) -> tuple[int, Any]:
    async with (
        aiohttp.ClientSession(headers=KEY | headers) as session,
        session.get(upstream.url + path) as answer,
    ):
        return answer.status, await answer.json()


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_a_job_is_charged_when_it_is_accepted_and_collected_by_a_poll(
    upstream: EmulatedUpstream, dialect: str
) -> None:
    await post(upstream, prompt=f"{{{{fault:job dialect={dialect} job_s=0}}}}")
    (job,) = upstream.ledger.jobs
    assert (job.charged, job.collected, upstream.ledger.paid_total) == (True, False, 1)
    for path in ("tasks", "images/tasks", "images/generations"):
        await get(upstream, f"/v1/{path}/{job.id}", **{"X-ModelScope-Task-Type": "image_generation"})
    assert job.collected


@pytest.mark.parametrize("end", ["failed", "policy"])
async def test_a_failed_job_is_refunded(upstream: EmulatedUpstream, end: str) -> None:
    await post(upstream, prompt=f"{{{{fault:job end={end} job_s=0}}}}")
    (job,) = upstream.ledger.jobs
    _, body = await get(upstream, f"/v1/tasks/{job.id}")
    assert (body["data"]["status"], upstream.ledger.paid_total) == ("failed", 0)


async def test_a_job_belongs_to_the_key_that_began_it(upstream: EmulatedUpstream) -> None:
    await post(upstream, prompt="{{fault:job job_s=0}}")
    path = f"/v1/tasks/{upstream.ledger.jobs[0].id}"
    assert (await get(upstream, path))[0] == 200
    assert (await get(upstream, path, Authorization="Bearer other"))[0] == 404


async def test_the_asynchronous_route_answers_as_sub2api_does(upstream: EmulatedUpstream) -> None:
    status, body = await post(upstream, "/v1/images/generations/async")
    assert (status, body["object"], body["status"]) == (202, "image.generation.task", "processing")
    assert body["poll_url"] == f"{upstream.url}/v1/images/tasks/{body['id']}"


async def test_a_gpt_image_model_answers_with_bytes_and_usage(upstream: EmulatedUpstream) -> None:
    _, body = await post(upstream, model="gpt-image-2", quality="low", n=2, size="1024x1536")
    assert [set(entry) for entry in body["data"]] == [{"b64_json"}] * 2
    assert (body["size"], body["quality"], body["background"]) == ("1024x1536", "low", "opaque")
    assert body["usage"]["total_tokens"] == body["usage"]["input_tokens"] + 2 * 272


async def test_a_gpt_image_model_refuses_what_it_does_not_take(upstream: EmulatedUpstream) -> None:
    status, body = await post(upstream, model="gpt-image-2", response_format="url")
    assert (status, body["error"]["param"], body["error"]["code"]) == (400, "response_format", "unknown_parameter")
    assert upstream.ledger.paid_total == 0


@pytest.mark.parametrize(("shape", "status"), [("openai", 400), ("together", 400), ("fastapi", 422)])
async def test_a_field_is_refused_by_its_name_while_it_is_sent(
    upstream: EmulatedUpstream, shape: str, status: int
) -> None:
    prompt = f"{{{{fault:refused_field parameter=quality shape={shape}}}}}"
    refused, body = await post(upstream, prompt=prompt, quality="low")
    assert refused == status
    assert "quality" in str(body)
    assert (await post(upstream, prompt=prompt))[0] == 200
