"""Owns the table of the routes of `/v1`."""

from __future__ import annotations

from aiohttp import web

from imagegen.ratelimit.limits import RateLimits
from imagegen.web.openai.generations import generations
from imagegen.web.openai.models import CATALOGUE, ModelListCache, get_model, list_models

BASES = ("/v1", "", "/v1/v1")
"""Client versions differ in whether `/v1` is in their base URL or in the path that they add."""


def add_routes(app: web.Application, rates: RateLimits) -> None:
    """Every route under every base, each with the budget that it counts against."""
    app[CATALOGUE] = ModelListCache()
    generate, models, model = rates.generation(generations), rates.general(list_models), rates.general(get_model)
    for base in BASES:
        app.router.add_post(f"{base}/images/generations", generate)
        app.router.add_get(f"{base}/models", models)
        app.router.add_get(f"{base}/models/{{model_id:.+}}", model)
