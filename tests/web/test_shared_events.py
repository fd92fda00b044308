"""Tests of streams with the same tasks: an event is rendered once for equal clients, and each gets its own form."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from aiohttp import ClientResponse, web

from imagegen.app import QUEUE
from imagegen.turn_queue import PER_TURN
from imagegen.web.api.serializers import task_view
from imagegen.web.http.event_stream import EventStream
from tests.support import AS_ADMIN, Turns, eventually
from tests.web.api_keys import KEYS, OTHER_SECRET, SECRET, bearer
from tests.web.conftest import Client, StartService
from tests.web.event_blocks import SMALL, Block, blocks, finished, post, read_blocks, read_events, streams

STREAMS = 40


@pytest.fixture
def rendered(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Count the renderings of tasks."""
    count = 0

    def counted(*args: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        return task_view(*args, **options)

    monkeypatch.setattr("imagegen.web.api.tasks.task_view", counted)
    return lambda: count


async def start_paused(start_service: StartService, **settings: Any) -> Client:
    """Start a service that starts no task until `resume`."""
    service = await start_service(sandbox_delay_s=0.2, **settings)
    assert (await service.post("/api/admin/pause", headers=AS_ADMIN)).status == 200
    return service


async def resume(service: Client) -> None:
    assert (await service.post("/api/admin/resume", headers=AS_ADMIN)).status == 200


async def open_stream(service: Client, task_id: str, **headers: str) -> ClientResponse:
    response = await service.get(f"/api/images/{task_id}/events", headers={"Accept-Language": "zh", **headers})
    assert response.status == 200
    return response


async def read_all(service: Client, responses: list[ClientResponse]) -> list[list[Block]]:
    await eventually(lambda: streams(service) == len(responses))
    await resume(service)
    return await asyncio.gather(*map(read_events, responses))


async def test_an_event_is_rendered_once_for_all_its_streams(
    start_service: StartService, rendered: Callable[[], int]
) -> None:
    service = await start_paused(start_service)
    task_id = await post(service, "a", n=2)
    received = await read_all(service, [await open_stream(service, task_id) for _ in range(STREAMS)])
    assert [events[-1].event for events in received] == ["completed"] * STREAMS
    shown = {block.fields["data"] for events in received for block in events if block.event != "image"}
    assert 2 <= len(shown) <= rendered() < STREAMS


async def test_many_waits_for_a_task_render_its_end_once(
    start_service: StartService, rendered: Callable[[], int]
) -> None:
    service = await start_paused(start_service)
    task_id = await post(service, "a")
    waits = [asyncio.create_task(finished(service, task_id)) for _ in range(STREAMS)]
    await eventually(lambda: streams(service) == STREAMS)
    await resume(service)
    answers = await asyncio.gather(*waits)
    assert [answer["status"] for answer in answers] == ["completed"] * STREAMS
    assert rendered() == 1


async def test_streams_of_one_task_have_the_links_and_language_of_their_clients(start_service: StartService) -> None:
    service = await start_paused(start_service, hosts=("0.0.0.0",))
    task_id = await post(service, "a")
    forms = [(f"{host}.example", spoken) for host in ("one", "two") for spoken in ("en", "zh")]
    responses = [
        await open_stream(service, task_id, **{"Host": host, "Accept-Language": spoken}) for host, spoken in forms * 2
    ]
    for (host, spoken), events in zip(forms * 2, await read_all(service, responses), strict=True):
        assert ("The task" in events[0].data["message"]) is (spoken == "en")
        images = [block.data["url"] for block in events if block.event == "image"]
        assert images == [image["url"] for image in events[-1].data["data"]]
        assert images[0].startswith(f"http://{host}/api/images/")


async def test_streams_of_a_shared_task_show_the_webhooks_of_their_own_client(start_service: StartService) -> None:
    service = await start_paused(start_service, api_keys=KEYS, cache_scope="shared")
    task_ids = set()
    for name, secret in (("web", SECRET), ("app", OTHER_SECRET)):
        body = {"prompt": "a", **SMALL, "webhook": {"url": f"https://{name}.example.com/hook"}}
        answer = await service.post("/api/images/generate", json=body, headers=bearer(secret))
        task_ids.add((await answer.json())["taskId"])
    (task_id,) = task_ids
    clients = [bearer(SECRET), bearer(OTHER_SECRET), AS_ADMIN] * 2
    received = await read_all(service, [await open_stream(service, task_id, **client) for client in clients])
    hosts = [[hook["url"] for hook in events[0].data["webhook"]] for events in received]
    web, app = ["https://web.example.com"], ["https://app.example.com"]
    assert hosts == [web, app, web + app] * 2
    signed = [block.data["url"] for events in received for block in events if block.event == "image"]
    assert all("&sig=" in url for url in signed)
    assert len(set(signed)) == 1


async def test_a_place_in_the_queue_is_never_that_of_an_earlier_stream(start_service: StartService) -> None:
    service = await start_service(sandbox_delay_s=30.0, worker_concurrency=1)
    running = await post(service, "a")
    await eventually(lambda: service.app[QUEUE].task_cache.live[running].progress > 0)
    first, second = await post(service, "b"), await post(service, "c")
    before = await open_stream(service, second)
    await service.delete(f"/api/images/{first}")
    after = await open_stream(service, second)
    snapshots = [await anext(blocks(response)) for response in (before, after)]
    assert [snapshot.data["queuePosition"] for snapshot in snapshots] == [2, 1]
    before.close()
    after.close()


async def test_the_events_of_several_finished_tasks_come_in_one_write(service: Client) -> None:
    ids = [await post(service, f"prompt {number}") for number in range(8)]
    for task_id in ids:
        await finished(service, task_id)
    response = await service.get("/api/events", params={"tasks": ",".join(ids)})
    assert len([block async for block in _chunks(response)]) == 1


async def _chunks(response: ClientResponse) -> Any:
    async for _, ends_chunk in response.content.iter_chunks():
        if ends_chunk:
            yield ends_chunk


async def test_events_of_many_bytes_come_in_several_writes(service: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imagegen.web.api.events.MAX_UNSENT_BYTES", 1_000)
    ids = [await post(service, f"prompt {number}") for number in range(4)]
    for task_id in ids:
        await finished(service, task_id)
    received = await read_blocks(await service.get("/api/events", params={"tasks": ",".join(ids)}))
    assert [block.event for block in received] == ["snapshot", "completed"] * 4 + [""]


async def test_streams_that_begin_at_once_begin_in_turn(
    start_service: StartService, monkeypatch: pytest.MonkeyPatch
) -> None:
    service, begun, prepare = await start_paused(start_service), 0, EventStream.prepare

    async def counted(self: EventStream, request: web.BaseRequest) -> Any:
        nonlocal begun
        begun += 1
        return await prepare(self, request)

    monkeypatch.setattr(EventStream, "prepare", counted)
    ids = [await post(service, f"prompt {number}") for number in range(PER_TURN)]
    turns = Turns(lambda: begun)
    path = "/api/events?tasks=" + ",".join(ids)
    responses = await asyncio.gather(*(service.get(path) for _ in range(STREAMS)))
    assert (turns.most(), begun) == (1, STREAMS)
    for response in responses:
        response.close()
