"""Routes of the provider's models: GET /v1/models, in the form that each client reads."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping

import orjson
from aiohttp import hdrs, web
from loguru import logger

from imagegen.errors import UpstreamError
from imagegen.web.context import SERVICES, ListModels
from imagegen.web.http.responses import json_response
from imagegen.web.openai.errors import model_not_found
from imagegen.web.openai.schemas import ModelEntry, ModelList

FRESH_S = 300.0
RETRY_S = 30.0

_TOGETHER_AGENTS = ("Together/", "AsyncTogether/")


class ModelListCache:
    """Cache of the provider's models; it keeps the last list while the provider can't be reached."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._refreshing = asyncio.Lock()
        self._models: tuple[ModelEntry, ...] = ()
        self._good_until = -1.0

    async def entries(self, list_models: ListModels, default_model: str) -> list[ModelEntry]:
        """All models; the default one is always there, and first where the provider does not name it."""
        async with self._refreshing:
            if self._clock() >= self._good_until:
                await self._refresh(list_models)
        if any(entry["id"] == default_model for entry in self._models):
            return list(self._models)
        return [_entry({"id": default_model}), *self._models]

    async def _refresh(self, list_models: ListModels) -> None:
        try:
            self._models = tuple(_entry(model) for model in await list_models())
        except UpstreamError as error:
            logger.warning("The upstream's models can't be listed: {}", error)
            self._good_until = self._clock() + RETRY_S
        else:
            self._good_until = self._clock() + FRESH_S


MODEL_LIST = web.AppKey("model_list", ModelListCache)


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
    services = request.app[SERVICES]
    return await request.app[MODEL_LIST].entries(services.list_models, services.identity.default_model)


def _entry(model: Mapping[str, object]) -> ModelEntry:
    """Return the fields that both clients need, and none that only one provider has."""
    model_id, created = str(model["id"]), model.get("created")
    owner = model.get("owned_by") or model.get("organization")
    return {
        "id": model_id,
        "object": "model",
        "created": created if type(created) is int else 0,
        "owned_by": owner if isinstance(owner, str) else model_id.partition("/")[0],
        "type": "image",
    }
