"""Tests of POST /mcp with many agents at once that give up a call before its image is there, and repeat it."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp
import orjson
import pytest

from imagegen.web.api import tasks
from imagegen.web.mcp import endpoint
from tests.emulator_fixtures import EmulatedUpstream
from tests.mcp_wire import call, events, headers_of, tokens
from tests.support import ADMIN_TOKEN
from tests.web.conftest import StartService

IMAGE_USD = 0.000708
"""Of FLUX.1-schnell at 512 x 512."""

SESSIONS = 50
PATIENT_S = 20.0


async def test_fifty_impatient_agents_pay_once_for_each_image_and_stay_in_budget(
    start_paid: StartService, upstream: EmulatedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second of a client is 10 ms here: timeouts of 5 and 20 s or none, waits of 45 s, calls of 0 to 70 s."""
    monkeypatch.setattr(endpoint, "WAIT_S", 0.45)
    monkeypatch.setattr(tasks, "REPORT_S", 0.08)
    budget = 20
    service = await start_paid(budget_daily_micro_usd=round(budget * IMAGE_USD * 1e6), worker_concurrency=8)
    for place in range(30):
        upstream.script({"fault": "ok", "delay_s": (place % 8) * 0.1})
    late: list[float] = []

    async def ask(body: dict[str, Any], timeout_s: float) -> dict[str, Any] | None:
        limit = aiohttp.ClientTimeout(total=timeout_s)
        try:
            response = await service.post("/mcp", json=body, headers=headers_of(body), timeout=limit)
            text = await response.text()
        except aiohttp.ServerDisconnectedError:  # only the test server cancels handlers of others
            return None
        except TimeoutError:
            late.append(timeout_s)
            return None
        assert response.status == 200
        answer = events(text)[-1] if text.startswith("event") else orjson.loads(text)
        assert tokens(answer["result"]) < 2_000
        return dict(answer["result"])

    async def session(number: int) -> str:
        timeout_s = (0.05, 0.2, PATIENT_S)[number % 3]
        meta = {"progressToken": number} if number % 2 else {}
        arguments = {"prompt": f"image {number % 25}"}
        while True:
            found = await ask(call("generate_image", meta=meta, **arguments), timeout_s)
            if found is None:
                timeout_s = min(1.1 * timeout_s, PATIENT_S)  # a slow machine answers nobody within the first ones
                continue
            seen = found["structuredContent"]
            if seen["status"] in ("completed", "refused"):
                return str(seen["status"])
            await ask(call("get_image_task", taskId=seen["taskId"]), timeout_s)

    ends = await asyncio.gather(*map(session, range(SESSIONS)))
    assert set(ends) == {"completed", "refused"}
    assert PATIENT_S not in late
    prompts = [each.prompt for each in upstream.ledger.paid]
    assert len(prompts) == len(set(prompts)) == budget
    stats = await (await service.get("/api/usage", headers={"Authorization": f"Bearer {ADMIN_TOKEN}"})).json()
    assert stats["success"]
