"""Tests of SiliconFlow: the words of its models, its errors, and what a lost or slow answer means."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from imagegen.emulator.siliconflow import SiliconFlowEmulator
from imagegen.errors import UpstreamError
from imagegen.providers.model_rules import Pricing
from imagegen.providers.model_table import load_table
from imagegen.providers.siliconflow import SiliconFlowProvider, fields_of, sent_request
from imagegen.tasks.image import ImageLink
from tests.emulated_jobs import emulated, failed, replied
from tests.providers.conftest import MakeCall, edits_taken
from tests.support import LoopTime, eventually, over_rows

KOLORS, QWEN, EDIT, EDIT_2509 = (
    "Kwai-Kolors/Kolors",
    "Qwen/Qwen-Image",
    "Qwen/Qwen-Image-Edit",
    "Qwen/Qwen-Image-Edit-2509",
)
LINKS = [f"https://a.example/{number}.png" for number in (1, 2, 3)]


@pytest.fixture
async def cloud() -> AsyncIterator[SiliconFlowEmulator]:
    async with emulated(SiliconFlowEmulator, job_s=0, key="sk-secret") as cloud:
        yield cloud


@pytest.fixture
def siliconflow(session: aiohttp.ClientSession, cloud: SiliconFlowEmulator) -> SiliconFlowProvider:
    return SiliconFlowProvider(session, api_key="sk-secret", base_url=cloud.url, timeout_s=30)


@over_rows(
    ("model", "given", "sent"),
    [
        (KOLORS, {}, {"image_size": "512x512"}),
        (
            KOLORS,
            {"steps": 20, "guidanceScale": 7.5, "negativePrompt": "dogs"},
            {"image_size": "512x512", "num_inference_steps": 20, "guidance_scale": 7.5, "negative_prompt": "dogs"},
        ),
        (QWEN, {"guidanceScale": 4, "width": 1328, "height": 1328}, {"image_size": "1328x1328", "cfg": 4}),
        (QWEN, {"aspectRatio": "16:9"}, {"image_size": "1360x768"}),
        (EDIT, {"imageUrl": LINKS[0]}, {"image": LINKS[0]}),
        (EDIT_2509, {"referenceImages": LINKS}, {"image": LINKS[0], "image2": LINKS[1], "image3": LINKS[2]}),
        (QWEN, {"quality": "high", "outputFormat": "png"}, {"image_size": "512x512"}),
        (QWEN, {"extra": {"cfg": 3}}, {"image_size": "512x512", "cfg": 3}),
    ],
)
def test_a_field_is_sent_in_the_words_of_its_model(
    make_call: MakeCall, model: str, given: dict[str, Any], sent: dict[str, Any]
) -> None:
    fields = json.loads(json.dumps(fields_of(make_call(model=model, **given))))
    assert fields == {"model": model, "prompt": "a cat"} | sent


async def test_only_kolors_makes_several_images_a_call(
    siliconflow: SiliconFlowProvider, cloud: SiliconFlowEmulator, make_call: MakeCall
) -> None:
    _, reply = await replied(siliconflow, make_call(model=KOLORS, n=3, count=3, seed=5))
    assert [type(image) for image in reply.images] == [ImageLink] * 3
    (entry,) = cloud.ledger.calls
    assert (entry.body["batch_size"], entry.body["seed"]) == (3, 5)
    _, error = await failed(siliconflow, make_call(model=QWEN, n=3, count=3))
    assert (error.max_count, cloud.ledger.total) == (1, 1)


def test_requests_that_are_sent_alike_are_one_task(make_call: MakeCall) -> None:
    def reduced(model: str, **given: object) -> object:
        return sent_request(make_call(model=model, imageUrl=LINKS[0], **given).request)

    assert reduced(EDIT) == reduced(EDIT, width=1024, height=1024) == reduced(EDIT, style="vivid")
    assert reduced(KOLORS) != reduced(KOLORS, width=1024, height=1024)
    assert reduced(QWEN, guidanceScale=4) == reduced(QWEN, extra={"cfg": 4})


def test_each_model_takes_as_many_input_images_as_it_has_fields(siliconflow: SiliconFlowProvider) -> None:
    assert [edits_taken(siliconflow, model).max_images for model in (EDIT, EDIT_2509, KOLORS)] == [1, 3, 1]
    assert edits_taken(siliconflow, EDIT).mask is False


ROWS = {
    # switch: code, retryable, ambiguous
    "400": ("upstream_invalid_request", False, False),
    "400_model": ("model_not_available", False, False),
    "401": ("upstream_auth", False, False),
    "403": ("upstream_auth", False, False),
    "403_balance": ("upstream_billing", False, False),
    "403_disabled": ("model_not_available", False, False),
    "404": ("upstream_invalid_request", False, False),
    "429": ("upstream_rate_limited", True, False),
    "429_day": ("upstream_rate_limited", True, False),
    "451": ("content_policy", False, False),
    "500": ("upstream_error", True, False),
    "502": ("upstream_error", True, True),
    "503": ("upstream_overloaded", True, False),
    "504": ("upstream_error", True, True),
    "job answer=lost": ("upstream_error", True, True),
    "job job_s=600": ("upstream_timeout", True, True),
    "reset": ("upstream_error", True, True),
}


@pytest.mark.parametrize("switch", ROWS)
async def test_an_error_has_its_code_and_whether_a_repeat_helps(
    siliconflow: SiliconFlowProvider, cloud: SiliconFlowEmulator, make_call: MakeCall, switch: str
) -> None:
    failing = asyncio.create_task(failed(siliconflow, make_call(model=KOLORS, prompt=f"a cat {{{{fault:{switch}}}}}")))
    if switch == "job job_s=600":
        await eventually(lambda: cloud.ledger.total)
        await LoopTime().move(30)
    _, error = await failing
    assert (error.code, error.retryable, error.ambiguous) == ROWS[switch]
    assert "sk-secret" not in f"{error} {error.upstream_detail}"


async def test_a_revoked_key_is_found_without_a_paid_call(
    siliconflow: SiliconFlowProvider, cloud: SiliconFlowEmulator
) -> None:
    assert KOLORS in {model["id"] for model in await siliconflow.models()}
    cloud.revoked.add("sk-secret")
    with pytest.raises(UpstreamError) as caught:
        await siliconflow.models()
    assert (caught.value.code, cloud.ledger.total) == ("upstream_auth", 0)


def test_an_image_has_its_published_price(make_call: MakeCall) -> None:
    pricing = Pricing(load_table("siliconflow"))
    assert pricing.estimate(make_call(model=QWEN, n=2).request).total == 84_000
    assert pricing.estimate(make_call(model=KOLORS, n=2).request).total is None
    assert pricing.estimate(make_call(model="a/new").request).total is None
