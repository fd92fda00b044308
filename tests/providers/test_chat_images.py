"""Tests of image models behind a chat: requests, the places in which relays put images, refusals and costs."""

from __future__ import annotations

import base64
import json
import textwrap
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp
import pytest
from msgspec.structs import replace

from imagegen.emulator.gemini import GeminiEmulator
from imagegen.errors import UpstreamError
from imagegen.formats import plain_base64
from imagegen.providers.chat_images import ChatImagesProvider, fields_of, is_chat_address
from imagegen.providers.chat_responses import parse_chat
from imagegen.providers.gemini import shapes_of
from imagegen.providers.large_body import LargeBody
from imagegen.providers.model_rules import Pricing
from imagegen.providers.model_table import load_table
from imagegen.providers.post import RawResponse
from imagegen.tasks.image import GivenImage, ImageBase64, ImageBytes, ImageLink
from tests.emulated_jobs import emulated, failed, replied
from tests.providers.conftest import MakeCall
from tests.support import over_rows

TABLE = load_table("gemini")
SHAPES = shapes_of(TABLE)
MODEL = "google/gemini-2.5-flash-image"
DATA = b"\x89PNG" + bytes(90)
URI = f"data:image/png;base64,{base64.b64encode(DATA).decode()}"
LARGE = bytes(range(256)) * 2_001
LARGE_URI = f"data:image/png;base64,{base64.b64encode(LARGE).decode()}"
LINK, OTHER_LINK = "https://cdn.example/a.png", "https://cdn.example/b.webp?sig=1"


@pytest.fixture
async def relay() -> AsyncIterator[GeminiEmulator]:
    async with emulated(GeminiEmulator, job_s=0) as relay:
        yield relay


@pytest.fixture
def chat(session: aiohttp.ClientSession, relay: GeminiEmulator) -> ChatImagesProvider:
    return ChatImagesProvider(
        session,
        name="openai",
        base_url=f"{relay.url}/v1/chat/completions",
        api_key="sk-secret",
        timeout_s=30,
        shapes_of=SHAPES,
    )


def test_a_request_is_one_message_with_the_shape_beside_it(make_call: MakeCall) -> None:
    call = make_call(model="google/gemini-3-pro-image", seed=3, extra={"temperature": 1})
    assert fields_of(call, SHAPES(call.request.model)) == {
        "model": "google/gemini-3-pro-image",
        "messages": [{"role": "user", "content": "a cat"}],
        "modalities": ["image", "text"],
        "image_config": {"aspect_ratio": "1:1", "image_size": "1K"},
        "seed": 3,
        "temperature": 1,
    }


def test_input_images_are_parts_of_the_message(make_call: MakeCall) -> None:
    call = make_call(model=MODEL, imageUrl=LINK, referenceImages=[OTHER_LINK])
    (message,) = json.loads(json.dumps(fields_of(call, SHAPES(MODEL))))["messages"]
    assert message["content"] == [
        {"type": "text", "text": "a cat"},
        {"type": "image_url", "image_url": {"url": LINK}},
        {"type": "image_url", "image_url": {"url": OTHER_LINK}},
    ]


def test_a_shape_that_a_relay_refused_is_left_out(make_call: MakeCall) -> None:
    assert "image_config" not in fields_of(make_call(model=MODEL, without=["size"]), SHAPES(MODEL))


@pytest.mark.parametrize("name", ["messages", "image_config", "modalities"])
async def test_extra_can_not_change_the_price_or_the_prompt(
    chat: ChatImagesProvider, relay: GeminiEmulator, make_call: MakeCall, name: str
) -> None:
    _, error = await failed(chat, make_call(model=MODEL, extra={name: []}))
    assert (error.code, relay.ledger.total) == ("upstream_invalid_request", 0)


@over_rows(
    ("address", "is_chat"),
    [
        ("https://relay.example/v1/chat/completions", True),
        ("https://relay.example/v1/chat/completions/", True),
        ("https://openrouter.ai/api/v1", True),
        ("https://relay.example/v1", False),
        ("https://api.openai.com/v1", False),
    ],
)
def test_a_chat_is_known_by_its_path_or_host(address: str, is_chat: bool) -> None:
    assert is_chat_address(address) is is_chat


# --- responses ---


def response(message: object, **choice: object) -> RawResponse:
    body = {"choices": [{"index": 0, "message": message, "finish_reason": "stop", **choice}]}
    return RawResponse(200, {}, json.dumps(body).encode())


def test_an_image_under_the_status_of_an_error_is_used() -> None:
    late = replace(response({"content": URI}), status=504)
    assert parse_chat(late).images == (ImageBytes(DATA),)
    with pytest.raises(UpstreamError, match="HTTP 504"):
        parse_chat(replace(response({"content": "no"}), status=504))


@over_rows(
    ("message", "images"),
    [
        ({"content": "", "images": [{"type": "image_url", "image_url": {"url": URI}}]}, [ImageBytes(DATA)]),
        ({"content": None, "images": [{"image_url": LINK}]}, [ImageLink(LINK)]),
        (
            {"images": [URI, {"url": LINK}, {"b64_json": URI.partition(",")[2]}]},
            [ImageBytes(DATA), ImageLink(LINK), ImageBytes(DATA)],
        ),
        ({"content": f"![image]({URI})", "images": [URI]}, [ImageBytes(DATA)]),
        ({"content": f"Here it is:\n\n![a cat]({URI})\n"}, [ImageBytes(DATA)]),
        ({"content": f"![1]({URI}) ![2]({URI})"}, [ImageBytes(DATA), ImageBytes(DATA)]),
        ({"content": URI}, [ImageBytes(DATA)]),
        ({"content": f"![image]({LINK})\n[Download]({LINK})"}, [ImageLink(LINK)]),
        ({"content": f"> ID: 1\n\n[Download]({OTHER_LINK}) or {LINK}"}, [ImageLink(OTHER_LINK), ImageLink(LINK)]),
        ({"content": "https://cdn.example/shrt/1"}, [ImageLink("https://cdn.example/shrt/1")]),
        (
            {"content": [{"type": "text", "text": "Done."}, {"type": "image_url", "image_url": {"url": URI}}]},
            [ImageBytes(DATA)],
        ),
        ({"content": [{"type": "text", "text": f"![x]({LINK})"}]}, [ImageLink(LINK)]),
    ],
)
def test_images_are_found_where_relays_put_them(message: dict[str, Any], images: list[GivenImage]) -> None:
    assert list(parse_chat(response(message)).images) == images


@over_rows(
    "message",
    [
        {"images": [{"image_url": {"url": LARGE_URI}}]},
        {"content": f'Here:\n![image]({LARGE_URI})\n\nEnjoy "it".'},
        {"content": LARGE_URI},
        {"content": [{"image_url": {"url": LARGE_URI}}]},
    ],
)
@over_rows("slash", ["/", "\\/"])
def test_a_large_image_stays_in_the_body(message: dict[str, Any], slash: str) -> None:
    body = response(message).body.replace(b"/", slash.encode())
    (image,) = parse_chat(RawResponse(200, {}, LargeBody(body))).images
    assert isinstance(image, ImageBase64)
    assert base64.b64decode(json.loads(f'"{bytes(image.text).decode()}"')) == LARGE


def wrapped(uri: str, line_break: str) -> str:
    head, _, text = uri.partition(",")
    return f"{head},{line_break.join(textwrap.wrap(text, 76))}"


@over_rows(
    "form",
    [
        lambda uri: uri.replace(";", ";charset=utf-8;"),
        lambda uri: uri.replace(";", "; name=a.png; "),
        lambda uri: uri.replace(";base64", ";base64;charset=utf-8"),
        lambda uri: uri.replace("image/png", "IMAGE/PNG").replace("base64", "BASE64"),
        lambda uri: uri.replace("image/png", "application/octet-stream"),
        lambda uri: uri.replace("image/png", ""),
        lambda uri: uri.replace(",", ", "),
        lambda uri: uri.replace("+", "%2B").replace("=", "%3D"),
        lambda uri: wrapped(uri, "\n"),
        lambda uri: wrapped(uri, "\r\n"),
    ],
)
@over_rows("uri", [URI, LARGE_URI])
@over_rows("text", ["Here:\n![image]({})\n\nEnjoy it.", "{}\n\nHere it is.", '<img src="{}">', "{}"])
def test_a_data_uri_in_the_text_is_read_in_each_of_its_forms(form: Callable[[str], str], uri: str, text: str) -> None:
    (image,) = parse_chat(response({"content": text.format(form(uri))})).images
    if isinstance(image, ImageBase64):
        assert base64.b64decode(plain_base64(json.loads(f'"{bytes(image.text).decode()}"').encode()) + b"==") == LARGE
    else:
        assert image == ImageBytes(DATA)


def test_the_text_in_the_line_after_a_data_uri_is_no_part_of_it() -> None:
    text = base64.b64encode(bytes(300)).decode()
    (image,) = parse_chat(response({"content": f"data:image/png;base64,{text}\nHere it is"})).images
    assert image == ImageBytes(bytes(300))


def error_of(answer: RawResponse) -> UpstreamError:
    with pytest.raises(UpstreamError) as caught:
        parse_chat(answer, secret="sk-secret")
    return caught.value


def refused(status: int, **error: object) -> RawResponse:
    return RawResponse(status, {}, json.dumps({"error": error}).encode())


@over_rows(
    ("answer", "code", "retryable", "charged"),
    [
        (response({"content": ""}, finish_reason="content_filter"), "content_policy", False, False),
        (response({"content": ""}, native_finish_reason="IMAGE_SAFETY"), "content_policy", False, False),
        (response({"content": None, "refusal": "I can't create that image."}), "content_policy", False, True),
        (response({"content": "I'm not able to generate images of real people."}), "content_policy", False, True),
        (response({"content": "A cat, then?"}), "upstream_bad_response", False, True),
        (response({"content": ""}), "upstream_bad_response", False, True),
        (response("?"), "upstream_bad_response", False, True),
        (RawResponse(200, {}, b'{"choices": []}'), "upstream_bad_response", False, True),
        (RawResponse(200, {}, b"{}"), "upstream_bad_response", False, False),
        (
            response({"content": ""}, error={"code": 502, "message": "Provider returned error"}),
            "upstream_error",
            True,
            False,
        ),
        (refused(200, code=429, message="Rate limited"), "upstream_rate_limited", True, False),
        (refused(400, message="google/x is not a valid model ID", code=400), "model_not_available", False, False),
        (refused(401, message="No auth credentials found", code=401), "upstream_auth", False, False),
        (
            refused(402, message="Insufficient credits. Add more at https://openrouter.ai", code=402),
            "upstream_billing",
            False,
            False,
        ),
        (refused(403, message='Your input was flagged for "violence"', code=403), "content_policy", False, False),
        (refused(404, message="No endpoints found for google/x.", code=404), "model_not_available", False, False),
        (refused(408, message="Request timed out", code=408), "upstream_error", True, False),
        (refused(429, message="Rate limit exceeded", code=429), "upstream_rate_limited", True, False),
        (refused(502, message="Provider returned error", code=502), "upstream_error", True, False),
        (refused(503, message="No instances available", code=503), "upstream_overloaded", True, False),
        (refused(500, message="error", type="new_api_error", code="bad_response"), "upstream_error", True, False),
        (refused(403, message="用户额度不足", code="insufficient_user_quota"), "upstream_billing", False, False),
        (
            refused(503, message="分组 default 下模型 x 无可用渠道", code="model_not_found"),
            "upstream_overloaded",
            True,
            False,
        ),
        (RawResponse(504, {}, b"<html>Gateway Time-out</html>"), "upstream_error", True, False),
    ],
)
def test_a_response_without_an_image_has_its_own_error(
    answer: RawResponse, code: str, retryable: bool, charged: bool
) -> None:
    error = error_of(answer)
    assert (error.code, error.retryable, error.charged) == (code, retryable, charged)


@pytest.mark.parametrize("form", ["images", "markdown", "link", "parts"])
async def test_an_image_costs_what_the_relay_says(
    chat: ChatImagesProvider, relay: GeminiEmulator, make_call: MakeCall, form: str
) -> None:
    _, reply = await replied(chat, make_call(model=MODEL, prompt=f"a cat {{{{fault:job form={form} cost=0.05}}}}"))
    assert reply.details is not None
    assert (len(reply.images), reply.details.cost_micro_usd) == (1, 50_000)
    assert (reply.details.usage or {})["output_tokens"] == 1290


async def test_a_text_in_place_of_an_image_costs_what_the_relay_says(
    chat: ChatImagesProvider, relay: GeminiEmulator, make_call: MakeCall
) -> None:
    _, error = await failed(chat, make_call(model=MODEL, prompt='a cat {{fault:job text="Which one?" cost=0.002}}'))
    assert (error.code, error.charged) == ("upstream_bad_response", True)
    assert Pricing(TABLE).usage_price(MODEL, error.usage or {}) == 2_000


async def test_image_models_are_listed(chat: ChatImagesProvider) -> None:
    assert MODEL in {model["id"] for model in await chat.models()}
