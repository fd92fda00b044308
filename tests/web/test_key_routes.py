"""Tests of the admin's routes that make, list, rotate and revoke API keys."""

from __future__ import annotations

import asyncio
import json
import sys
from types import FrameType
from typing import Any

from imagegen.web.guard import GUARD
from tests.support import AS_ADMIN, eventually, over_rows
from tests.web.api_keys import bearer, make_key
from tests.web.conftest import Client

BODY = {"prompt": "a lighthouse", "width": 64, "height": 64}


async def test_the_admin_makes_lists_rotates_and_revokes_keys(service: Client) -> None:
    made = await service.post(
        "/api/admin/keys",
        json={"name": "cli", "dailyUsd": 1.25, "rate": 60, "models": ["flux*"], "maxMegapixels": 2, "expires": "90d"},
        headers=AS_ADMIN,
    )
    body = await made.json()
    assert made.status == 201
    assert made.headers["Cache-Control"] == "no-store"
    shown = {name: body["key"][name] for name in ("name", "fixed", "dailyUsd", "rate", "models", "maxMegapixels")}
    assert shown == {
        "name": "cli",
        "fixed": False,
        "dailyUsd": 1.25,
        "rate": 60,
        "models": ["flux*"],
        "maxMegapixels": 2.0,
    }
    old = body["secret"]
    assert (await service.get("/api/models")).status == 401
    rotated = await (await service.post("/api/admin/keys/cli/rotate", json={"grace": "1h"}, headers=AS_ADMIN)).json()
    assert [(await service.get("/api/models", headers=bearer(each))).status for each in (old, rotated["secret"])] == [
        200,
        200,
    ]
    listed = await (await service.get("/api/admin/keys", headers=AS_ADMIN)).json()
    assert [len(each["secrets"]) for each in listed["keys"]] == [2]
    assert "sha256" not in json.dumps(listed)
    gone = await (await service.delete("/api/admin/keys/cli", headers=AS_ADMIN)).json()
    assert gone == {"success": True, "name": "cli", "open": True}
    assert (await service.get("/api/models")).status == 200


@over_rows(
    ("method", "path", "body", "status", "code"),
    [
        ("post", "", {"name": "web"}, 409, "key_is_fixed"),
        ("post", "", {}, 400, "invalid_request"),
        ("post", "", {"name": "a b"}, 400, "invalid_request"),
        ("post", "", {"name": "a", "rate": 0}, 400, "invalid_request"),
        ("post", "", {"name": "a", "rates": 1}, 400, "invalid_request"),
        ("post", "", {"name": "a", "expires": "soon"}, 400, "invalid_request"),
        ("post", "/web/rotate", {}, 409, "key_is_fixed"),
        ("post", "/nobody/rotate", {}, 404, "key_not_found"),
        ("post", "/web/rotate", {"grace": "-1"}, 400, "invalid_request"),
        ("delete", "/web", None, 409, "key_is_fixed"),
        ("delete", "/nobody", None, 404, "key_not_found"),
    ],
)
async def test_a_bad_change_of_a_key_is_an_error(
    keyed: Client, method: str, path: str, body: Any, status: int, code: str
) -> None:
    answer = await keyed.request(method, f"/api/admin/keys{path}", json=body, headers=AS_ADMIN)
    assert (answer.status, (await answer.json())["code"]) == (status, code)


@over_rows(
    ("body", "field"),
    [
        ({f"f{number}": 1 for number in range(9_000)}, "f9"),
        ({"k" * 100_000: 1, "name": "a"}, "k" * 60),
        ({"name": "a", "models": [1] * 9_000}, "models"),
        ({"name": "a", "rate": [1] * 9_000}, "rate"),
    ],
)
async def test_a_key_of_thousands_of_faults_is_a_short_error(service: Client, body: Any, field: str) -> None:
    calls = 0

    def count(_frame: FrameType, event: str, _argument: object) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    try:
        response = await service.post("/api/admin/keys", json=body, headers=AS_ADMIN)
    finally:
        sys.setprofile(None)
    fields = [detail["field"] for detail in (await response.json())["details"]]
    assert response.status == 400
    assert field in fields
    assert len(await response.text()) < 10_000
    assert calls < 60_000


async def test_a_name_is_taken_once(service: Client) -> None:
    await make_key(service, name="a")
    again = await service.post("/api/admin/keys", json={"name": "a"}, headers=AS_ADMIN)
    assert (again.status, (await again.json())["code"]) == (409, "key_exists")


async def test_a_revoked_key_is_refused_on_the_other_instance_and_its_streams_end(start_two: Any) -> None:
    one, two = await start_two(sandbox_delay_s=300.0)
    secret = await make_key(one, name="app")
    await eventually(lambda: two.app[GUARD].ring.has_keys)
    headers = bearer(secret)
    made = await (await two.post("/api/images/generate", json=BODY, headers=headers)).json()
    stream = await two.get(f"/api/images/{made['taskId']}/events", headers=headers)
    await stream.content.readline()
    waiting = asyncio.create_task(two.get(f"/api/images/{made['taskId']}?wait=60", headers=headers))
    await asyncio.sleep(0)
    assert (await one.delete("/api/admin/keys/app", headers=AS_ADMIN)).status == 200
    await asyncio.wait_for(stream.content.read(), 20)
    assert (await asyncio.wait_for(waiting, 20)).status in (200, 401)
    await eventually(lambda: not two.app[GUARD].ring.has_keys)
