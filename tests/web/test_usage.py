"""Usage report over HTTP."""

from __future__ import annotations

import asyncio
import csv
import hashlib
import io
import json
from threading import Event

import pytest

from imagegen.accounts.usage_report import UsageReport
from imagegen.web.ops.usage import prefers_csv
from tests.emulator_fixtures import EmulatedUpstream
from tests.faults.money import charged
from tests.support import AS_ADMIN, eventually
from tests.web.conftest import Client, StartService, StartTwo

PRICE = 708e-6
"""Dollars of an image of 512 x 512."""

BODY = {"prompt": "a lighthouse", "width": 64, "height": 64}


async def submitted(client: Client, **fields: object) -> None:
    response = await client.post("/api/images/generate?wait=30", json=BODY | fields)
    assert response.status == 200
    assert (await response.json())["status"] == "completed"


async def test_the_report_counts_submits_hits_joins_and_images_on_every_instance(
    start_two: StartTwo,
) -> None:
    one, other = await start_two()
    await submitted(one, n=2)
    await submitted(one, n=2)
    await submitted(one, prompt="another", model="m2")
    await one.close()  # its last report is written at the end
    await submitted(other, n=2)
    response = await other.get("/api/usage?by=model", headers=AS_ADMIN)
    assert response.status == 200
    assert response.headers["Cache-Control"] == "no-store"
    body = await response.json()
    assert (body["success"], body["by"], body["currency"]) == (True, "model", "USD")
    counts = ("submitted", "cached", "completed", "images", "spent")
    shown = {row["model"]: tuple(row[name] for name in counts) for row in body["rows"]}
    assert shown == {"black-forest-labs/FLUX.1-schnell": (3, 2, 1, 2, 0), "m2": (1, 0, 1, 1, 0)}
    assert tuple(body["total"][name] for name in counts) == (4, 2, 2, 3, 0)

    response = await other.get("/api/usage?by=key", headers=AS_ADMIN | {"Accept": "text/csv"})
    assert (response.status, response.content_type) == (200, "text/csv")
    (row,) = csv.DictReader(io.StringIO(await response.text()))
    assert (row["key"], row["submitted"], row["images"]) == ("", "4", "3")


@pytest.mark.parametrize(("accept", "method"), [("application/json", "to_view"), ("text/csv", "to_csv")])
async def test_other_clients_are_answered_while_a_long_report_is_rendered(
    start_service: StartService, monkeypatch: pytest.MonkeyPatch, accept: str, method: str
) -> None:
    service, begun, answered = await start_service(), Event(), Event()
    render = getattr(UsageReport, method)

    def render_long(report: UsageReport) -> object:
        begun.set()
        assert answered.wait(60)
        return render(report)

    monkeypatch.setattr(UsageReport, method, render_long)
    reading = asyncio.create_task(service.get("/api/usage", headers=AS_ADMIN | {"Accept": accept}))
    await eventually(begun.is_set)
    assert (await service.get("/healthz")).status == 200
    answered.set()
    assert (await reading).status == 200


async def test_a_bad_query_is_refused_with_the_name_of_its_field(start_service: StartService) -> None:
    service = await start_service()
    response = await service.get("/api/usage?from=2026-13-01&by=hour", headers=AS_ADMIN)
    assert response.status == 400
    assert [error["field"] for error in (await response.json())["details"]] == ["from", "by"]


async def test_a_stranger_is_refused(start_service: StartService) -> None:
    service = await start_service()
    assert (await service.get("/api/usage")).status == 401
    assert (await service.get("/api/usage", headers={"Authorization": "Bearer another-token"})).status == 401


@pytest.mark.parametrize(
    ("accept", "csv_preferred"),
    [
        ("", False),
        ("*/*", False),
        ("application/json", False),
        ("text/csv", True),
        ("TEXT/CSV; q=0.9", True),
        ("text/csv, */*;q=0.1", True),
        ("application/json, text/csv;q=0.5", False),
        ("text/csv;q=0, */*", False),
        ("text/*", True),
        ("text/html,application/xhtml+xml,*/*;q=0.8", False),
        ("text/csv;q=x", False),
        ("text/csv;q=2", False),
    ],
)
def test_csv_is_sent_where_it_is_preferred(accept: str, *, csv_preferred: bool) -> None:
    assert prefers_csv(accept) is csv_preferred


async def test_a_key_sees_its_own_usage_and_the_operator_all(start_service: StartService) -> None:
    secrets = {"ann": "a-secret-of-ann-1", "bob": "a-secret-of-bob-1"}
    service = await start_service(
        api_keys={name: hashlib.sha256(text.encode()).hexdigest() for name, text in secrets.items()}
    )
    for name, images in (("ann", 2), ("bob", 1)):
        headers = {"Authorization": f"Bearer {secrets[name]}"}
        response = await service.post("/api/images/generate?wait=30", json=BODY | {"n": images}, headers=headers)
        assert (await response.json())["status"] == "completed"

    async def rows(**headers: str) -> list[tuple[str, int]]:
        response = await service.get("/api/usage?by=key", headers=headers)
        assert response.status == 200
        return [(row["key"], row["images"]) for row in (await response.json())["rows"]]

    assert await rows(**AS_ADMIN) == [("ann", 2), ("bob", 1)]
    assert await rows(**{"X-API-Key": secrets["bob"]}) == [("bob", 1)]
    assert (await service.get("/api/usage")).status == 401


async def test_the_report_equals_the_ledger_of_the_upstream_to_the_cent(
    start_paid: StartService, upstream: EmulatedUpstream
) -> None:
    service = await start_paid(max_attempts=3)
    upstream.script({"fault": "429", "retry_after": 0.1}, {"fault": "400"}, {"fault": "500"})
    for number in range(6):
        body = {"prompt": f"image {number}", "width": 512, "height": 512 + 64 * number, "n": 1 + number % 3}
        await service.post("/api/images/generate?wait=30", json=body)
        await service.post("/api/images/generate?wait=30", json=body)
    spent = (await (await service.get("/api/usage", headers=AS_ADMIN)).json())["total"]
    assert spent["ambiguous"] == 0
    assert round(spent["spent"] * 1_000_000) == charged(json.loads(upstream.ledger.to_json())["calls"]) > 0
    assert spent["savedByCache"] > 0
    assert spent["completed"] + spent["failed"] >= 6


async def test_what_a_key_saved_counts_for_it_where_tasks_are_shared(start_paid: StartService) -> None:
    keys = {name: hashlib.sha256(f"the-secret-of-{name}".encode()).hexdigest() for name in ("ann", "bob")}
    service = await start_paid(api_keys=keys, cache_scope="shared")

    async def submit(key: str, count: int) -> None:
        body, headers = (
            {"prompt": "shared", "width": 512, "height": 512, "n": count},
            {"X-API-Key": f"the-secret-of-{key}"},
        )
        response = await service.post("/api/images/generate?wait=30", json=body, headers=headers)
        assert (await response.json())["status"] == "completed"

    await submit("ann", 2)
    await submit("bob", 2)
    await submit("bob", 3)  # two of its images are there
    rows = (await (await service.get("/api/usage?by=key", headers=AS_ADMIN)).json())["rows"]
    names = ("submitted", "cached", "images", "spent", "savedByCache")
    assert {row["key"]: tuple(row[name] for name in names) for row in rows} == {
        "ann": (1, 0, 2, 2 * PRICE, 0),
        "bob": (2, 1, 1, PRICE, 4 * PRICE),
    }
