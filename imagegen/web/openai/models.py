"""Routes of the models: GET /v1/models, in the form that each client reads."""

from __future__ import annotations

import orjson
from aiohttp import hdrs, web

from imagegen.web.handler_services import SERVICES
from imagegen.web.http.responses import json_response
from imagegen.web.model_list import ListedModel, listed_models
from imagegen.web.openai.error_responses import model_not_found
from imagegen.web.openai.schemas import ModelEntry, ModelList

_TOGETHER_AGENTS = ("Together/", "AsyncTogether/")


async def list_models(request: web.Request) -> web.StreamResponse:
    """Return the object of OpenAI's API, or for Together's client a bare array."""
    entries = await _entries(request)
    if request.headers.get(hdrs.USER_AGENT, "").startswith(_TOGETHER_AGENTS):
        return web.Response(body=orjson.dumps(entries), content_type="application/json")
    body: ModelList = {"object": "list", "data": entries}
    return json_response(body)


async def get_model(request: web.Request) -> web.StreamResponse:
    """Return one model (`client.models.retrieve`)."""
    model_id = request.match_info["model_id"]
    for entry in await _entries(request):
        if entry["id"] == model_id:
            return json_response(entry)
    return model_not_found()


async def _entries(request: web.Request) -> list[ModelEntry]:
    """Return the models that may be called; a model of the table that has ended is left out."""
    default = request.app[SERVICES].identity.default_model
    models = await listed_models(request)
    return [entry_of(model) for model in models if model.entry or not model.ended or model.id == default]


def entry_of(model: ListedModel) -> ModelEntry:
    """Return the fields that both clients need, and none that only one provider has."""
    listed = model.entry or {}
    created, owner = listed.get("created"), listed.get("owned_by") or listed.get("organization")
    return {
        "id": model.id,
        "object": "model",
        "created": created if type(created) is int else 0,
        "owned_by": owner if isinstance(owner, str) else _owner(model),
        "type": "image",
    }


def _owner(model: ListedModel) -> str:
    model_id = model.row.id if model.row else model.id
    return model_id.partition("/")[0] if "/" in model_id or model.row is None else model.row.provider
