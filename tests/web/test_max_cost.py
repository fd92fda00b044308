"""Tests of the limit that a submit sets for its own cost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from imagegen.tasks.task import Task
from imagegen.web.handler_services import SERVICES
from tests.emulator_fixtures import EmulatedUpstream
from tests.support import AS_ADMIN, over_rows
from tests.web.conftest import Client, StartService

IMAGE_USD = 0.000708
"""Of FLUX.1-schnell at 512 x 512."""


@pytest.fixture
async def service(start_paid: StartService) -> Client:
    return await start_paid()


async def submit(
    service: Client, query: str = "", headers: dict[str, str] | None = None, **fields: Any
) -> tuple[int, Any]:
    response = await service.post(f"/api/images/generate{query}", json={"prompt": "a fox"} | fields, headers=headers)
    return response.status, await response.json()


async def test_a_submit_with_an_estimate_over_its_limit_is_refused_at_once(
    service: Client, upstream: EmulatedUpstream
) -> None:
    status, body = await submit(service, n=2, maxCostUsd=IMAGE_USD, headers={"Accept-Language": "en"})
    assert (status, body["code"], body["retryable"]) == (402, "max_cost_exceeded", False)
    assert "0.001416 USD" in body["message"]
    assert body["details"][0]["field"] == "maxCostUsd"
    assert not upstream.ledger.calls


@over_rows(("limit", "status"), [(0.00070799, 402), ("0.0007079", 402), (0.000708, 202), (0.0007081, 202)])
async def test_a_limit_is_never_rounded_up(service: Client, limit: object, status: int) -> None:
    assert (await submit(service, prompt=f"a fox at {limit!r}", maxCostUsd=limit))[0] == status


async def test_a_submit_within_its_limit_is_the_same_task_as_one_without(
    service: Client, upstream: EmulatedUpstream
) -> None:
    status, body = await submit(service, n=2, max_cost_usd=2 * IMAGE_USD)
    assert status == 202
    _, joined = await submit(service, n=2)
    assert joined["taskId"] == body["taskId"]
    await upstream.ledger.wait_for(lambda ledger: len(ledger.paid) == 1)


async def test_what_is_there_or_under_way_is_given_out_whatever_the_limit(
    service: Client, upstream: EmulatedUpstream
) -> None:
    upstream.set_fault("hang")
    _, first = await submit(service)
    status, joined = await submit(service, maxCostUsd=0)
    assert (status, joined["taskId"], joined["coalesced"]) == (202, first["taskId"], True)
    assert (await submit(service, maxCostUsd=0, headers={"Cache-Control": "no-cache"}))[0] == 202
    upstream.set_fault(None)
    _, other = await submit(service, "?wait=20", seed=7)
    status, hit = await submit(service, seed=7, maxCostUsd="0")
    assert (status, hit["taskId"], hit["cached"]) == (200, other["taskId"], True)
    status, refused = await submit(service, seed=7, maxCostUsd=0, headers={"Cache-Control": "no-cache"})
    assert (status, refused["code"]) == (402, "max_cost_exceeded")


async def test_a_failed_task_is_not_tried_again_over_the_limit(service: Client, upstream: EmulatedUpstream) -> None:
    upstream.set_fault("400")
    _, failed = await submit(service, "?wait=20")
    assert failed["status"] == "failed"
    assert (await submit(service, maxCostUsd=0))[0] == 402
    assert (await submit(service, maxCostUsd=1))[0] == 202


async def test_an_unknown_price_is_refused_under_a_limit(service: Client) -> None:
    status, body = await submit(service, model="nobody/knows", maxCostUsd=100)
    assert (status, body["code"]) == (400, "price_unknown")


@over_rows("limit", [-1, True, "much", [], {}, 1e9])
async def test_a_limit_that_is_no_sum_is_an_error_of_its_field(service: Client, limit: object) -> None:
    status, body = await submit(service, maxCostUsd=limit, width=7)
    assert status == 400
    assert [detail["field"] for detail in body["details"]] == ["width", "maxCostUsd"]


async def test_both_spellings_of_the_limit_are_refused(service: Client) -> None:
    status, body = await submit(service, maxCostUsd=1, max_cost_usd=1)
    assert (status, body["details"][0]["field"]) == (400, "max_cost_usd")
    assert "did you mean maxCostUsd?" in (await submit(service, maxCostUSD=1))[1]["details"][0]["message"]


async def test_each_entry_of_a_batch_has_its_own_limit(service: Client) -> None:
    entries = [{"prompt": "a", "maxCostUsd": 0}, {"prompt": "b", "maxCostUsd": 1}]
    response = await service.post("/api/images/batch", json={"requests": entries})
    assert [entry["statusCode"] for entry in (await response.json())["results"]] == [402, 202]


async def test_a_batch_has_no_limit_of_its_own(service: Client, upstream: EmulatedUpstream) -> None:
    for name in ("maxCostUsd", "max_cost_usd"):
        response = await service.post("/api/images/batch", json={"requests": [{"prompt": "a"}], name: 1})
        (detail,) = (await response.json())["details"]
        assert (response.status, detail["field"]) == (400, name)
        assert "each entry of requests" in detail["message"]
    assert not upstream.ledger.calls


@over_rows("limit", ["NaN", "Infinity", "-1", "1e999", "1,5", " 1", "$1", 1_000_001, 1e30])
async def test_sums_that_are_none_or_too_large_are_named_in_each_entry(service: Client, limit: object) -> None:
    status, body = await submit(service, maxCostUsd=limit)
    assert (status, [detail["field"] for detail in body["details"]]) == (400, ["maxCostUsd"])
    response = await service.post("/api/images/batch", json={"requests": [{"prompt": "a", "max_cost_usd": limit}]})
    (entry,) = (await response.json())["results"]
    assert (entry["statusCode"], entry["details"][0]["field"]) == (400, "requests[0].max_cost_usd")


async def test_images_of_a_request_with_another_n_count_as_there(service: Client, upstream: EmulatedUpstream) -> None:
    await submit(service, "?wait=20", n=2)
    assert (await submit(service, n=4, maxCostUsd=IMAGE_USD))[0] == 402
    status, done = await submit(service, "?wait=20", n=4, maxCostUsd=2 * IMAGE_USD)
    assert (status, len(done["data"])) == (200, 4)
    assert sum(each.n for each in upstream.ledger.paid) == 4


async def test_a_retry_keeps_the_limit_of_its_task(service: Client, upstream: EmulatedUpstream) -> None:
    upstream.set_fault("400")
    _, failed = await submit(service, "?wait=20", maxCostUsd=IMAGE_USD)
    assert failed["status"] == "failed"
    upstream.set_fault("reset")
    seen = upstream.ledger.total
    assert (await service.post(f"/api/images/{failed['taskId']}/retry")).status == 202
    task = await (await service.get(f"/api/images/{failed['taskId']}?wait=20")).json()
    assert (task["status"], upstream.ledger.total - seen) == ("failed", 1)
    assert "would cost more than maxCostUsd" in task["message"]


async def test_a_retry_is_refused_if_the_price_is_over_the_limit_of_its_task_now(
    service: Client, start_paid: StartService, upstream: EmulatedUpstream, tmp_path: Path
) -> None:
    upstream.set_fault("400")
    _, failed = await submit(service, "?wait=20", maxCostUsd=IMAGE_USD)
    row = '{ id = "black-forest-labs/FLUX.1-schnell", price = { per_image = 0.05 } }'
    (tmp_path / "dear.toml").write_text(f"checked = 2026-11-28\nmodels = [\n  {row},\n]\n")
    dearer = await start_paid(models_file=tmp_path / "dear.toml")
    refused = await dearer.post(f"/api/images/{failed['taskId']}/retry")
    assert (refused.status, (await refused.json())["code"]) == (402, "max_cost_exceeded")


async def test_images_that_are_gone_by_the_submit_are_not_paid_over_its_limit(
    service: Client, upstream: EmulatedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    await submit(service, "?wait=20", n=2)
    paid, store = len(upstream.ledger.paid), service.app[SERVICES].store

    async def gone(*_args: object) -> bool:
        return False

    monkeypatch.setattr(store, "reuse", gone)  # the preview has seen them
    status, refused = await submit(service, n=3, maxCostUsd=IMAGE_USD)
    assert (status, refused["code"]) == (402, "max_cost_exceeded")
    assert len(upstream.ledger.paid) == paid
    listed = await (await service.get("/api/images", headers=AS_ADMIN)).json()
    assert len(listed["tasks"]) == 1


async def test_a_sibling_that_expires_before_the_submit_is_not_paid_over_the_limit(
    service: Client, upstream: EmulatedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    await submit(service, "?wait=20", n=2)
    preview = service.app[SERVICES].queue.preview
    siblings, looks = preview.tasks_with_images, []

    async def once(*args: Any) -> Sequence[Task]:
        looks.append(args)
        return await siblings(*args) if len(looks) == 1 else ()

    monkeypatch.setattr(type(preview), "tasks_with_images", lambda _self, *args: once(*args))
    status, refused = await submit(service, n=3, maxCostUsd=IMAGE_USD)
    assert (status, refused["code"], len(looks)) == (402, "max_cost_exceeded", 2)
