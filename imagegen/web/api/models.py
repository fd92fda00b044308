"""Route of the models with their limits and prices: GET /api/models."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import msgspec
from aiohttp import web
from pydantic.alias_generators import to_camel

from imagegen.channels_file import SANDBOX, Channel
from imagegen.providers.model_rules import ModelRow, Steps
from imagegen.providers.prices import Price
from imagegen.web.api.schemas import CapabilitiesView, ModelView
from imagegen.web.handler_services import SERVICES, Services
from imagegen.web.http.responses import json_response
from imagegen.web.model_list import ListedModel, listed_models

_NO_ROW = ModelRow("")
_REFUSES_STEPS = Steps(max=0)

FREE = Price(per_image=Decimal(0))
"""Of the sandbox, except for rows of MODELS_FILE with a price."""


async def models(request: web.Request) -> web.StreamResponse:
    """Return the image models; a model that only the provider lists without a type may be a text model."""
    services = request.app[SERVICES]
    identity = services.identity
    listed = await listed_models(request)
    views = [published_model(services, model) for model in listed if is_image_model(model)]
    return json_response({"success": True, "models": views, "defaultModel": identity.default_model})


def is_image_model(model: ListedModel) -> bool:
    """Return whether a model makes images; True if that is uncertain."""
    return model.entry is None or model.row is not None or model.entry.get("type") == "image"


def published_model(services: Services, model: ListedModel) -> ModelView:
    """Return the published row of a model, with its channel."""
    identity = services.identity
    return model_view(model, services.channels.preferred(identity.aliases.get(model.id, model.id)), identity.provider)


def model_view(model: ListedModel, channel: Channel | None, provider: str) -> ModelView:
    """Return the published row of a model. channel: preferred for it; provider: of models without a channel."""
    row = model.row or _NO_ROW
    provider = channel.provider if channel else provider
    price = row.price if row.provider == provider else None
    if price is None and provider == SANDBOX:
        price = FREE
    return {
        "id": model.id,
        "provider": provider,
        "channel": channel.name if channel else None,
        "capabilities": capabilities_view(row),
        "price": {**price_view(price), "certainty": None if price is FREE else row.certainty} if price else None,
        "endsAt": row.ends.isoformat() if row.ends else None,
        "successor": row.successor,
    }


def capabilities_view(row: ModelRow) -> CapabilitiesView:
    """Return the published limits of a model."""
    sizes = row.sizes
    steps = _REFUSES_STEPS if row.steps is False else row.steps if isinstance(row.steps, Steps) else Steps()
    return {
        "sizes": list(sizes.list) if sizes and sizes.list else None,
        "maxPixels": sizes.most_pixels if sizes else None,
        "multipleOf": sizes.multiple if sizes else None,
        "maxN": row.max_n,
        "steps": {"default": steps.default, "max": steps.max},
        "seed": row.seed,
        "edit": row.edit,
        "maxInputImages": 0 if row.edit is False else row.max_input_images,
        "mask": row.mask,
        "transparent": row.transparent,
        "qualities": list(row.qualities) if row.qualities else None,
        "promptMax": row.prompt_max,
    }


def price_view(price: Price) -> dict[str, Any]:
    """Return the rules of a price in camelCase, without those that are unknown. Dollars."""
    rules: dict[str, Any] = msgspec.to_builtins(price, builtin_types=(Decimal,))
    for name in ("per_megapixel", "per_million_tokens"):
        if name in rules:
            rules[name] = {to_camel(part): cost for part, cost in rules[name].items() if cost is not None}
    return {"currency": "USD"} | {to_camel(name): _plain(rule) for name, rule in rules.items()}


def _plain(rule: object) -> object:
    """Return a rule with plain numbers."""
    if isinstance(rule, dict):
        return {name: _plain(part) for name, part in rule.items()}
    return float(rule) if isinstance(rule, Decimal) else rule
