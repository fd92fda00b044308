"""Tests of Gemini: the words of its requests, responses with and without images, errors, and what a call costs."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import aiohttp
import pytest

from imagegen.emulator.gemini import GeminiEmulator
from imagegen.errors import InvalidRequest, UpstreamError
from imagegen.providers import large_body
from imagegen.providers.chat_images import ChatImagesProvider
from imagegen.providers.gemini import GeminiProvider, create_gemini, shapes_of
from imagegen.providers.gemini_requests import fields_of, path_of, sent_request, warnings_of
from imagegen.providers.gemini_responses import parse_generation
from imagegen.providers.input_bodies import json_body
from imagegen.providers.model_rules import ModelRules, Pricing
from imagegen.providers.model_table import load_table
from imagegen.providers.post import RawResponse
from imagegen.providers.protocol import Call, InputImage, Reply
from imagegen.tasks.image import ImageBase64, ImageBytes
from imagegen.tasks.retry import was_never_sent
from tests.emulated_jobs import emulated, failed, made, replied
from tests.providers.conftest import MakeCall, edits_taken
from tests.support import over_rows

TABLE = load_table("gemini")
SHAPES = shapes_of(TABLE)
FLASH, PRO, FLASH_31 = "gemini-2.5-flash-image", "gemini-3-pro-image", "gemini-3.1-flash-image"
PNG = base64.b64encode(b"\x89PNG" + bytes(90)).decode()


@pytest.fixture
async def google() -> AsyncIterator[GeminiEmulator]:
    async with emulated(GeminiEmulator, job_s=0, key="AIza-secret") as google:
        yield google


@pytest.fixture
def gemini(session: aiohttp.ClientSession, google: GeminiEmulator) -> GeminiProvider:
    return GeminiProvider(session, api_key="AIza-secret", base_url=google.url, timeout_s=30, shapes_of=SHAPES)


def sent(call: Call) -> dict[str, Any]:
    fields = fields_of(call, SHAPES(call.request.model))
    return dict(json.loads(json.dumps(fields, default=str)))


# --- requests ---


@over_rows(
    ("model", "given", "image_config"),
    [
        (FLASH, {}, {"aspectRatio": "1:1"}),
        (FLASH, {"width": 1344, "height": 768}, {"aspectRatio": "16:9"}),
        (FLASH, {"width": 2048, "height": 2048}, {"aspectRatio": "1:1"}),
        (PRO, {}, {"aspectRatio": "1:1", "imageSize": "1K"}),
        (PRO, {"aspectRatio": "21:9", "resolution": "4K"}, {"aspectRatio": "21:9", "imageSize": "4K"}),
        (PRO, {"width": 2048, "height": 2048}, {"aspectRatio": "1:1", "imageSize": "2K"}),
        (FLASH_31, {}, {"aspectRatio": "1:1", "imageSize": "512"}),
        (FLASH_31, {"aspectRatio": "1:8"}, {"aspectRatio": "1:8", "imageSize": "1K"}),
        (PRO, {"aspectRatio": "1:8"}, {"aspectRatio": "9:16", "imageSize": "1K"}),
        ("a-new-model", {}, {"aspectRatio": "1:1", "imageSize": "512"}),
        ("a-new-model", {"width": 1024, "height": 1024}, {"aspectRatio": "1:1"}),
        ("google/gemini-3-pro-image", {"resolution": "2K"}, {"aspectRatio": "1:1", "imageSize": "2K"}),
    ],
)
def test_a_size_is_sent_as_ratio_and_resolution(
    make_call: MakeCall, model: str, given: dict[str, Any], image_config: dict[str, Any]
) -> None:
    assert sent(make_call(model=model, **given))["generationConfig"]["imageConfig"] == image_config


def test_a_request_has_the_prompt_the_seed_and_only_images_as_its_result(make_call: MakeCall) -> None:
    assert sent(make_call(model=FLASH, seed=7)) == {
        "contents": [{"role": "user", "parts": [{"text": "a cat"}]}],
        "generationConfig": {"responseModalities": ["IMAGE"], "imageConfig": {"aspectRatio": "1:1"}, "seed": 7},
    }


def test_fields_of_extra_go_where_google_has_them(make_call: MakeCall) -> None:
    extra = {
        "temperature": 0.5,
        "safety_settings": [{"category": "A", "threshold": "B"}],
        "generation_config": {"topP": 0.9, "image_config": {"person_generation": "ALLOW_ALL"}},
        "responseModalities": ["TEXT", "IMAGE"],
    }
    fields = sent(make_call(model=FLASH, extra=extra, disableSafetyChecker=True))
    assert fields["safetySettings"] == extra["safety_settings"]
    assert fields["generationConfig"] == {
        "temperature": 0.5,
        "topP": 0.9,
        "responseModalities": ["TEXT", "IMAGE"],
        "imageConfig": {"personGeneration": "ALLOW_ALL", "aspectRatio": "1:1"},
    }


@pytest.mark.parametrize(
    "extra",
    [
        {"candidateCount": 4},
        {"generationConfig": {"candidate_count": 4}},
        {"generation_config": {"imageConfig": {"imageSize": "4K"}}},
        {"imageConfig": {"image_size": "4K"}},
        {"contents": []},
    ],
)
async def test_extra_can_not_change_the_price_or_the_prompt(
    gemini: GeminiProvider, google: GeminiEmulator, make_call: MakeCall, extra: dict[str, Any]
) -> None:
    _, error = await failed(gemini, make_call(model=PRO, extra=extra))
    assert (error.code, error.retryable, google.ledger.total) == ("upstream_invalid_request", False, 0)


def test_the_safety_checker_is_switched_off_by_safety_settings(make_call: MakeCall) -> None:
    settings = sent(make_call(model=FLASH, disableSafetyChecker=True))["safetySettings"]
    assert {entry["threshold"] for entry in settings} == {"BLOCK_NONE"}
    assert "safetySettings" not in sent(make_call(model=FLASH, disableSafetyChecker=False))


def test_what_a_model_refused_by_name_is_left_out(make_call: MakeCall) -> None:
    assert "seed" not in sent(make_call(model=FLASH, seed=1, without=["seed"]))["generationConfig"]
    assert "imageConfig" not in sent(make_call(model=PRO, without=["size"]))["generationConfig"]
    shape = sent(make_call(model=PRO, without=["image_size"]))["generationConfig"]["imageConfig"]
    assert shape == {"aspectRatio": "1:1"}


def test_what_is_not_sent_as_given_has_a_warning(make_call: MakeCall) -> None:
    call = make_call(model=FLASH, negativePrompt="dogs", aspectRatio="1:1")
    assert warnings_of(call, SHAPES(FLASH)) == ("negative_prompt is not known to this provider and was left out",)
    (warning,) = warnings_of(make_call(model=PRO, width=1000, height=1000), SHAPES(PRO))
    assert "1:1 at 1K was requested" in warning


def test_requests_that_are_sent_alike_are_one_task(make_call: MakeCall) -> None:
    def reduced(**given: object) -> object:
        return sent_request(make_call(model=FLASH, **given).request, SHAPES(FLASH))

    assert reduced() == reduced(width=1024, height=1024) == reduced(quality="high", disableSafetyChecker=False)
    assert reduced() != reduced(aspectRatio="16:9")


@over_rows("model", ["../a", "a/b", "a:b", "", "a?b", "tuned models"])
def test_a_name_that_is_no_part_of_a_path_is_not_sent(model: str) -> None:
    with pytest.raises(UpstreamError) as caught:
        path_of(model)
    assert caught.value.code == "model_not_available"


def test_a_ratio_and_a_resolution_that_a_model_has_not_are_refused_at_submit(make_call: MakeCall) -> None:
    rules, request = ModelRules(TABLE), make_call(model=FLASH, aspectRatio="1:8", resolution="2K").request
    with pytest.raises(InvalidRequest) as caught:
        rules(request, {"aspect_ratio", "resolution"})
    faults = {fault.field: fault.message for fault in caught.value.details}
    assert "nearest is 9:16" in faults["aspect_ratio"]
    assert "nearest is 1K" in faults["resolution"]


async def test_input_images_are_sent_whole(gemini: GeminiProvider, google: GeminiEmulator, make_call: MakeCall) -> None:
    data = bytes(range(256)) * 3_000

    async def pieces() -> AsyncGenerator[bytes, None]:
        yield data[:100_001]
        yield data[100_001:]

    call = make_call(model=FLASH, imageUrl="https://a.example/1.png")
    image = InputImage("image/png", len(data), pieces)
    call = type(call)(call.request, 1, inputs={"https://a.example/1.png": image})
    await replied(gemini, call)
    (entry,) = google.ledger.calls
    assert [(file.size_bytes, file.content_type) for file in entry.inputs] == [(len(data), "image/png")]
    assert len(json_body(fields_of(call, SHAPES(FLASH)))) > len(data)


async def test_an_input_image_that_is_only_a_link_is_not_sent(
    gemini: GeminiProvider, google: GeminiEmulator, make_call: MakeCall
) -> None:
    await failed(gemini, make_call(model=FLASH, imageUrl="https://a.example/1.png"))
    assert google.ledger.total == 0
    assert edits_taken(gemini, FLASH).links is False


# --- responses ---


def response(
    candidate: dict[str, Any] | None = None,
    *,
    status: int = 200,
    headers: dict[str, Any] | None = None,
    **fields: object,
) -> RawResponse:
    body = ({"candidates": [candidate]} if candidate is not None else {}) | fields
    return RawResponse(status, headers or {}, json.dumps(body).encode())


def content(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"content": {"parts": list(parts), "role": "model"}, "finishReason": "STOP"}


def usage(text: int = 10, image: int = 0, thoughts: int = 0) -> dict[str, Any]:
    details = [{"modality": "IMAGE", "tokenCount": image}] if image else []
    return {
        "promptTokenCount": 5,
        "candidatesTokenCount": text + image,
        "thoughtsTokenCount": thoughts,
        "candidatesTokensDetails": details,
    }


def error_of(answer: RawResponse) -> UpstreamError:
    with pytest.raises(UpstreamError) as caught:
        parse_generation(answer, secret="AIza-secret")
    return caught.value


def test_drafts_of_the_models_thoughts_are_no_images() -> None:
    draft = {"inlineData": {"mimeType": "image/png", "data": PNG}, "thought": True}
    text, image = {"text": "Here it is."}, {"inlineData": {"mimeType": "image/png", "data": PNG}}
    reply = parse_generation(response(content(draft, text, image)))
    assert reply.images == (ImageBytes(base64.b64decode(PNG)),)
    assert error_of(response(content(draft))).code == "upstream_bad_response"


def test_an_image_under_the_status_of_an_error_is_used() -> None:
    image = {"inlineData": {"mimeType": "image/png", "data": PNG}}
    assert parse_generation(response(content(image), status=503)).images == (ImageBytes(base64.b64decode(PNG)),)
    assert error_of(response(content({"text": "no"}), status=503)).code == "upstream_overloaded"


def test_a_large_image_stays_in_the_body_also_beside_a_large_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    large = base64.b64encode(bytes(range(256)) * 2_001).decode()
    part = {"inlineData": {"mimeType": "image/png", "data": large}, "thoughtSignature": large[::-1]}
    body = json.dumps({"candidates": [content(part)]}, indent=2)
    for text in (body, body.replace("=", "\\u003d")):
        answer = RawResponse(200, {}, large_body.LargeBody(text.encode()))
        (image,) = parse_generation(answer).images
        assert isinstance(image, ImageBase64)
        assert json.loads(f'"{bytes(image.text).decode()}"') == large


@over_rows(
    ("answer", "code", "detail", "charged"),
    [
        (response(promptFeedback={"blockReason": "SAFETY"}), "content_policy", "SAFETY", False),
        (response(promptFeedback={"blockReason": "OTHER"}), "content_policy", "OTHER", False),
        (
            response(promptFeedback={"blockReason": "PROHIBITED_CONTENT", "blockReasonMessage": "It was blocked."}),
            "content_policy",
            "It was blocked.",
            False,
        ),
        *(
            (response({"finishReason": end}), "content_policy", end, False)
            for end in (
                *("SAFETY", "PROHIBITED_CONTENT", "BLOCKLIST", "SPII", "RECITATION"),
                *("IMAGE_SAFETY", "IMAGE_PROHIBITED_CONTENT", "IMAGE_RECITATION"),
            )
        ),
        (
            response(
                {"finishReason": "IMAGE_SAFETY", "finishMessage": "Unable to show it."}, usageMetadata=usage(0, 1290)
            ),
            "content_policy",
            "Unable to show it.",
            True,
        ),
        (
            response(content({"text": "I can't generate images of that kind."}), usageMetadata=usage()),
            "content_policy",
            "I can't generate",
            True,
        ),
        (
            response(content({"text": "很抱歉，我无法为您生成这张图片。"}), usageMetadata=usage()),
            "content_policy",
            "无法为您生成",
            True,
        ),
        (
            response(content({"text": "Which colour should the cat have?"}), usageMetadata=usage()),
            "upstream_bad_response",
            "text instead of an image: Which colour",
            True,
        ),
        (response({"finishReason": "NO_IMAGE"}), "upstream_bad_response", "NO_IMAGE", True),
        (response({"finishReason": "IMAGE_OTHER"}), "upstream_bad_response", "IMAGE_OTHER", True),
        (response({"finishReason": "MAX_TOKENS"}), "upstream_bad_response", "MAX_TOKENS", True),
        (response({"finishReason": "OTHER"}), "upstream_bad_response", "OTHER", True),
        (response(), "upstream_bad_response", "without an image", True),
        (response(candidates=[]), "upstream_bad_response", "without an image", True),
        (response(candidates="?"), "upstream_bad_response", "without an image", True),
        (response(content({"inlineData": {"data": "!"}})), "upstream_bad_response", "without an image", True),
        (RawResponse(200, {}, b""), "upstream_bad_response", "empty body", False),
        (RawResponse(200, {}, b"<html>"), "upstream_bad_response", "not JSON", False),
        (
            response(error={"code": 503, "message": "overloaded", "status": "UNAVAILABLE"}),
            "upstream_overloaded",
            "",
            False,
        ),
    ],
)
def test_a_response_without_an_image_has_its_own_error(
    answer: RawResponse, code: str, detail: str, charged: bool
) -> None:
    error = error_of(answer)
    assert (error.code, error.charged) == (code, charged)
    assert error.retryable is (code == "upstream_overloaded")
    assert detail in error.detail


ROWS = {
    # switch: code, retryable, ambiguous, seconds to wait
    "400": ("upstream_invalid_request", False, False, None),
    "400_key": ("upstream_auth", False, False, None),
    "400_expired": ("upstream_auth", False, False, None),
    "400_region": ("upstream_billing", False, False, None),
    "400_location": ("upstream_auth", False, False, None),
    "403": ("upstream_auth", False, False, None),
    "403_billing": ("upstream_billing", False, False, None),
    "404": ("model_not_available", False, False, None),
    "429": ("upstream_rate_limited", True, False, 12.0),
    "429_text": ("upstream_rate_limited", True, False, 7.5),
    "429_free": ("upstream_billing", False, False, None),
    "429_credits": ("upstream_billing", False, False, None),
    "499": ("upstream_error", True, True, None),
    "500": ("upstream_error", True, False, None),
    "502": ("upstream_error", True, True, None),
    "503": ("upstream_overloaded", True, False, None),
    "504": ("upstream_error", True, True, None),
}


@pytest.mark.parametrize("switch", ROWS)
async def test_an_error_has_its_code_and_whether_a_repeat_helps(
    gemini: GeminiProvider, google: GeminiEmulator, make_call: MakeCall, switch: str
) -> None:
    _, error = await failed(gemini, make_call(model=FLASH, prompt=f"a cat {{{{fault:{switch}}}}}"))
    assert (error.code, error.retryable, error.ambiguous, error.retry_after_s) == ROWS[switch]
    assert error.charged is False
    assert error.status == int(switch[:3])


def test_an_unknown_name_in_a_shape_is_a_field_that_can_be_left_out() -> None:
    answer = GeminiEmulator.refusals["400_field"]
    error = error_of(RawResponse(answer.status, {}, answer.body))
    assert error.refused == ("imageSize",)


async def test_a_lost_answer_is_an_ambiguous_call_that_was_paid(
    gemini: GeminiProvider, google: GeminiEmulator, make_call: MakeCall
) -> None:
    _, error = await failed(gemini, make_call(model=FLASH, prompt="a cat {{fault:job answer=lost}}"))
    assert (error.ambiguous, was_never_sent(error), google.ledger.sums()["charged"]) == (True, False, 1)


async def test_a_revoked_key_is_refused_and_appears_nowhere(
    gemini: GeminiProvider, google: GeminiEmulator, make_call: MakeCall
) -> None:
    google.revoked.add("AIza-secret")
    _, error = await failed(gemini, make_call(model=FLASH))
    assert error.code == "upstream_auth"
    assert "AIza-secret" not in f"{error} {error.upstream_detail}"


@pytest.mark.parametrize(
    ("switch", "settled"),
    [
        ("job", 5 * 0.3 + 1290 * 30),
        ("job thought=1", 5 * 0.3 + 1290 * 30 + 40 * 2.5),
        ('job text="Which one?"', 5 * 0.3 + 20 * 2.5),
        ("job end=moderated charged=1", 5 * 0.3 + 1290 * 30),
    ],
)
async def test_a_call_costs_what_its_tokens_do(
    gemini: GeminiProvider, google: GeminiEmulator, make_call: MakeCall, switch: str, settled: float
) -> None:
    call = make_call(model=FLASH, prompt="a cat")
    google.script([switch])
    _, result = await made(gemini, call)
    pricing = Pricing(TABLE)
    if isinstance(result, Reply):
        price = pricing.reported_price(FLASH, result.details)
    else:
        assert result.charged
        price = pricing.usage_price(FLASH, result.usage or {})
    assert price == pytest.approx(settled, abs=1)
    assert google.ledger.sums()["cost_usd"] * 1e6 == pytest.approx(settled, abs=1)


async def test_its_image_models_are_listed_and_a_bad_key_is_found_without_a_paid_call(
    gemini: GeminiProvider, google: GeminiEmulator
) -> None:
    assert {model["id"] for model in await gemini.models()} == {FLASH, PRO, FLASH_31}
    google.revoked.add("AIza-secret")
    with pytest.raises(UpstreamError) as caught:
        await gemini.models()
    assert (caught.value.code, google.ledger.total) == ("upstream_auth", 0)


@pytest.mark.parametrize(
    ("address", "base"),
    [
        ("https://generativelanguage.googleapis.com", "https://generativelanguage.googleapis.com/v1beta/"),
        ("https://generativelanguage.googleapis.com/v1", "https://generativelanguage.googleapis.com/v1/"),
        ("https://relay.example/gemini/v1beta/", "https://relay.example/gemini/v1beta/"),
        ("https://relay.example/gemini", "https://relay.example/gemini/v1beta/"),
    ],
)
def test_an_address_may_have_a_version(session: aiohttp.ClientSession, address: str, base: str) -> None:
    provider = create_gemini(session, api_key="k", base_url=address, timeout_s=30, shapes_of=SHAPES)
    assert isinstance(provider, GeminiProvider)
    assert str(provider.base_url) == base


@pytest.mark.parametrize(
    ("address", "base"),
    [
        ("https://relay.example/v1", "https://relay.example/v1/"),
        ("https://relay.example/v1/chat/completions", "https://relay.example/v1/"),
        ("https://openrouter.ai", "https://openrouter.ai/api/v1/"),
        (
            "https://generativelanguage.googleapis.com/v1beta/openai",
            "https://generativelanguage.googleapis.com/v1beta/openai/",
        ),
    ],
)
def test_an_address_of_openais_kind_is_called_by_a_chat(
    session: aiohttp.ClientSession, address: str, base: str
) -> None:
    provider = create_gemini(session, api_key="k", base_url=address, timeout_s=30, shapes_of=SHAPES)
    assert isinstance(provider, ChatImagesProvider)
    assert (provider.name, str(provider.base_url)) == ("gemini", base)
