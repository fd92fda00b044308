"""Tests of the Python client against the service, over real connections."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path

import httpx
import pytest

from imagegen.client import (
    AsyncImageClient,
    AuthenticationFailed,
    ImageClient,
    RepeatPolicy,
    RequestConflict,
    RequestRefused,
    ResourceNotFound,
    TaskUnsuccessful,
    TooManyRequests,
    WaitTimeout,
)
from tests.emulator_fixtures import EmulatedUpstream
from tests.image_bytes import image_file
from tests.web.conftest import Client, StartService

API_KEY = "k" * 40


def address(service: Client) -> str:
    return str(service.make_url("")).rstrip("/")


class LosingTransport(httpx.AsyncBaseTransport):
    """Loses the responses of the first submits, after the service has received them."""

    def __init__(self, losses: int) -> None:
        self._inner = httpx.AsyncHTTPTransport()
        self._left = losses

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        response = await self._inner.handle_async_request(request)
        if request.method == "POST" and self._left:
            self._left -= 1
            await response.aread()
            raise httpx.ReadError("lost")
        return response

    async def aclose(self) -> None:
        await self._inner.aclose()


async def test_a_submit_with_lost_answers_is_paid_once(start_paid: StartService, upstream: EmulatedUpstream) -> None:
    upstream.script({"fault": "401", "times": 1})
    service = await start_paid()
    http = httpx.AsyncClient(transport=LosingTransport(2), trust_env=False)
    async with AsyncImageClient(address(service), http=http, repeats=RepeatPolicy(base_s=0.2)) as client:
        with pytest.raises(TaskUnsuccessful) as caught:  # though it failed before the repeats came
            await client.generate("once", width=64, height=64, timeout_s=10)
    assert caught.value.code == "upstream_auth"
    assert len(upstream.ledger.calls) == 1


async def test_images_come_by_events_and_are_saved_whole(service: Client, tmp_path: Path) -> None:
    async with AsyncImageClient(address(service)) as client:
        receipt = await client.submit("two images", n=2, width=64, height=64)
        assert not receipt.cached
        events = [event async for event in client.events(receipt.task_id)]
        assert [event.name for event in events if event.image] == ["image", "image"]
        assert events[0].name == "snapshot" or events[0].image
        task = events[-1].task
        assert task is not None
        assert (task.status, task.progress, len(task.images)) == ("completed", 100, 2)
        for image in task.images:
            path = await client.save(image, tmp_path / f"{image.index}.png")
            assert hashlib.sha256(path.read_bytes()).hexdigest() == image.sha256
        assert [event async for event in client.events(receipt.task_id, events[-1].id)] == []
        again = await client.submit("two images", n=2, width=64, height=64)
        assert again.cached
        assert await client.get(receipt.task_id) == task


async def test_a_task_is_waited_for_cancelled_and_retried(service: Client) -> None:
    async with AsyncImageClient(address(service)) as client:
        receipt = await client.submit("slow [slow:30]", width=64, height=64)
        with pytest.raises(WaitTimeout):
            await client.wait(receipt.task_id, timeout_s=0.1)
        assert (await client.cancel(receipt.task_id)).status == "cancelled"
        with pytest.raises(RequestConflict) as caught:
            await client.cancel(receipt.task_id)
        assert caught.value.code == "already_finished"
        assert (await client.retry(receipt.task_id)).task_id == receipt.task_id
        assert (await client.cancel(receipt.task_id)).status == "cancelled"
        with pytest.raises(ResourceNotFound):
            await client.get("0" * 32)


async def test_an_upload_is_the_input_of_a_request_by_the_synchronous_client_too(
    service: Client, tmp_path: Path
) -> None:
    (tmp_path / "input.png").write_bytes(image_file())

    def edit() -> str:
        with ImageClient(address(service)) as client:
            upload = client.upload(tmp_path / "input.png")
            assert client.upload(image_file()).upload_id == upload.upload_id
            task = client.generate("blue", image_url=upload.upload_id, width=64, height=64, timeout_s=20)
            assert client.download(task.images[0]).startswith(b"\x89PNG")
            assert list(client.events(task.task_id))[-1].name == "completed"
            return task.status

    assert await asyncio.to_thread(edit) == "completed"


async def test_refusals_have_their_fields_and_limits_their_seconds(start_service: StartService) -> None:
    service = await start_service(
        api_keys={"web": hashlib.sha256(API_KEY.encode()).hexdigest()}, image_rate_limit_max=1
    )
    async with AsyncImageClient(address(service)) as stranger:
        with pytest.raises(AuthenticationFailed):
            await stranger.submit("a")
    quick = RepeatPolicy(max_attempts=1)
    async with AsyncImageClient(address(service), api_key=API_KEY, repeats=quick) as client:
        with pytest.raises(RequestRefused) as refused:
            await client.submit("a", width=100, n=99)
        assert {detail.field for detail in refused.value.details} == {"width", "n"}
        with pytest.raises(TooManyRequests) as limited:
            await client.submit("b", width=64, height=64)
        assert limited.value.code == "rate_limited"
        assert limited.value.retry_after_s
        assert any(model["id"] for model in await client.models())
