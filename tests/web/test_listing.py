"""Tests of the operator's task list."""

from __future__ import annotations

import asyncio
from typing import Any

from imagegen.app import QUEUE
from tests.emulator_fixtures import EmulatedUpstream
from tests.support import AS_ADMIN, over_rows
from tests.web.conftest import Client, StartService, StartTwo

SMALL = {"width": 64, "height": 64}


async def post(client: Client, prompt: str) -> str:
    answer = await client.post("/api/images/generate", json={"prompt": prompt, **SMALL})
    task_id: str = (await answer.json())["taskId"]
    return task_id


async def page(client: Client, **query: str | int) -> dict[str, Any]:
    answer = await client.get("/api/images", params=query, headers=AS_ADMIN)
    assert answer.status == 200, await answer.text()
    body: dict[str, Any] = await answer.json()
    return body


async def ids(client: Client, **query: str | int) -> list[str]:
    return [task["taskId"] for task in (await page(client, **query))["tasks"]]


async def completed(client: Client, *prompts: str) -> list[str]:
    made = [await post(client, prompt) for prompt in prompts]
    await asyncio.gather(*(client.get(f"/api/images/{task_id}?wait=10") for task_id in made))
    return made


async def test_no_task_makes_an_empty_list(service: Client) -> None:
    assert await page(service) == {"success": True, "tasks": [], "nextCursor": None}


async def test_the_newest_is_first_and_equals_its_own_route(service: Client) -> None:
    made = await completed(service, *"abc")
    listed = (await page(service))["tasks"]
    assert [task["taskId"] for task in listed] == made[::-1]
    own = await (await service.get(f"/api/images/{made[-1]}")).json()
    assert listed[0] == own | {"request": listed[0]["request"], "key": None}
    assert listed[0]["request"]["prompt"] == "c"


async def test_pages_follow_each_other_without_gap_or_repeat(service: Client) -> None:
    made = await completed(service, *"abcdefg")
    listed, cursor = [], None
    for size in (3, 3, 1):
        found = await page(service, limit=3, **({"cursor": cursor} if cursor else {}))
        listed += [task["taskId"] for task in found["tasks"]]
        cursor = found["nextCursor"]
        assert len(found["tasks"]) == size
    assert cursor is None
    assert listed == made[::-1]


async def test_a_task_submitted_between_pages_shifts_no_entry(service: Client) -> None:
    made = await completed(service, *"abcd")
    first = await page(service, limit=2)
    await completed(service, "e")
    assert await ids(service, cursor=first["nextCursor"]) == made[1::-1]


async def test_tasks_are_found_by_state(start_paid: StartService, upstream: EmulatedUpstream) -> None:
    service = await start_paid(worker_concurrency=1)
    [done] = await completed(service, "done")
    upstream.script("401")
    [failed] = await completed(service, "failed")
    upstream.script("hang")
    runs = await post(service, "runs")
    await upstream.ledger.wait_for(lambda ledger: ledger.total == 3)
    waits, gone = await post(service, "waits"), await post(service, "gone")
    await service.delete(f"/api/images/{gone}")
    expected = {"completed": done, "failed": failed, "processing": runs, "pending": waits, "cancelled": gone}
    for status, task_id in expected.items():
        assert await ids(service, status=status) == [task_id]
    assert set(await ids(service)) == set(expected.values())


async def test_every_instance_lists_all(start_two: StartTwo) -> None:
    client_a, client_b = await start_two()
    made = await completed(client_a, *"ab") + await completed(client_b, "c")
    assert await ids(client_a) == await ids(client_b) == made[::-1]


async def test_an_unreadable_record_is_skipped(service: Client) -> None:
    made = await completed(service, "a")
    queue = service.app[QUEUE]
    await queue.connection.commands.set(queue.keys.record("f" * 32), b"junk", px=10_000)
    await queue.connection.commands.set(queue.keys.record("e" * 32), b"9 new things", px=10_000)
    assert await ids(service) == made


@over_rows(
    ("query", "field"),
    [
        ("limit=0", "limit"),
        ("limit=101", "limit"),
        ("limit=x", "limit"),
        ("limit=", "limit"),
        ("cursor=x", "cursor"),
        ("cursor=", "cursor"),
        ("cursor=1-2", "cursor"),
        ("status=done", "status"),
        ("status=", "status"),
    ],
)
async def test_a_bad_query_is_rejected_by_name(service: Client, query: str, field: str) -> None:
    answer = await service.get(f"/api/images?{query}", headers=AS_ADMIN)
    body = await answer.json()
    assert (answer.status, body["code"]) == (400, "invalid_request")
    assert [fault["field"] for fault in body["details"]] == [field]


async def test_all_faults_are_reported_together(service: Client) -> None:
    answer = await service.get("/api/images?limit=0&cursor=x&status=x", headers=AS_ADMIN)
    assert len((await answer.json())["details"]) == 3


async def test_the_list_is_for_the_operator_only(service: Client) -> None:
    assert (await service.get("/api/images")).status == 401
    assert (await service.post("/api/images")).status == 405
