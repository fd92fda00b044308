"""Tests of the stream of several tasks: `GET /api/events?tasks=a,b`."""

from __future__ import annotations

import re

import pytest
from aiohttp import ClientResponse

from imagegen.app import QUEUE
from imagegen.web.api import events
from tests.support import eventually, over_rows
from tests.web.conftest import Client, StartService
from tests.web.event_blocks import UNKNOWN, finished, post, read_blocks, read_events, streams


async def many(client: Client, *ids: str, last: str | None = None) -> ClientResponse:
    headers = {} if last is None else {"Last-Event-ID": last}
    return await client.get("/api/events", params={"tasks": ",".join(ids)}, headers=headers)


async def test_one_stream_follows_several_tasks_to_the_last_end(start_service: StartService) -> None:
    service = await start_service(sandbox_delay_s=0.2)
    ids = [await post(service, prompt) for prompt in "abc"]
    received = await read_events(await many(service, *ids))
    for task_id in ids:
        own = [block for block in received if block.data["taskId"] == task_id]
        assert [own[0].event, own[-1].event] == ["snapshot", "completed"]
        assert all(re.fullmatch(rf"{task_id}:\d+", block.id) for block in own)
    assert received[-1].event == "completed"
    assert streams(service) == 0


async def test_a_client_that_has_all_outcomes_gets_204(service: Client) -> None:
    ids = [await post(service, prompt) for prompt in "ab"]
    for task_id in ids:
        await finished(service, task_id)
    received = await read_blocks(await many(service, *ids))
    assert [block.event for block in received] == ["snapshot", "completed"] * 2 + [""]
    assert (await many(service, *ids, last=received[-1].id)).status == 204
    again = await read_events(await many(service, *ids, last=received[1].id))
    assert {block.data["taskId"] for block in again} == {ids[1]}


async def test_the_last_id_of_an_ended_stream_covers_all_its_tasks(
    start_service: StartService, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = await start_service(sandbox_delay_s=30.0)
    ids = [await post(service, prompt) for prompt in "ab"]
    live = service.app[QUEUE].task_cache.live
    await eventually(lambda: all(live[task_id].progress >= 10 for task_id in ids))
    monkeypatch.setattr(events, "MAX_STREAM_S", 0.1)
    received = await read_blocks(await many(service, *ids))
    assert "retry" in received[-1].fields
    again = await read_blocks(await many(service, *ids, last=received[-1].id))
    assert [block.event for block in again] == [""]


async def test_an_unknown_task_in_a_stream_is_reported(service: Client) -> None:
    task_id = await post(service, "a")
    await finished(service, task_id)
    received = await read_events(await many(service, UNKNOWN, task_id))
    assert received[0].data["taskId"] == UNKNOWN
    assert (received[0].event, received[0].data["status"]) == ("snapshot", "not_found")
    assert [block.event for block in received[1:]] == ["snapshot", "completed"]
    assert (await many(service, UNKNOWN)).status == 404


@over_rows("query", ["", "?tasks=", "?tasks=a,", "?tasks=" + ",".join(map(str, range(51)))])
async def test_a_stream_accepts_1_to_50_tasks(service: Client, query: str) -> None:
    answer = await service.get(f"/api/events{query}")
    body = await answer.json()
    assert (answer.status, body["code"], body["details"][0]["field"]) == (400, "invalid_request", "tasks")


async def test_50_tasks_and_duplicate_ids_are_accepted(service: Client) -> None:
    task_id = await post(service, "a")
    await finished(service, task_id)
    ids = [f"{number:032x}" for number in range(49)]
    received = await read_events(await many(service, *ids, task_id, task_id))
    assert received[-1].event == "completed"
    assert len(received) == 51
