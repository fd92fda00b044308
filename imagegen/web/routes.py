"""Owns the table of routes."""

from __future__ import annotations

from aiohttp import web

from imagegen.ratelimit.limits import RateLimits
from imagegen.web.api import batch, changes, events, listing, tasks
from imagegen.web.api import images as pictures
from imagegen.web.api import submit as generate
from imagegen.web.openai import routes as v1
from imagegen.web.ops import docs, health, metrics, stats
from imagegen.web.ops.admin import admin_only


def add_routes(app: web.Application, rates: RateLimits) -> None:
    """Every route, each with the budget that it counts against."""
    router = app.router
    router.add_post("/api/images/generate", rates.generation(generate.generate))
    router.add_post("/api/images/batch", rates.general(batch.batch(rates)))
    router.add_get("/api/images", rates.general(admin_only(listing.list_tasks)))
    router.add_get("/api/events", rates.general(events.multi_task_events), allow_head=False)
    cancel, task = rates.general(changes.cancel), "/api/images/{task_id:(?!generate$|batch$)[^/]+}"
    router.add_get(task, rates.general(tasks.get_task))
    router.add_delete(task, cancel)
    router.add_post(f"{task}/cancel", cancel)
    router.add_post(f"{task}/retry", rates.generation(changes.retry))
    router.add_get(f"{task}/events", rates.general(events.task_events), allow_head=False)
    router.add_get(rf"{task}/{{index:[0-9]+}}", rates.misses(pictures.get_image, pictures.is_free))
    router.add_get("/api/stats", rates.general(admin_only(stats.get_stats)))
    router.add_get("/metrics", admin_only(metrics.get_metrics))
    router.add_get("/api/health", health.api_health)
    router.add_get("/healthz", health.healthz)
    router.add_get("/readyz", health.readyz)
    router.add_get("/openapi.json", docs.get_document)
    router.add_get("/docs", docs.get_page)
    router.add_get("/docs/{file}", docs.get_file)
    router.add_get("/", docs.home)
    v1.add_routes(app, rates)
    app.on_shutdown.append(events.end_streams)
