"""Owns the table of routes."""

from __future__ import annotations

from aiohttp import web

from imagegen.web import generate, health, pictures, tasks
from imagegen.web.ratelimit import RateLimits


def add_routes(app: web.Application, rates: RateLimits) -> None:
    """Every route, each with the budget that it counts against."""
    router = app.router
    router.add_post("/api/images/generate", rates.generation(generate.generate))
    router.add_get("/api/images/{task_id}", rates.general(tasks.get_task))
    router.add_get("/api/images/{task_id}/{index}", pictures.get_picture)
    router.add_get("/api/health", health.api_health)
    router.add_get("/healthz", health.healthz)
    router.add_get("/readyz", health.readyz)
    router.add_get("/", home)


async def home(_request: web.Request) -> web.Response:
    """A curl pair that works, until there is a page."""
    return web.Response(text=_HOME_TEXT)


_HOME_TEXT = """\
imagegen: image generation as a durable, asynchronous API.

  curl -s localhost:3000/api/images/generate -H 'Content-Type: application/json' -d '{"prompt": "a lighthouse at dusk"}'
  curl -s localhost:3000/api/images/<taskId>
"""
