"""Prices of requests and of their calls, in micro-dollars: by the model table, and by what the upstream reports."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec.structs import replace

from imagegen.providers.model_rules import ModelTable
from imagegen.providers.prices import Price, estimate, settle
from imagegen.tasks.cost import Cost
from imagegen.tasks.reply_details import ReplyDetails
from imagegen.tasks.request import GenerationRequest

MAX_CACHED = 1_000
"""Prices that are kept; clients may name any model and size."""

_Key = tuple[str, int, int, str | None, str | None, int | None, int, bool | None]


class Pricing:
    """Prices of one provider's models.

    Args:
        table: the published prices.
        is_free: whether nothing is paid, as in the sandbox.
        unknown_micro_usd: price of an image of other models; None if it is unknown.
    """

    def __init__(self, table: ModelTable, *, is_free: bool = False, unknown_micro_usd: int | None = None) -> None:
        self._table = table
        self._is_free = is_free
        self._unknown = unknown_micro_usd
        self._cached: dict[_Key, int | None] = {}

    def image_price(self, request: GenerationRequest, model: str) -> int | None:
        """Return the price of one image of a request with a model, rounded up; None if it is unknown."""
        if self._is_free:
            return 0
        # Every field of a request that `estimate` reads.
        key = (
            model,
            request.width,
            request.height,
            request.quality,
            request.resolution,
            request.steps,
            len(request.input_images),
            request.prompt_upsampling,
        )
        if key in self._cached:
            return self._cached[key]
        price = estimate(self._price_of(model), replace(request, n=1))
        if len(self._cached) >= MAX_CACHED:
            self._cached.clear()
        self._cached[key] = price = self._unknown if price is None else price
        return price

    def estimate(self, request: GenerationRequest) -> Cost:
        """Return the cost of all images of a request."""
        each = self.image_price(request, request.model)
        return Cost(None if each is None else each * request.n)

    def call_price(self, request: GenerationRequest, model: str, count: int) -> int | None:
        """Return the price of a call for some images of a request; None if it is unknown."""
        each = self.image_price(request, model)
        return None if each is None else each * count

    def reported_price(self, model: str, details: ReplyDetails | None) -> int | None:
        """Return the price of an answered call by the upstream's own figure, or by its usage; None without both."""
        if self._is_free or details is None:
            return None
        if details.cost_micro_usd is not None:
            return details.cost_micro_usd
        return self.usage_price(model, details.usage) if details.usage else None

    def usage_price(self, model: str, usage: Mapping[str, Any]) -> int | None:
        """Return the price of what the upstream reports as used; None if that does not decide it."""
        return 0 if self._is_free else settle(self._price_of(model), usage)

    def charges_refusal(self, model: str) -> bool:
        """Return whether the provider charges a call that its content policy refuses."""
        price = None if self._is_free else self._price_of(model)
        return price is not None and price.charges_on_refusal == "yes"

    def _price_of(self, model: str) -> Price | None:
        row = self._table.find(model)
        return row.price if row else None
