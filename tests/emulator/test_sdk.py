"""Tests of the real `together` package against the emulator, including its error classes."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from io import BytesIO

import aiohttp
import httpx
import pytest
import together
from PIL import Image

from tests.emulator.conftest import MODEL
from tests.emulator_fixtures import EmulatedUpstream


@pytest.fixture
async def client(upstream: EmulatedUpstream) -> AsyncIterator[together.AsyncTogether]:
    async with together.AsyncTogether(api_key="any", base_url=upstream.url, max_retries=0) as opened:
        yield opened


async def test_the_sync_client_gets_a_link_to_the_image(
    upstream: EmulatedUpstream, session: aiohttp.ClientSession
) -> None:
    def generate() -> together.types.ImageFile:
        with together.Together(api_key="any", base_url=upstream.url, max_retries=0) as client:
            return client.images.generate(model=MODEL, prompt="a cat", width=512, height=256, steps=4, seed=7)

    answer = await asyncio.to_thread(generate)
    async with session.get(answer.data[0].model_dump()["url"]) as response:
        image = Image.open(BytesIO(await response.read()))
    assert (answer.object, answer.model, image.format, image.size) == ("list", MODEL, "JPEG", (512, 256))
    call = upstream.ledger.calls[0]
    assert (call.prompt, call.n, call.seed, call.paid) == ("a cat", 1, 7, True)
    assert call.body["steps"] == 4


async def test_the_async_client_gets_base64(client: together.AsyncTogether) -> None:
    answer = await client.images.generate(
        model=MODEL, prompt="a cat", n=2, width=64, height=128, response_format="base64", output_format="png"
    )
    images = [Image.open(BytesIO(base64.b64decode(entry.model_dump()["b64_json"]))) for entry in answer.data]
    assert [(image.format, image.size) for image in images] == [("PNG", (64, 128))] * 2


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("400_unsupported", together.BadRequestError),
        ("400_non_serverless", together.BadRequestError),
        ("401", together.AuthenticationError),
        ("402", together.APIStatusError),
        ("403", together.PermissionDeniedError),
        ("404_model", together.NotFoundError),
        ("413", together.APIStatusError),
        ("422_nsfw", together.UnprocessableEntityError),
        ("429_model", together.RateLimitError),
        ("500", together.InternalServerError),
        ("503", together.InternalServerError),
        ("524", together.InternalServerError),
        ("529", together.InternalServerError),
        ("reset", together.APIConnectionError),
        ("close", together.APIConnectionError),
        ("truncated", together.APIConnectionError),
    ],
)
async def test_an_error_is_raised_as_the_right_class(
    client: together.AsyncTogether, fault: str, expected: type[together.APIError]
) -> None:
    with pytest.raises(together.APIError) as caught:
        await client.images.generate(model=MODEL, prompt=f"{{{{fault:{fault}}}}}")
    assert type(caught.value) is expected


async def test_a_retry_of_the_client_is_a_second_paid_call(upstream: EmulatedUpstream) -> None:
    upstream.script({"fault": "503", "headers": {"retry-after-ms": "1"}})
    async with together.AsyncTogether(api_key="any", base_url=upstream.url, max_retries=1) as client:
        assert (await client.images.generate(model=MODEL, prompt="a cat")).data
    first, second = upstream.ledger.paid
    assert (first.outcome, second.outcome) == (503, 200)
    assert first.body_hash == second.body_hash


async def test_a_client_that_times_out_has_paid(client: together.AsyncTogether, upstream: EmulatedUpstream) -> None:
    upstream.script("hang")
    with pytest.raises(together.APITimeoutError):
        await client.images.generate(model=MODEL, prompt="a cat", timeout=httpx.Timeout(20, read=0.2))
    await upstream.ledger.wait_for(lambda ledger: ledger.total and not ledger.in_flight)
    assert (upstream.ledger.calls[0].outcome, upstream.ledger.paid_total) == ("hang", 1)
