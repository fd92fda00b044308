"""Tests of the units of generations: every route that may start one counts its pixels, before it stores anything."""

from __future__ import annotations

from typing import Any

import pytest

from imagegen.app import create_app
from imagegen.ratelimit.limits import RATE_LIMITS
from imagegen.settings import Settings
from imagegen.tasks.request import GenerationRequest
from tests.image_bytes import data_uri, image_file
from tests.support import AS_ADMIN
from tests.web.conftest import Client, StartService

PNG = image_file(size=(64, 64))
GENERATE, V1 = "/api/images/generate", "/v1/images/generations"


@pytest.mark.parametrize(
    ("width", "height", "n", "units"),
    [(512, 512, 1, 1), (64, 64, 8, 8), (2048, 2048, 8, 128), (1024, 1024, 1, 4), (768, 512, 2, 3), (520, 512, 1, 2)],
)
def test_a_request_weighs_as_many_images_of_512_pixels(width: int, height: int, n: int, units: int) -> None:
    assert GenerationRequest(prompt="a", model="m", width=width, height=height, n=n).units == units


@pytest.mark.parametrize(
    ("settings", "limit"),
    [
        ({}, 320),
        ({"image_rate_limit_max": 2}, 128),
        ({"image_rate_limit_max": 0}, 0),
        ({"image_units_per_min": 0}, 0),
        ({"image_rate_limit_max": 0, "image_units_per_min": 100}, 100),
        ({"image_units_per_min": 100, "rate_limit_window_s": 30.0}, 50),
        ({"rate_limit_window_s": 1.0}, 320),
    ],
)
async def test_the_limit_of_units_follows_from_that_of_generations(settings: dict[str, Any], limit: int) -> None:
    rates = create_app(Settings(**settings))[RATE_LIMITS]
    assert [rule.limit for rule in rates._units] == [limit] * bool(limit)


async def left(client: Client, body: dict[str, Any], path: str = GENERATE) -> tuple[int, str]:
    answer = await client.post(path, json=body)
    shown = answer.headers["RateLimit"].partition('"units";r=')[2]
    return answer.status, shown.partition(";")[0]


@pytest.mark.parametrize("store", ["memory", "redis"])
async def test_a_submit_spends_units_also_if_its_bytes_are_known(start_service: StartService, store: str) -> None:
    client = await start_service(image_units_per_min=10, rate_limit_store=store, sandbox_delay_s=30.0)
    body = {"prompt": "a", "n": 4}
    assert [await left(client, body) for _ in range(3)] == [(202, "6"), (202, "2"), (429, "2")]
    assert await left(client, {"prompt": "b", "width": 1024, "height": 512}) == (202, "0")


async def test_an_invalid_request_spends_none(start_service: StartService) -> None:
    client = await start_service(image_units_per_min=10)
    assert (await client.post(GENERATE, json={"prompt": "a", "n": 99})).status == 400
    assert await left(client, {"prompt": "a", "width": 4096, "height": 4096}) == (202, "0")


async def test_each_entry_of_a_batch_spends_its_own(start_service: StartService) -> None:
    client = await start_service(image_units_per_min=6)
    entries = [{"prompt": "a", "n": 4}, {"prompt": "b", "n": 4}, {"prompt": "c", "n": 2}]
    answer = await client.post("/api/images/batch", json={"requests": entries})
    results = (await answer.json())["results"]
    assert [result["statusCode"] for result in results] == [202, 429, 202]
    assert (results[1]["code"], 1 <= results[1]["retryAfterSeconds"] <= 60) == ("rate_limited", True)


async def test_calls_of_v1_spend_units_in_both_kinds_and_by_their_default_size(start_service: StartService) -> None:
    client = await start_service(image_units_per_min=9)
    edit = {"prompt": "b", "size": "512x512", "images": [{"image_url": data_uri(PNG)}]}
    assert await left(client, {"prompt": "a"}, V1) == (200, "5")
    assert await left(client, edit, "/v1/images/edits") == (200, "4")
    answer = await client.post(f"{V1}/async", json={"prompt": "c", "n": 2})
    assert (answer.status, (await answer.json())["error"]["code"]) == (429, "rate_limited")
    assert 1 <= int(answer.headers["retry-after"]) <= 60


async def test_a_refused_request_leaves_no_upload(start_service: StartService) -> None:
    client = await start_service(image_units_per_min=4)
    assert (await left(client, {"prompt": "a", "n": 4}))[0] == 202
    refused = await client.post(GENERATE, json={"prompt": "b", "imageUrl": data_uri(PNG)})
    stored = await client.post("/api/uploads", data=PNG, headers={"Content-Type": "image/png"})
    assert (refused.status, stored.status) == (429, 201)


async def test_a_retry_spends_the_units_of_its_task(start_service: StartService) -> None:
    client = await start_service(image_units_per_min=8, sandbox_delay_s=30.0)
    task = await (await client.post(GENERATE, json={"prompt": "a", "n": 6})).json()
    await client.post(f"/api/images/{task['taskId']}/cancel")
    answer = await client.post(f"/api/images/{task['taskId']}/retry")
    assert (answer.status, (await answer.json())["code"]) == (429, "rate_limited")
    assert (await (await client.get(f"/api/images/{task['taskId']}")).json())["status"] == "cancelled"


async def test_a_key_with_its_own_limit_of_generations_has_the_units_of_these(start_service: StartService) -> None:
    client = await start_service(image_rate_limit_max=1)
    made = await client.post("/api/admin/keys", json={"name": "app", "imagesRate": 2}, headers=AS_ADMIN)
    headers = {"X-API-Key": (await made.json())["secret"]}
    body = {"prompt": "a", "n": 16, "width": 1024, "height": 1024}
    answer = await client.post(GENERATE, json=body, headers=headers)
    assert answer.headers["RateLimit-Policy"] == '"generation";q=2;w=60, "units";q=128;w=60'
    assert answer.headers["RateLimit"].partition('"units";')[2].startswith("r=64;")


@pytest.mark.parametrize("store", ["memory", "redis"])
async def test_clients_of_one_ipv6_network_share_its_limits(start_service: StartService, store: str) -> None:
    client = await start_service(image_rate_limit_max=1, trusted_proxy_hops=1, rate_limit_store=store)
    seen = []
    for number in range(6):
        headers = {"X-Forwarded-For": f"2001:db8:0:{number:02x}00::1"}
        seen.append((await client.post(GENERATE, json={"prompt": str(number)}, headers=headers)).status)
    assert seen == [202] * 4 + [429] * 2
