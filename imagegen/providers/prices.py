"""Prices by the rules of a model's row: an estimate for a request, and the price of a response's usage."""

from __future__ import annotations

import math
from collections.abc import Mapping
from decimal import Decimal
from typing import Any, Literal

from msgspec import Struct

from imagegen.providers.size_limits import parse_size
from imagegen.tasks.cost import MICRO_USD
from imagegen.tasks.request import GenerationRequest

_MEGAPIXEL = 1_000_000
_TOKENS = 1_000_000
RESOLUTIONS = {"0.5K": 512, "512": 512, "1K": 1024, "2K": 2048, "4K": 4096}
"""Side of the square that has a resolution's area."""

_SLACK = 1.1
"""Sizes of one resolution differ by some percent from the square's area."""

_DEAREST_USUAL_QUALITY = "high"
"""A request without a quality, or with `auto`, is priced so: an estimate must not be too low."""

Dollars = Decimal | int


class PerMegapixel(Struct, frozen=True, forbid_unknown_fields=True):
    """Dollars of the first megapixel, and of each further one (None: unknown). round_up: a part counts as a whole."""

    first: Dollars
    more: Dollars | None = None
    round_up: bool = False


class PerMillionTokens(Struct, frozen=True, forbid_unknown_fields=True):
    """Dollars of a million tokens; None if unknown.

    text_out: of a model that also writes or thinks; without it all output counts as images.
    """

    text_in: Dollars | None = None
    image_in: Dollars | None = None
    image_out: Dollars | None = None
    text_out: Dollars | None = None


class Price(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Price rules in dollars. Of the rules of an image the first that has a price counts, in the order of the fields.

    by_quality_size: by quality, then by size as `1024x768`. by_resolution: `0.5K`, `1K`, `2K`, `4K`.
    default_steps: a megapixel costs more in proportion to the steps above.
    per_input_image: for each input image of each image. batch_factor: in the provider's own batches.
    upsampling_factor: of an image with a prompt that the provider extends (`prompt_upsampling`).
    """

    by_quality_size: dict[str, dict[str, Dollars]] | None = None
    by_resolution: dict[str, Dollars] | None = None
    per_megapixel: PerMegapixel | None = None
    per_image: Dollars | None = None
    default_steps: int | None = None
    per_input_image: Dollars | None = None
    per_million_tokens: PerMillionTokens | None = None
    batch_factor: Dollars | None = None
    upsampling_factor: Dollars | None = None
    charges_on_refusal: Literal["yes", "no", "unknown"] | None = None


def estimate(price: Price | None, request: GenerationRequest, *, batch: bool = False) -> int | None:
    """Return the micro-dollars of all images of a request, rounded up; None if the price is unknown."""
    if price is None:
        return None
    each = _image_price(price, request)
    factor = price.batch_factor if batch else 1
    if each is None or factor is None:
        return None
    each += (price.per_input_image or 0) * len(request.input_images)
    if request.prompt_upsampling and price.upsampling_factor is not None:
        each *= price.upsampling_factor
    return _micro_usd(each * request.n * factor)


def settle(price: Price | None, usage: Mapping[str, Any]) -> int | None:
    """Return the micro-dollars of a response by its `usage`; None if that does not decide the price.

    A `cost` is in dollars. If the kinds of tokens are not listed, input counts as the dearer kind, output as images:
    https://github.com/BerriAI/litellm/issues/31142
    """
    cost = usage.get("cost")
    if _is_count(cost):
        return _micro_usd(Decimal(str(cost)))
    if price is None or price.upsampling_factor is not None:  # usage has no word of the extended prompt
        return None
    if price.per_million_tokens is not None and _is_count(usage.get("output_tokens")):
        return _token_price(price.per_million_tokens, usage)
    for name in ("generated_images", "image_count", "output_image_count"):
        if price.per_image is not None and _is_count(count := usage.get(name)):
            return _micro_usd(Decimal(str(count)) * price.per_image)
    return None


def _image_price(price: Price, request: GenerationRequest) -> Decimal | None:
    """Return the dollars of one image."""
    for price_of_rule in (
        _by_quality_size(price.by_quality_size, request),
        _by_resolution(price.by_resolution, request),
        _by_area(price, request),
        price.per_image,
    ):
        if price_of_rule is not None:
            return Decimal(price_of_rule)
    return None


def _by_quality_size(prices: Mapping[str, Mapping[str, Dollars]] | None, request: GenerationRequest) -> Dollars | None:
    """Return the price of the size, also turned, in the request's quality.

    Another size costs what the smallest larger one does, but no less than any smaller one: a square costs more than a
    longer image of a larger area.
    """
    quality = request.quality if request.quality not in (None, "auto") else _DEAREST_USUAL_QUALITY
    sizes = (prices or {}).get(str(quality), {})
    width, height = request.width, request.height
    for size in (f"{width}x{height}", f"{height}x{width}"):
        if size in sizes:
            return sizes[size]
    by_area = sorted((math.prod(parse_size(size)), cost) for size, cost in sizes.items())
    smaller = [cost for area, cost in by_area if area < width * height]
    larger = [cost for area, cost in by_area if area >= width * height]
    return max([larger[0], *smaller]) if larger else None


def _by_resolution(prices: Mapping[str, Dollars] | None, request: GenerationRequest) -> Dollars | None:
    """Return the price of the request's resolution, or of the next higher resolution with a price."""
    area = request.width * request.height
    fitting = [
        (RESOLUTIONS[name], cost)
        for name, cost in (prices or {}).items()
        if RESOLUTIONS[name] ** 2 * _SLACK >= area and RESOLUTIONS[name] >= RESOLUTIONS.get(request.resolution or "", 0)
    ]
    return min(fitting)[1] if fitting else None


def _by_area(price: Price, request: GenerationRequest) -> Decimal | None:
    """Return megapixels x price x max(1, steps / default steps)."""
    rule = price.per_megapixel
    if rule is None:
        return None
    megapixels = Decimal(request.width * request.height) / _MEGAPIXEL
    if rule.round_up:
        megapixels = Decimal(math.ceil(megapixels))
    further = megapixels - 1
    if further > 0 and rule.more is None:
        return None
    area = min(megapixels, Decimal(1)) * rule.first + max(further, Decimal(0)) * (rule.more or 0)
    if price.default_steps and request.steps:
        return area * max(Decimal(request.steps) / price.default_steps, Decimal(1))
    return area


def _token_price(prices: PerMillionTokens, usage: Mapping[str, Any]) -> int | None:
    details = usage.get("input_tokens_details")
    details = details if isinstance(details, Mapping) else {}
    text, image = details.get("text_tokens"), details.get("image_tokens")
    if not (_is_count(text) and _is_count(image)):
        total = usage.get("input_tokens", 0)
        dearer = max((cost for cost in (prices.text_in, prices.image_in) if cost is not None), default=None)
        counted: list[tuple[Any, Dollars | None]] = [(total, dearer)]
    else:
        counted = [(text, prices.text_in), (image, prices.image_in)]
    counted += _output_counts(prices, usage)
    dollars = Decimal(0)
    for count, cost in counted:
        if not _is_count(count) or (count and cost is None):
            return None
        dollars += Decimal(str(count)) * (cost or 0) / _TOKENS
    return _micro_usd(dollars)


def _output_counts(prices: PerMillionTokens, usage: Mapping[str, Any]) -> list[tuple[Any, Dollars | None]]:
    """Return the counts of output tokens with their prices."""
    details = usage.get("output_tokens_details")
    image = details.get("image_tokens") if isinstance(details, Mapping) else None
    total = usage["output_tokens"]
    if prices.text_out is None or not (_is_count(image) and image <= total):
        return [(total, prices.image_out)]
    return [(image, prices.image_out), (total - image, prices.text_out)]


def _is_count(value: object) -> bool:
    return type(value) in (int, float) and 0 <= value < 10**12  # type: ignore[operator]


def _micro_usd(dollars: Decimal) -> int:
    return math.ceil(dollars * MICRO_USD)
