"""Tests of the limit of a key's unfinished tasks."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from imagegen.app import CONNECTION, QUEUE
from imagegen.queue import open_tasks
from imagegen.web.guard import GUARD
from tests.support import AS_ADMIN, eventually
from tests.web.conftest import Client, StartService

BODY = {"prompt": "a lighthouse", "width": 64, "height": 64}


async def make_key(client: Client, **fields: Any) -> dict[str, str]:
    answer = await client.post("/api/admin/keys", json=fields, headers=AS_ADMIN)
    return {"X-API-Key": (await answer.json())["secret"]}


async def submit(client: Client, headers: dict[str, str], prompt: object, route: str = "/api/images/generate") -> Any:
    return await client.post(route, json=BODY | {"prompt": str(prompt)}, headers=headers)


async def test_a_key_has_at_most_as_many_unfinished_tasks_as_it_may(start_service: StartService) -> None:
    client = await start_service(sandbox_delay_s=30.0)
    limited, free = await make_key(client, name="limited", openTasks=2), await make_key(client, name="free")
    answers = await asyncio.gather(*(submit(client, limited, number) for number in range(6)))
    assert sorted(answer.status for answer in answers) == [202, 202, 429, 429, 429, 429]
    refused = next(answer for answer in answers if answer.status == 429)
    body = await refused.json()
    assert (body["code"], body["retryable"]) == ("too_many_open_tasks", True)
    assert refused.headers["Retry-After"]
    assert [(await submit(client, free, number)).status for number in range(3)] == [202, 202, 202]
    made = [await answer.json() for answer in answers if answer.status == 202]
    joined = await client.get(f"/api/images/{made[0]['taskId']}", headers=limited)
    assert joined.status == 200
    v1 = await submit(client, limited, "v1", "/v1/images/generations/async")
    assert (v1.status, (await v1.json())["error"]["code"]) == (429, "too_many_open_tasks")
    assert (await client.delete(f"/api/images/{made[0]['taskId']}", headers=limited)).status == 200
    assert [(await submit(client, limited, f"again {number}")).status for number in range(2)] == [202, 429]


async def test_a_task_that_ended_makes_room_and_a_hit_opens_none(service: Client) -> None:
    headers = await make_key(service, name="limited", openTasks=1)
    for number in range(4):
        answer = await service.post(
            "/api/images/generate?wait=20", json=BODY | {"prompt": str(number)}, headers=headers
        )
        assert (await answer.json())["status"] == "completed"
    assert (await submit(service, headers, 0)).status == 200


async def test_the_limit_holds_over_instances_and_ends_elsewhere_are_noticed(
    start_two: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(open_tasks, "CHECK_S", 0.0)
    one, two = await start_two(sandbox_delay_s=30.0)
    headers = await make_key(one, name="limited", openTasks=3)
    await eventually(lambda: two.app[GUARD].ring.has_keys)
    answers = [await submit(client, headers, number) for number in range(3) for client in (one, two)]
    assert [answer.status for answer in answers] == [202] * 6  # each second one joins
    assert [(await submit(client, headers, "more")).status for client in (one, two)] == [429, 429]
    gone = (await answers[0].json())["taskId"]
    assert (await one.delete(f"/api/images/{gone}", headers=headers)).status == 200
    assert [(await submit(two, headers, f"more {number}")).status for number in range(2)] == [202, 429]


async def test_a_submit_that_never_happened_counts_no_longer_than_it_may_be_under_way(
    service: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(open_tasks, "CHECK_S", 0.0)
    headers = await make_key(service, name="limited", openTasks=1)
    redis, keys = service.app[CONNECTION].commands, service.app[QUEUE].keys
    now = service.app[CONNECTION].clock()
    await redis.zadd(keys.open_tasks("limited"), {"0" * 32: now * 1000})
    assert (await submit(service, headers, "a")).status == 429
    await redis.zadd(keys.open_tasks("limited"), {"0" * 32: (now - open_tasks.IN_FLIGHT_S - 1) * 1000})
    assert (await submit(service, headers, "a")).status == 202


async def test_a_key_without_the_limit_costs_no_command(service: Client) -> None:
    headers = await make_key(service, name="free")
    assert (await submit(service, headers, "a")).status == 202
    assert not await service.app[CONNECTION].commands.exists(service.app[QUEUE].keys.open_tasks("free"))


async def test_foreign_names_among_the_open_tasks_take_no_place(service: Client) -> None:
    headers = await make_key(service, name="limited", openTasks=1)
    keys, connection = service.app[QUEUE].keys, service.app[CONNECTION]
    names = [b"\xff\xfe", b"", b"x" * 5_000, *(b"%d" % number for number in range(250))]
    await connection.commands.zadd(keys.open_tasks("limited"), {name: place for place, name in enumerate(names)})
    answer = await service.post("/api/images/generate?wait=20", json=BODY, headers=headers)
    assert (await answer.json())["status"] == "completed"
    assert connection.health.down_since is None
