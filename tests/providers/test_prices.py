"""Tests of prices: each kind of rule with the published figures, and the price of a response's usage."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

from imagegen.providers.model_table import load_table
from imagegen.providers.prices import PerMegapixel, PerMillionTokens, Price, estimate, settle
from imagegen.tasks.request import GenerationRequest
from tests.support import over_rows


def request(**fields: Any) -> GenerationRequest:
    defaults: dict[str, Any] = {"prompt": "a cat", "model": "m", "width": 1024, "height": 1024, "n": 1}
    return GenerationRequest(**defaults | fields)


def price_of(provider: str, model: str) -> Price | None:
    row = load_table(provider).find(model)
    assert row is not None
    return row.price


@over_rows(
    ("provider", "model", "fields", "micro_usd"),
    [
        # Together: megapixels x price x max(1, steps / default steps).
        ("together", "black-forest-labs/FLUX.1-schnell", {}, 2832),
        ("together", "black-forest-labs/FLUX.1-schnell", {"width": 512, "height": 512}, 708),
        ("together", "black-forest-labs/FLUX.1-schnell", {"steps": 4}, 2832),
        ("together", "black-forest-labs/FLUX.1-schnell", {"steps": 1}, 2832),
        ("together", "black-forest-labs/FLUX.1-schnell", {"steps": 12}, 8494),
        ("together", "black-forest-labs/FLUX.1-schnell", {"n": 4}, 11325),
        ("together", "black-forest-labs/FLUX.2-pro", {"width": 1000, "height": 1000}, 30_000),
        ("together", "black-forest-labs/FLUX.1-kontext-max", {"width": 1000, "height": 1000}, 80_000),
        ("together", "Qwen/Qwen-Image-2.0-Pro", {"n": 2}, 160_000),
        ("together", "google/flash-image-2.5", {}, 39_000),
        ("together", "google/gemini-3-pro-image", {}, 134_000),
        ("together", "google/gemini-3-pro-image", {"width": 2688, "height": 1536}, 134_000),
        ("together", "google/gemini-3-pro-image", {"width": 4096, "height": 4096}, 240_000),
        ("together", "openai/gpt-image-1.5", {}, 34_000),
        ("together", "openai/gpt-image-2", {}, None),
        # OpenAI: by quality and size; without a quality as `high`, and a size between two as the dearer one.
        ("openai", "gpt-image-2", {"quality": "low"}, 6_000),
        ("openai", "gpt-image-2", {"quality": "medium"}, 53_000),
        ("openai", "gpt-image-2", {"quality": "high"}, 211_000),
        ("openai", "gpt-image-2", {"quality": "auto"}, 211_000),
        ("openai", "gpt-image-2", {}, 211_000),
        ("openai", "gpt-image-2", {"quality": "medium", "width": 3840, "height": 2160}, 101_000),
        ("openai", "gpt-image-2", {"quality": "low", "width": 2000, "height": 1600}, 7_000),
        ("openai", "gpt-image-2", {"quality": "high", "width": 1040, "height": 1040}, 211_000),
        ("openai", "gpt-image-2", {"quality": "high", "width": 1024, "height": 1536}, 165_000),
        ("openai", "gpt-image-2", {"quality": "high", "width": 1536, "height": 1024}, 165_000),
        ("openai", "gpt-image-2.5-flare", {"quality": "xhigh"}, 93_660),
        ("openai", "gpt-image-2.5-sunburst", {"quality": "max"}, 210_720),
        ("openai", "gpt-image-1.5", {"quality": "medium"}, 34_000),
        ("openai", "gpt-image-1-mini", {"quality": "low"}, 5_000),
        ("openai", "gpt-image-1", {"quality": "high"}, 167_000),
        ("openai", "gpt-image-2.6-flare", {}, None),
        # Google: an input image has its own price.
        ("gemini", "gemini-2.5-flash-image", {}, 39_000),
        ("gemini", "gemini-3-pro-image", {"image_url": "https://a.example/1", "n": 2}, 270_200),
        ("gemini", "gemini-3.1-flash-image", {}, 67_200),
        ("gemini", "gemini-3.1-flash-image", {"resolution": "512", "width": 512, "height": 512}, 45_000),
        ("gemini", "gemini-3-pro-image", {"resolution": "4K", "width": 4096, "height": 4096}, 240_000),
        # Black Forest Labs: the first megapixel is known, further ones are not.
        ("bfl", "flux-2-pro", {"width": 1000, "height": 1000}, 30_000),
        ("bfl", "flux-2-pro", {"width": 1024, "height": 1024}, None),
        ("bfl", "flux-3-klein", {"resolution": "4K", "width": 4096, "height": 4096}, 36_000),
        ("bfl", "flux-3-klein", {"resolution": "2K"}, 14_000),
        # fal: each begun megapixel.
        ("fal", "fal-ai/flux/dev", {"width": 1024, "height": 1024}, 50_000),
        ("fal", "fal-ai/nano-banana-2", {"width": 512, "height": 512}, 60_000),
        ("fal", "fal-ai/nano-banana-2", {"width": 2048, "height": 2048}, 120_000),
        ("fal", "fal-ai/nano-banana-pro", {"width": 8192, "height": 8192}, None),
        ("dashscope", "qwen-image-2.0", {"n": 3}, 105_000),
        ("dashscope", "z-image-turbo", {}, 15_000),
        ("dashscope", "z-image-turbo", {"prompt_upsampling": False}, 15_000),
        ("dashscope", "z-image-turbo", {"prompt_upsampling": True}, 30_000),
    ],
)
def test_a_request_is_estimated_in_micro_dollars(
    provider: str, model: str, fields: dict[str, Any], micro_usd: int | None
) -> None:
    assert estimate(price_of(provider, model), request(**fields)) == micro_usd


def test_further_megapixels_may_have_another_price() -> None:
    price = Price(per_megapixel=PerMegapixel(Decimal("0.03"), Decimal("0.015"), round_up=True))
    assert estimate(price, request(width=1000, height=1000)) == 30_000
    assert estimate(price, request(width=1000, height=1008)) == 45_000
    assert estimate(price, request(width=2000, height=2000)) == 75_000


def test_a_batch_of_the_provider_costs_its_part() -> None:
    assert estimate(price_of("openai", "gpt-image-2"), request(quality="high"), batch=True) == 105_500
    assert estimate(price_of("dashscope", "qwen-image-2.0"), request(), batch=True) is None


def test_an_unknown_price_is_none_and_a_free_model_costs_zero() -> None:
    assert estimate(None, request()) is None
    assert estimate(Price(), request()) is None
    assert estimate(Price(per_image=0), request(n=4)) == 0


def test_usage_in_tokens_is_settled() -> None:
    price = price_of("openai", "gpt-image-2")
    usage = {
        "input_tokens": 110,
        "output_tokens": 1000,
        "input_tokens_details": {"text_tokens": 10, "image_tokens": 100},
    }
    assert settle(price, usage) == 10 * 5 + 100 * 8 + 1000 * 30
    assert settle(price, {"input_tokens": 10, "output_tokens": 1000}) == 10 * 8 + 1000 * 30


def test_usage_in_images_is_settled() -> None:
    assert settle(price_of("volcengine", "doubao-seedream-4-0-250828"), {"generated_images": 3}) == 90_000
    assert settle(price_of("dashscope", "qwen-image-2.0"), {"image_count": 2}) == 70_000
    assert settle(price_of("dashscope", "z-image-turbo"), {"output_image_count": 1}) is None, "it may be billed double"


def test_the_providers_own_cost_counts_first() -> None:
    assert settle(None, {"cost": 0.0123451}) == 12_346
    assert settle(price_of("openai", "gpt-image-2"), {"cost": 0, "output_tokens": 7}) == 0


@over_rows(
    "usage",
    [
        {},
        {"output_tokens": "many"},
        {"output_tokens": True},
        {"output_tokens": -1},
        {"cost": "free"},
        {"cost": float("nan")},
        {"input_tokens": None, "output_tokens": 5},
    ],
)
def test_unusable_usage_settles_nothing(usage: dict[str, Any]) -> None:
    assert settle(price_of("openai", "gpt-image-2"), usage) is None
    assert settle(None, usage) is None


def test_tokens_without_a_price_settle_nothing() -> None:
    price = Price(per_million_tokens=PerMillionTokens(image_out=Decimal(30)))
    assert settle(price, {"input_tokens": 5, "output_tokens": 100}) is None
    assert settle(price, {"input_tokens": 0, "output_tokens": 100}) == 3_000
