"""List of models for both APIs: the provider's, those of the model table, the default one and the aliases."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from datetime import UTC, date, datetime

from aiohttp import web
from loguru import logger
from msgspec import Struct

from imagegen.errors import UpstreamError
from imagegen.providers.model_rules import ModelRow
from imagegen.web.handler_services import SERVICES, ListModels

FRESH_S = 300.0
RETRY_S = 30.0

Listing = tuple[Mapping[str, object], ...]


class ModelListCache:
    """Cache of the provider's models; it keeps the last list while the provider can't be reached."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._refreshing = asyncio.Lock()
        self._models: Listing = ()
        self._good_until = -1.0

    async def entries(self, list_models: ListModels) -> Listing:
        """Return the provider's models, each with at least `id`."""
        async with self._refreshing:
            if self._clock() >= self._good_until:
                await self._refresh(list_models)
        return self._models

    async def _refresh(self, list_models: ListModels) -> None:
        try:
            self._models = await list_models()
        except UpstreamError as error:
            logger.warning("The upstream's models can't be listed: {}", error)
            self._good_until = self._clock() + RETRY_S
        else:
            self._good_until = self._clock() + FRESH_S


MODEL_LIST = web.AppKey("model_list", ModelListCache)


class ListedModel(Struct, frozen=True):
    """A model that a client may name.

    entry: as the provider lists it, None if it does not. row: what the model table has about it. ended: its end passed.
    """

    id: str
    entry: Mapping[str, object] | None
    row: ModelRow | None
    ended: bool


async def listed_models(request: web.Request) -> list[ListedModel]:
    """Return the default model, the provider's, those of the table, aliases and fallbacks, each id once."""
    services = request.app[SERVICES]
    identity, table = services.identity, services.models
    entries = {str(entry["id"]): entry for entry in await request.app[MODEL_LIST].entries(services.list_models)}
    first = () if identity.default_model in entries else (identity.default_model,)
    ids = dict.fromkeys((*first, *entries, *(row.id for row in table.listed), *identity.aliases, *services.fallbacks))
    today = datetime.fromtimestamp(services.queue.clock(), UTC).date()
    rows = {model: table.describe(identity.aliases.get(model, model)) for model in ids}
    return [ListedModel(model, entries.get(model), row, _has_ended(row, today)) for model, row in rows.items()]


def _has_ended(row: ModelRow | None, today: date) -> bool:
    return row is not None and row.ends is not None and row.ends <= today
