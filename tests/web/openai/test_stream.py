"""Tests of `stream: true`: a frame for each image as it completes, and an ordinary status before the first one."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import orjson
import pytest

from imagegen.app import QUEUE
from imagegen.images.store import ImageStore, OpenedImage
from imagegen.web.handler_services import SERVICES
from tests.emulator_fixtures import EmulatedUpstream
from tests.support import eventually
from tests.web.openai.conftest import Serve, Service

Frame = tuple[str, dict[str, Any]]


def frames(text: str) -> list[Frame]:
    found = []
    for block in filter(None, text.replace("\r\n", "\n").split("\n\n")):
        fields = dict(line.split(": ", 1) for line in block.split("\n"))
        if "data" in fields:
            found.append((fields["event"], orjson.loads(fields["data"])))
    return found


async def first_images(service: Service) -> None:
    """Wait until the only task has the images of its first call."""
    live = service.app[QUEUE].task_cache.live
    await eventually(lambda: [len(task.images) for task in live.values()] == [4])


async def test_each_image_is_one_completed_event(service: Service) -> None:
    answer = await service.generate(stream=True, size="512x256", n=2, output_format="png", partial_images=3, seed=1)
    assert (answer.status, answer.content_type) == (200, "text/event-stream")
    assert answer.headers["x-request-id"]
    got = frames(await answer.text())
    assert [event for event, _ in got] == ["image_generation.completed"] * 2
    linked = await (await service.generate(size="512x256", n=2, output_format="png", seed=1)).json()
    for (event, data), entry in zip(got, linked["data"], strict=True):
        image = await service.fetch_image(entry["url"])
        assert base64.b64decode(data.pop("b64_json")) == image
        assert isinstance(data.pop("created_at"), int)
        assert data == {
            "type": event,
            "background": "opaque",
            "output_format": "png",
            "quality": "high",
            "size": "512x256",
            "usage": {
                "input_tokens": 0,
                "output_tokens": 0,
                "total_tokens": 0,
                "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
            },
        }


async def test_a_picture_is_sent_before_the_others_are_there(service: Service, upstream: EmulatedUpstream) -> None:
    upstream.script("ok", {"fault": "422_nsfw", "held": 1})
    streaming = asyncio.create_task(service.generate(stream=True, n=8, seed=1))
    await first_images(service)
    await upstream.ledger.wait_for(lambda ledger: ledger.total == 2)
    upstream.release()
    got = frames(await (await streaming).text())
    *pictures, (event, last) = got
    assert [name for name, _ in pictures] == ["image_generation.completed"] * 4
    assert (event, last["type"], last["error"]["code"]) == ("error", "error", "content_policy_violation")


async def test_a_streaming_client_joins_the_task_of_others(service: Service, upstream: EmulatedUpstream) -> None:
    upstream.script({"fault": "ok", "delay_s": 0.2})
    streamed, plain = await asyncio.gather(service.generate(stream=True, seed=1), service.generate(seed=1))
    again = await service.generate(stream=True, seed=1)
    assert frames(await streamed.text()) == frames(await again.text())
    assert (plain.status, upstream.ledger.total) == (200, 1)


async def test_an_error_before_the_first_frame_is_an_ordinary_status(serve: Serve, upstream: EmulatedUpstream) -> None:
    service = await serve(max_attempts=1)
    wrong = await service.generate(stream=True, n=0)
    refused = await service.generate(stream=True, prompt="{{fault:422_nsfw}}")
    upstream.script("hang")
    early = await service.generate({"x-stainless-read-timeout": "0.2"}, stream=True)
    statuses = [(answer.status, answer.content_type) for answer in (wrong, refused, early)]
    assert statuses == [(400, "application/json"), (400, "application/json"), (503, "application/json")]
    assert early.headers["retry-after"] == "1"


async def test_bytes_missing_before_the_first_frame_are_an_error_status(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def nothing(*_: object) -> None:
        return None

    store: ImageStore = service.app[SERVICES].store
    monkeypatch.setattr(store, "open", nothing)
    answer = await service.generate(stream=True)
    assert (answer.status, (await answer.json())["error"]["code"]) == (503, "store_unavailable")


async def test_bytes_missing_later_end_the_stream_with_an_error(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = service.app[SERVICES].store
    opened = store.open

    async def only_the_first(task_id: str, image: Any) -> OpenedImage | None:
        return None if image.index else await opened(task_id, image)

    monkeypatch.setattr(store, "open", only_the_first)
    got = frames(await (await service.generate(stream=True, n=2)).text())
    assert [(event, data.get("error", {}).get("code")) for event, data in got] == [
        ("image_generation.completed", None),
        ("error", "store_unavailable"),
    ]


async def test_a_service_that_stops_ends_the_stream_with_an_error(service: Service, upstream: EmulatedUpstream) -> None:
    upstream.script("ok", "hang")
    streaming = asyncio.create_task(service.generate(stream=True, n=8))
    await first_images(service)
    context = service.app[SERVICES]
    context.readiness.draining = True
    context.feed.wake_all()
    got = frames(await (await streaming).text())
    assert [event for event, _ in got] == ["image_generation.completed"] * 4 + ["error"]
    assert got[-1][1]["error"]["code"] == "draining"
