"""Tests of quotes for agents: a quote says what the same call would pay and meet at this moment, and does nothing."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from tests.emulator_fixtures import EmulatedUpstream
from tests.mcp_wire import call, result, tokens
from tests.support import AS_ADMIN
from tests.web.conftest import Client, StartService

IMAGE_USD = 0.000708
"""Of FLUX.1-schnell at 512 x 512."""

SECRET = "a-secret-of-a-key"
KEY = {"Authorization": f"Bearer {SECRET}"}
KEYS = {"agent": hashlib.sha256(SECRET.encode()).hexdigest()}


def remove_files(folder: Path, task_id: str) -> None:
    for path in [path for path in folder.rglob("*") if path.is_file() and task_id in str(path)]:
        path.unlink()


async def quoted(service: Client, headers: dict[str, str] | None = None, **arguments: Any) -> dict[str, Any]:
    """Return a quote without an error."""
    found = await result(service, call("quote_image", **{"prompt": "a fox"} | arguments), headers)
    assert not found["isError"], found
    assert tokens(found) < 2_000
    return dict(found["structuredContent"])


async def made(service: Client, headers: dict[str, str] | None = None, **arguments: Any) -> dict[str, Any]:
    found = await result(service, call("generate_image", **{"prompt": "a fox"} | arguments), headers)
    return dict(found["structuredContent"])


async def test_images_of_a_call_with_another_n_are_not_paid_again(paid: Client, upstream: EmulatedUpstream) -> None:
    assert (await quoted(paid, n=4))["reusedImages"] == 0
    await made(paid, n=2)
    more = await quoted(paid, n=4)
    assert (more["reusedImages"], more["cached"]) == (2, False)
    assert more["costUsd"] == pytest.approx(2 * IMAGE_USD)
    fewer = await quoted(paid, n=1)
    assert (fewer["reusedImages"], fewer["costUsd"], fewer["etaSeconds"]) == (1, 0.0, 0.0)
    assert (await quoted(paid, n=4, prompt="a hen"))["reusedImages"] == 0
    assert sum(each.n for each in upstream.ledger.paid) == 2


async def test_a_call_with_the_quoted_price_as_its_limit_is_accepted(paid: Client, upstream: EmulatedUpstream) -> None:
    await made(paid, n=2)
    price = (await quoted(paid, n=4))["costUsd"]
    assert (await made(paid, n=4, maxCostUsd=price - 1e-6))["error"]["code"] == "max_cost_exceeded"
    done = await made(paid, n=4, maxCostUsd=price)
    assert (done["status"], len(done["urls"]), done["costUsd"]) == ("completed", 4, pytest.approx(price))
    assert (await made(paid, n=3, maxCostUsd=0))["status"] == "completed"
    assert sum(each.n for each in upstream.ledger.paid) == 4


async def test_images_that_are_gone_are_paid_for(paid: Client, tmp_path: Path) -> None:
    task = await made(paid, n=2)
    remove_files(tmp_path, task["taskId"])
    assert (await quoted(paid, n=4))["costUsd"] == pytest.approx(4 * IMAGE_USD)
    again = await quoted(paid, n=2)
    assert (again["cached"], again["costUsd"]) == (False, pytest.approx(2 * IMAGE_USD))


async def test_a_quote_of_images_under_way_shows_that_joining_is_free(paid: Client, upstream: EmulatedUpstream) -> None:
    upstream.set_fault("hang")
    await paid.post("/api/images/generate", json={"prompt": "a fox"})
    seen = await quoted(paid, maxCostUsd=0)
    assert (seen["joins"], seen["costUsd"], "refusal" in seen) == (True, 0.0, False)


async def test_a_quote_names_the_budget_that_is_left_and_its_refusal(
    start_paid: StartService, upstream: EmulatedUpstream
) -> None:
    service = await start_paid(budget_daily_micro_usd=2_500)
    fresh = await quoted(service, n=3)
    assert (fresh["budgetLeftUsd"], "refusal" in fresh) == (0.0025, False)
    assert fresh["budgetResetsAt"].endswith("T00:00:00.000Z")
    await made(service, n=2)
    seen = await quoted(service, n=3, prompt="a hen")
    assert seen["budgetLeftUsd"] == pytest.approx(0.0025 - 2 * IMAGE_USD)
    assert seen["refusal"]["code"] == "budget_exceeded"
    assert seen["refusal"]["estimatedCostUsd"] == pytest.approx(3 * IMAGE_USD)
    assert seen["refusal"]["resetsAt"] == seen["budgetResetsAt"]
    assert (await made(service, n=3, prompt="a hen"))["error"]["code"] == "budget_exceeded"
    assert "refusal" not in await quoted(service, n=2), "what exists is free"
    assert "refusal" not in await quoted(service, n=3), "one more image fits"
    unknown = await quoted(service, model="nobody/knows")
    assert (unknown["costUsd"], unknown["refusal"]["code"]) == (None, "price_unknown")


async def test_the_tightest_budget_of_a_key_counts(start_paid: StartService) -> None:
    service = await start_paid(budget_daily_micro_usd=1_000_000)
    created = await service.post("/api/admin/keys", json={"name": "agent", "dailyUsd": 0.001}, headers=AS_ADMIN)
    own = {"Authorization": f"Bearer {(await created.json())['secret']}"}
    assert (await quoted(service, own))["budgetLeftUsd"] == 0.001
    assert (await made(service, own))["status"] == "completed"
    seen = await quoted(service, own, prompt="a hen")
    assert (seen["budgetLeftUsd"], seen["refusal"]["code"]) == (pytest.approx(0.001 - IMAGE_USD), "budget_exceeded")


async def test_without_a_budget_none_is_left(paid: Client) -> None:
    assert (await quoted(paid))["budgetLeftUsd"] is None


async def test_a_quote_over_its_own_limit_names_the_limit(paid: Client) -> None:
    seen = await quoted(paid, n=2, maxCostUsd=IMAGE_USD)
    assert (seen["refusal"]["code"], seen["costUsd"]) == ("max_cost_exceeded", pytest.approx(2 * IMAGE_USD))
    assert (await quoted(paid, model="nobody/knows", maxCostUsd=1))["refusal"]["code"] == "price_unknown"
    assert "refusal" not in await quoted(paid, n=2, maxCostUsd=2 * IMAGE_USD)


@pytest.mark.parametrize("store", ["memory", "redis"])
async def test_a_quote_counts_no_submit_and_names_those_that_are_left(start_paid: StartService, store: str) -> None:
    service = await start_paid(image_rate_limit_max=2, rate_limit_store=store)
    for _ in range(3):
        assert (await quoted(service))["callsLeft"] == 2
    await made(service, prompt="a")
    assert (await quoted(service))["callsLeft"] == 1
    await made(service, prompt="b")
    seen = await quoted(service)
    assert (seen["callsLeft"], seen["refusal"]["code"], seen["refusal"]["retryable"]) == (0, "rate_limited", True)
    assert 0 < seen["refusal"]["retryAfterSeconds"] <= 60
    assert (await made(service))["error"]["code"] == "rate_limited"


async def test_a_quote_has_the_limit_of_units(start_paid: StartService) -> None:
    service = await start_paid(image_units_per_min=10)
    await made(service, n=8)
    assert (await quoted(service, n=4, prompt="a hen"))["refusal"]["code"] == "rate_limited"
    assert "refusal" not in await quoted(service, n=2, prompt="a hen")
    assert (await quoted(await start_paid(image_rate_limit_max=0)))["callsLeft"] is None


async def test_the_position_is_that_in_the_own_line_of_a_key(
    start_paid: StartService, upstream: EmulatedUpstream
) -> None:
    upstream.set_fault("hang")
    service = await start_paid(api_keys=KEYS | {"other": hashlib.sha256(b"another-secret").hexdigest()}, fair_window=2)
    places = []
    for number in range(8):
        place = (await quoted(service, KEY, prompt=f"image {number}"))["queuePosition"]
        submitted = await service.post("/api/images/generate", json={"prompt": f"image {number}"}, headers=KEY)
        body = await submitted.json()
        if number > 3:
            places.append((place, body["queuePosition"]))
    assert all(expected == real for expected, real in places), places
    other = await quoted(service, {"Authorization": "Bearer another-secret"}, prompt="mine")
    assert other["queuePosition"] < places[-1][0]


async def test_a_quote_of_a_refused_request_shows_that_it_is_refused_again(
    paid: Client, upstream: EmulatedUpstream
) -> None:
    upstream.script("400_policy")
    await made(paid)
    seen = await quoted(paid)
    assert seen["refusal"]["code"] == "content_policy"
