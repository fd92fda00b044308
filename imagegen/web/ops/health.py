"""Health routes; none of them costs an upstream call."""

from __future__ import annotations

import time

from aiohttp import web

from imagegen.formats import rfc3339
from imagegen.web.api.schemas import AliveView, HealthView, ReadyView
from imagegen.web.handler_services import SERVICES
from imagegen.web.http.responses import json_response


async def api_health(_request: web.Request) -> web.StreamResponse:
    """Return the health response of the contract."""
    body: HealthView = {"success": True, "message": "Service is healthy", "timestamp": rfc3339(time.time())}
    return json_response(body)


async def healthz(_request: web.Request) -> web.StreamResponse:
    """Return that the process lives. A platform polls it, so it does not fail because Redis or the upstream is away."""
    body: AliveView = {"status": "ok"}
    return json_response(body)


async def readyz(request: web.Request) -> web.StreamResponse:
    """Return whether traffic should come: Redis answers, the loops live, images can be saved, no drain."""
    readiness = request.app[SERVICES].readiness
    causes = await readiness.causes()
    body: ReadyView = {"status": "not ready", "causes": causes} if causes else {"status": "ready"}
    if readiness.is_paused():
        body["paused"] = True
    return json_response(body, status=503 if causes else 200)
