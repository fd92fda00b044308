"""List of models for agents: short rows with a price, or the limits of one model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson
from aiohttp import web

from imagegen.errors import FieldError, InvalidRequest
from imagegen.tasks.cost import dollars
from imagegen.tasks.request import GenerationRequest
from imagegen.tasks.validation import MAX_MODEL_CHARS
from imagegen.web.api.models import is_image_model, published_model
from imagegen.web.handler_services import SERVICES, Services
from imagegen.web.mcp.tool_results import ToolResult, text_result
from imagegen.web.mcp.views import ListedModelView, ToolModelsView
from imagegen.web.model_list import ListedModel, listed_models

MAX_LISTED_CHARS = 6_000
"""Of all rows, in the text and in the structured result."""

QUOTED_SIDE = 1024

_ARGUMENTS = ("filter", "model")


async def list_models(request: web.Request, arguments: Mapping[str, Any]) -> ToolResult:
    """Return the models with a part in their names, or one model. Raises InvalidRequest."""
    part, wanted = _parse(arguments)
    services = request.app[SERVICES]
    models = [model for model in await listed_models(request) if _is_offered(model)]
    if wanted is not None:
        model = next((model for model in models if model.id == wanted), None)
        if model is None:
            raise InvalidRequest(details=[FieldError("model", "is none of the listed models")])
        view = {**published_model(services, model)}
        return text_result(orjson.dumps(view).decode(), {"model": view})
    return _listed(services, [model for model in models if part in model.id.lower()])


def _is_offered(model: ListedModel) -> bool:
    """Return whether a call may name a model."""
    return is_image_model(model) and not model.ended and len(model.id) <= MAX_MODEL_CHARS


def _listed(services: Services, models: list[ListedModel]) -> ToolResult:
    rows: list[ListedModelView] = []
    lines: list[str] = []
    chars = 0
    for model in models:
        row = _row(services, model)
        price = "price unknown" if row["usd"] is None else f"{row['usd']:g} USD"
        lines.append(f"{model.id}: {price}{', edits' if row['edit'] else ''}")
        rows.append(row)
        chars += len(lines[-1]) + len(orjson.dumps(row))
        if chars > MAX_LISTED_CHARS:
            break
    view: ToolModelsView = {"models": rows}
    head = f"Prices of an image of {QUOTED_SIDE} x {QUOTED_SIDE}. The first model is the default."
    if left := len(models) - len(rows):
        view["more"] = left
        lines.append(f"{left} more: use filter.")
    return text_result("\n".join([head, *lines]), view)


def _row(services: Services, model: ListedModel) -> ListedModelView:
    name = services.identity.aliases.get(model.id, model.id)
    sample = GenerationRequest(prompt="x", model=name, width=QUOTED_SIDE, height=QUOTED_SIDE, n=1)
    estimated = services.identity.estimate(sample, None).estimated
    row: ListedModelView = {
        "id": model.id,
        "usd": None if estimated is None else dollars(estimated),
        "edit": model.row.edit if model.row else None,
    }
    if model.row and model.row.max_n:
        row["maxN"] = model.row.max_n
    return row


def _parse(arguments: Mapping[str, Any]) -> tuple[str, str | None]:
    errors = [
        FieldError(ascii(name)[1:100], f"must be one of {', '.join(_ARGUMENTS)}")
        for name in arguments
        if name not in _ARGUMENTS
    ]
    errors += [
        FieldError(name, "must be a text") for name in _ARGUMENTS if not isinstance(arguments.get(name), str | None)
    ]
    if errors:
        raise InvalidRequest(details=errors[:10])
    return (arguments.get("filter") or "").lower(), arguments.get("model") or None
