"""Tests of `maxCostUsd` on `/v1`, which both SDKs send in the body: it is held and never sent upstream."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from aiohttp import FormData

from tests.emulator_fixtures import EmulatedUpstream
from tests.image_bytes import data_uri, image_file
from tests.support import over_rows
from tests.web.openai.conftest import Serve, Service

IMAGE_USD = 0.002832
"""Of FLUX.1-schnell at 1024 x 1024."""

ENOUGH = 1.0
EDITOR = "black-forest-labs/FLUX.1-kontext-pro"
PNG = image_file("red")
GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"
ROUTES = (GENERATIONS, f"{GENERATIONS}/async", EDITS, f"{EDITS}/async")


async def post(service: Service, path: str = GENERATIONS, **fields: Any) -> tuple[int, dict[str, Any]]:
    """Return status and body of a call. An edit gets an image, a generation none."""
    body = {"prompt": "a cat"} | fields
    if EDITS in path:
        body |= {"model": EDITOR, "images": [{"image_url": data_uri(PNG)}]}
    response = await service.request("POST", path, json=body)
    return response.status, await response.json()


@over_rows("path", ROUTES)
@over_rows("name", ["maxCostUsd", "max_cost_usd"])
async def test_a_limit_that_is_too_low_refuses_the_call(
    service: Service, upstream: EmulatedUpstream, path: str, name: str
) -> None:
    status, body = await post(service, path, **{name: 0.0001})
    assert (status, body["error"]["code"], body["error"]["param"]) == (402, "max_cost_exceeded", "maxCostUsd")
    assert not upstream.ledger.calls


@pytest.mark.parametrize("path", [GENERATIONS, EDITS])
async def test_a_limit_that_suffices_is_not_sent_upstream(
    service: Service, upstream: EmulatedUpstream, path: str
) -> None:
    assert (await post(service, path, maxCostUsd=ENOUGH))[0] == 200
    (sent,) = upstream.ledger.calls
    assert "cost" not in json.dumps(sent.body).lower()


async def test_a_form_has_its_limit_as_a_text(service: Service, upstream: EmulatedUpstream) -> None:
    for limit, expected in (("0.0001", 402), ("1", 200), ("0.5", 200), ("much", 400)):
        form = FormData(default_to_multipart=True)
        form.add_field("image", PNG, filename="a.png", content_type="image/png")
        for name, value in {"prompt": "a cat", "model": EDITOR, "maxCostUsd": limit}.items():
            form.add_field(name, value)
        response = await service.request("POST", EDITS, data=form)
        assert response.status == expected
        if expected == 400:
            assert (await response.json())["error"]["param"] == "maxCostUsd"
    assert all("cost" not in json.dumps(call.body).lower() for call in upstream.ledger.calls)


@over_rows("path", ROUTES)
@over_rows("limit", ["much", "NaN", "-1", -0.01, 1e9, True, [], {"usd": 1}, "1 USD"])
async def test_a_limit_that_is_no_sum_is_an_error_that_names_it(
    service: Service, upstream: EmulatedUpstream, path: str, limit: object
) -> None:
    status, body = await post(service, path, maxCostUsd=limit)
    assert (status, body["error"]["param"]) == (400, "maxCostUsd")
    assert "maxCostUsd: must be" in body["error"]["message"]
    assert not upstream.ledger.calls


async def test_a_number_that_json_lacks_is_refused(service: Service, upstream: EmulatedUpstream) -> None:
    for number in ("NaN", "Infinity", "1e999"):
        data = f'{{"prompt": "a cat", "maxCostUsd": {number}}}'.encode()
        response = await service.request("POST", GENERATIONS, data=data, headers={"Content-Type": "application/json"})
        assert response.status == 400
    assert not upstream.ledger.calls


@over_rows("name", ["maxCostUSD", "MAX_COST_USD", "max-cost-usd", "MaxCostUsd"])
async def test_another_spelling_is_refused_and_not_sent_upstream(
    service: Service, upstream: EmulatedUpstream, name: str
) -> None:
    status, body = await post(service, **dict[str, Any]({name: 0}))
    assert (status, body["error"]["param"]) == (400, name)
    assert "use maxCostUsd" in body["error"]["message"]
    assert (await post(service, extra={name: 0}))[0] == 400
    assert (await post(service, maxCostUsd=1, max_cost_usd=1))[0] == 400
    assert not upstream.ledger.calls


@over_rows("absent", [None, ""])
async def test_an_absent_limit_is_none(service: Service, absent: object) -> None:
    assert (await post(service, maxCostUsd=absent))[0] == 200


async def test_an_unknown_price_is_refused_under_a_limit(service: Service) -> None:
    status, body = await post(service, model="nobody/knows", maxCostUsd=100)
    assert (status, body["error"]["code"]) == (400, "price_unknown")


async def test_the_limit_is_no_part_of_the_request(service: Service, upstream: EmulatedUpstream) -> None:
    _, first = await post(service, seed=1, maxCostUsd=ENOUGH)
    _, again = await post(service, seed=1, maxCostUsd=0)
    assert (await post(service, seed=1))[1]["id"] == first["id"] == again["id"]
    assert upstream.ledger.total == 1


async def test_another_image_of_an_equal_call_needs_its_own_money(service: Service, upstream: EmulatedUpstream) -> None:
    _, first = await post(service, maxCostUsd=IMAGE_USD)
    assert (await post(service, maxCostUsd=0))[0] == 402
    status, second = await post(service, maxCostUsd=IMAGE_USD)
    assert (status, second["id"] != first["id"]) == (200, True)
    assert upstream.ledger.total == 2


async def test_a_repeat_of_a_lost_call_is_free_whatever_its_limit(service: Service, upstream: EmulatedUpstream) -> None:
    upstream.script({"fault": "ok", "held": 1})
    impatient = {"x-stainless-read-timeout": "0.2"}
    response = await service.generate(impatient, maxCostUsd=ENOUGH)
    assert (response.status, (await response.json())["error"]["code"]) == (503, "unfinished")
    await upstream.ledger.wait_for(lambda ledger: ledger.in_flight)
    upstream.release()
    repeat = {"x-stainless-retry-count": "1"}
    assert (await service.generate(repeat, maxCostUsd=0)).status == 200
    assert upstream.ledger.total == 1


async def test_a_key_of_an_earlier_call_is_free_whatever_its_limit(
    service: Service, upstream: EmulatedUpstream
) -> None:
    key = {"Idempotency-Key": "one"}
    first = await (await service.generate(key, maxCostUsd=ENOUGH)).json()
    again = await (await service.generate(key, maxCostUsd=0)).json()
    assert first["id"] == again["id"]
    assert (await service.generate({"Idempotency-Key": "two"}, maxCostUsd=0)).status == 402
    assert upstream.ledger.total == 1


@pytest.mark.parametrize(("limit", "calls"), [({}, 2), ({"maxCostUsd": IMAGE_USD}, 1)])
async def test_no_call_beyond_the_limit_is_made_after_a_lost_answer(
    serve: Serve, upstream: EmulatedUpstream, limit: dict[str, Any], calls: int
) -> None:
    service = await serve(upstream_timeout_s=2.5, max_attempts=2)
    upstream.set_fault("hang")
    response = await service.generate(**limit)
    assert response.status == 504
    await asyncio.wait_for(upstream.ledger.wait_for(lambda ledger: ledger.total == calls), 20)
    assert upstream.ledger.total == calls
