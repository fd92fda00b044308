"""Tests of server-sent events of one task: on this and another instance, and over restarts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import ClientPayloadError, web
from msgspec.structs import replace

from imagegen.app import QUEUE, SUPERVISOR
from imagegen.queue import change_relay
from imagegen.tasks import transitions
from imagegen.tasks.image import StoredImage
from imagegen.tasks.task import Task, WaitReason
from imagegen.web.api import events
from imagegen.web.api.events import event_name, new_images
from imagegen.web.handler_services import SERVICES
from imagegen.web.http import event_stream
from tests.emulator_fixtures import EmulatedUpstream
from tests.mcp_wire import pause
from tests.support import AS_ADMIN, eventually, over_rows
from tests.web.conftest import Client, StartService, WaitForDiscovery
from tests.web.event_blocks import (
    UNKNOWN,
    Block,
    blocks,
    finished,
    follow,
    post,
    read_blocks,
    read_events,
    streams,
)


async def crash(client: Client) -> None:
    """Stop the loops without releasing claims, as kill -9 does."""
    await client.app[SUPERVISOR].stop()
    runner = client.server.runner
    assert runner
    assert runner.server
    for connection in runner.server.connections:
        connection.force_close()


# Names of events.


def task(**fields: Any) -> Task:
    return Task("a" * 32, 1_000, 1_000, "d", "m", b"{}", 0.0, reason=WaitReason.QUEUED, **fields)


def test_an_event_is_named_after_the_change() -> None:
    pending = task()
    processing = transitions.started(pending, attempts=1, starts=1, now=1.0)
    sent = transitions.progressed(processing, 10)
    done = transitions.completed(sent, [StoredImage(0)], [], now=2.0, ttl_s=60)
    assert event_name(None, pending) == "snapshot"
    assert event_name(pending, processing) == "status"
    assert event_name(processing, sent) == "progress"
    assert event_name(sent, done) == "completed"
    waits = transitions.requeued(sent, reason=WaitReason.RETRYING, retry_at=5.0, attempts=1)
    assert event_name(sent, waits) == "status"
    assert event_name(waits, replace(waits, sequence=waits.sequence + 1, retry_at=9.0)) == "status"


def test_only_new_images_are_sent() -> None:
    first, second, third = (StoredImage(index, sha256=str(index)) for index in range(3))
    before = task(images=(first,))
    assert new_images(None, before) == []
    assert new_images(before, replace(before, images=(first, second))) == [second]
    stale = task(images=(first, second), stale_images=True)
    assert new_images(before, stale) == []
    assert new_images(stale, task(images=(first, third))) == [first, third]


# The stream of one task.


async def test_a_stream_begins_with_a_snapshot_and_ends_with_the_outcome(start_service: StartService) -> None:
    service = await start_service(sandbox_delay_s=0.2)
    await pause(service)
    task_id = await post(service, "a", n=2)
    response = await follow(service, task_id)
    await pause(service, on=False)
    assert response.status == 200
    assert response.headers["Content-Type"].startswith("text/event-stream")
    assert response.headers["X-Accel-Buffering"] == "no"
    assert "no-cache" in response.headers["Cache-Control"]
    assert response.headers["X-Request-Id"]
    received = await read_events(response)
    names = [block.event for block in received]
    assert names[0] == "snapshot"
    assert names[-1] == "completed"
    assert {"progress", "image"} <= set(names) <= {"snapshot", "status", "progress", "image", "completed"}
    ids = [int(block.id) for block in received]
    assert ids == sorted(ids)
    assert all(int(block.id) == block.data["sequence"] for block in received if block.event != "image")
    progress = [block.data["progress"] for block in received if block.event != "image"]
    assert progress == sorted(progress)
    images = [block.data for block in received if block.event == "image"]
    assert [image["index"] for image in images] == [0, 1]
    assert all(image["url"].startswith("http://") for image in images)
    assert received[-1].data == await finished(service, task_id)
    assert streams(service) == 0


async def test_a_late_client_gets_the_outcome_immediately(service: Client) -> None:
    task_id = await post(service, "a")
    final = await finished(service, task_id)
    received = await asyncio.wait_for(read_events(await follow(service, task_id)), 20)
    assert [block.event for block in received] == ["snapshot", "completed"]
    assert received[-1].data == final
    assert received[-1].id == str(final["sequence"])


async def test_a_client_that_has_the_outcome_gets_204(service: Client) -> None:
    task_id = await post(service, "a")
    final = await finished(service, task_id)
    response = await follow(service, task_id, final["sequence"])
    assert (response.status, await response.read()) == (204, b"")


async def test_a_client_with_an_earlier_event_gets_the_outcome(service: Client) -> None:
    task_id = await post(service, "a")
    final = await finished(service, task_id)
    received = await read_events(await follow(service, task_id, final["sequence"] - 1))
    assert received[-1].event == "completed"


@over_rows("last", ["x", "-1", "9" * 18, "9" * 40, "1:2", ""])
async def test_an_invalid_last_event_id_is_ignored(service: Client, last: str) -> None:
    task_id = await post(service, "a")
    await finished(service, task_id)
    received = await read_events(await follow(service, task_id, last))
    assert [block.event for block in received] == ["snapshot", "completed"]


async def test_a_reconnecting_client_gets_only_new_events(start_paid: StartService, upstream: EmulatedUpstream) -> None:
    upstream.script({"fault": "ok", "held": 1})
    service = await start_paid()
    task_id = await post(service, "a")
    first = await follow(service, task_id)
    last = ""
    async for block in blocks(first):
        last = block.id
        if block.data["progress"] >= 10:
            break
    first.close()
    response = await follow(service, task_id, last)
    await upstream.ledger.wait_for(lambda ledger: ledger.in_flight)
    upstream.release()
    received = await read_events(response)
    assert all(int(block.id) >= int(last) for block in received)
    assert all(int(block.id) > int(last) for block in received if block.event != "image")
    assert received[-1].event == "completed"


async def test_a_failed_and_a_cancelled_task_end_their_streams(
    start_paid: StartService, upstream: EmulatedUpstream
) -> None:
    service = await start_paid()
    upstream.script({"fault": "422", "match": "bad"}, {"fault": "hang", "match": "long"})
    bad, long = await post(service, "bad"), await post(service, "long")
    assert (await read_events(await follow(service, bad)))[-1].event == "failed"
    response = await follow(service, long)
    await service.delete(f"/api/images/{long}")
    end = (await asyncio.wait_for(read_events(response), 20))[-1]
    assert (end.event, end.data["status"]) == ("cancelled", "cancelled")


@over_rows("task_id", [UNKNOWN, "odd", "%7B"])
async def test_an_unknown_task_has_no_stream(service: Client, task_id: str) -> None:
    response = await service.get(f"/api/images/{task_id}/events")
    assert response.status == 404
    assert (await response.json())["status"] == "not_found"


async def test_a_stream_route_is_not_an_image_and_accepts_only_get(service: Client) -> None:
    task_id = await post(service, "a")
    answer = await service.post(f"/api/images/{task_id}/events")
    assert (answer.status, answer.headers["Allow"]) == (405, "GET")
    head = await service.head(f"/api/images/{task_id}/events")
    assert head.status == 405


async def test_a_comment_keeps_a_silent_stream_open(
    start_service: StartService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_stream, "PING_S", 0.05)
    service = await start_service(sandbox_delay_s=30.0)
    response = await follow(service, await post(service, "a"))
    comments = 0
    async for block in blocks(response):
        comments += bool(block.comment)
        if comments == 3:
            break
    response.close()


async def test_a_client_that_leaves_before_its_stream_begins_is_a_lost_connection() -> None:
    begun, outcome = asyncio.Event(), asyncio.get_running_loop().create_future()

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        begun.set()
        await eventually(lambda: request.transport is None)
        try:
            await event_stream.EventStream().prepare(request)
        except Exception as error:  # noqa: BLE001 - checked below
            outcome.set_result(error)
        return web.Response()

    runner = web.ServerRunner(web.Server(handle))
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    _, writer = await asyncio.open_connection(*runner.addresses[0])
    writer.write(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
    await begun.wait()
    writer.close()
    assert isinstance(await outcome, ConnectionResetError)
    await runner.cleanup()


async def test_a_stream_counts_once_for_the_limits(start_service: StartService) -> None:
    service = await start_service(sandbox_delay_s=0.3, rate_limit_max=2)
    response = await follow(service, await post(service, "a"))
    assert response.headers["X-RateLimit-Remaining"] == "0"
    assert (await read_events(response))[-1].event == "completed"


# Streams that end before their task.


async def test_a_stream_ends_after_its_limit_with_a_retry_delay(
    start_service: StartService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "MAX_STREAM_S", 0.1)
    service = await start_service(sandbox_delay_s=30.0)
    response = await follow(service, await post(service, "a"))
    received = [block async for block in blocks(response)]
    assert 1_000 <= int(received[-1].fields["retry"]) <= 3_000
    assert "data" not in received[-1].fields
    assert streams(service) == 0


async def test_streams_end_cleanly_when_the_service_stops(start_service: StartService) -> None:
    service = await start_service(sandbox_delay_s=30.0)
    response = await follow(service, await post(service, "a"))
    await eventually(lambda: streams(service) == 1)
    context = service.app[SERVICES]
    context.readiness.draining = True
    context.feed.wake_all()
    received = await asyncio.wait_for(read_blocks(response), 20)
    assert "retry" in received[-1].fields
    late = await follow(service, await running(service))
    received = await asyncio.wait_for(read_blocks(late), 20)
    assert received[0].event == "snapshot"
    assert "retry" in received[-1].fields


async def test_a_stream_ends_that_was_writing_when_the_service_stopped(
    start_service: StartService, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, released, send = asyncio.Event(), asyncio.Event(), event_stream.EventStream.send_encoded

    async def held(self: event_stream.EventStream, data: bytes) -> None:
        await send(self, data)
        written.set()
        await released.wait()

    monkeypatch.setattr(event_stream.EventStream, "send_encoded", held)
    service = await start_service(sandbox_delay_s=30.0)
    await service.post("/api/admin/pause", headers=AS_ADMIN)
    response = await follow(service, await post(service, "a"))
    await asyncio.wait_for(written.wait(), 20)
    context = service.app[SERVICES]
    context.readiness.draining = True
    context.feed.wake_all()
    for _ in range(3):  # the turn of the wake comes while the stream writes
        await asyncio.sleep(0)
    released.set()
    received = await asyncio.wait_for(read_blocks(response), 20)
    assert "retry" in received[-1].fields


async def running(client: Client) -> str:
    return next(iter(client.app[QUEUE].task_cache.live))


async def test_open_streams_do_not_delay_shutdown(start_service: StartService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imagegen.web.http.server.SHUTDOWN_S", 50.0)
    service = await start_service(sandbox_delay_s=30.0)
    task_id = await post(service, "a")
    open_ones = [await follow(service, task_id) for _ in range(5)]
    began = time.monotonic()
    await service.server.close()
    assert time.monotonic() - began < 25
    for response in open_ones:
        assert "retry" in (await read_blocks(response))[-1].fields


async def test_departed_clients_leave_no_subscriptions(start_service: StartService) -> None:
    service = await start_service(sandbox_delay_s=30.0)
    task_id = await post(service, "a")
    await eventually(lambda: service.app[QUEUE].task_cache.live[task_id].progress)
    before = len(asyncio.all_tasks())
    responses = await asyncio.gather(*(follow(service, task_id) for _ in range(30)))
    await eventually(lambda: streams(service) == 30)
    for response in responses:
        response.close()
    await eventually(lambda: streams(service) == 0)
    await eventually(lambda: len(asyncio.all_tasks()) <= before)


# Several instances, and restarts.


async def test_remote_changes_arrive_before_the_next_poll(
    start_service: StartService, wait_for_discovery: WaitForDiscovery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(change_relay, "REFRESH_S", 60.0)
    client_a, client_b = await start_service(), await start_service()
    await wait_for_discovery(client_a, client_b)
    await pause(client_a)
    task_id = await post(client_a, "a", n=2)

    async def finished_at(client: Client) -> dict[str, float]:
        response = await follow(client, task_id)
        return {block.id + block.event: time.monotonic() async for block in blocks(response) if block.fields}

    following = asyncio.gather(finished_at(client_a), finished_at(client_b))
    await eventually(lambda: streams(client_a) == streams(client_b) == 1)
    await pause(client_a, on=False)
    here, there = await following
    common = here.keys() & there.keys()
    assert len(common) >= 4
    assert max(abs(here[key] - there[key]) for key in common) < 20


async def test_simultaneous_completions_elsewhere_are_all_sent(
    start_service: StartService, wait_for_discovery: WaitForDiscovery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(change_relay, "REFRESH_S", 60.0)
    client_a = await start_service(sandbox_delay_s=2.0, worker_concurrency=20)
    ids = [await post(client_a, f"prompt {number}") for number in range(20)]
    client_b = await start_service()
    await wait_for_discovery(client_a, client_b)
    ends = [
        *(finished(client_b, task_id) for task_id in ids),
        *(_read_task_events(client_b, task_id) for task_id in ids),
    ]
    await asyncio.wait_for(asyncio.gather(*ends), 40)


async def _read_task_events(client: Client, task_id: str) -> None:
    assert (await read_events(await follow(client, task_id)))[-1].event == "completed"


async def test_a_stream_resumes_on_another_instance(
    start_paid: StartService, upstream: EmulatedUpstream, wait_for_discovery: WaitForDiscovery
) -> None:
    upstream.script({"fault": "ok", "held": 1})
    client_a, client_b = await start_paid(), await start_paid()
    await wait_for_discovery(client_a, client_b)
    task_id = await post(client_a, "a")
    first, last = await follow(client_a, task_id), ""
    async for block in blocks(first):
        last = block.id
        if block.data["status"] == "processing":
            break
    first.close()
    resumed = await follow(client_b, task_id, last)
    await upstream.ledger.wait_for(lambda ledger: ledger.in_flight)
    upstream.release()
    received = await read_events(resumed)
    assert received[-1].event == "completed"
    assert all(int(block.id) >= int(last) for block in received)
    assert (await follow(client_a, task_id, received[-1].id)).status == 204


async def test_no_event_is_missed_over_a_crash(start_service: StartService) -> None:
    client_a = await start_service(sandbox_delay_s=20.0, lease_s=1.0)
    task_id = await post(client_a, "a")
    response, last = await follow(client_a, task_id), 0
    async for block in blocks(response):
        last = int(block.id)
        if block.data["progress"] >= 10:
            break
    await crash(client_a)
    with pytest.raises((ClientPayloadError, ConnectionError, StopAsyncIteration)):
        await anext(blocks(response))
    client_b = await start_service(lease_s=1.0)
    received = await asyncio.wait_for(read_events(await follow(client_b, task_id, last)), 40)
    assert received[-1].event == "completed"
    assert received[-1].data["possiblyBilledTwice"] == 1
    ids = [int(block.id) for block in received]
    assert ids == sorted(ids)
    assert all(block_id >= last for block_id in ids)


async def test_a_stream_resumes_after_a_restart_that_released_its_task(start_service: StartService) -> None:
    client_a = await start_service(sandbox_delay_s=20.0)
    task_id = await post(client_a, "a")
    received = [block async for block in _until_closed(client_a, task_id)]
    client_b = await start_service()
    again = await asyncio.wait_for(read_events(await follow(client_b, task_id, received[-1].id)), 40)
    assert again[-1].event == "completed"
    assert int(again[0].id) > int(received[-1].id)


async def _until_closed(client: Client, task_id: str) -> AsyncIterator[Block]:
    response = await follow(client, task_id)
    async for block in blocks(response):
        if "data" in block.fields:
            yield block
            if block.data["progress"] >= 10:
                await client.server.close()
