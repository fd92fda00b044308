"""Responses while the service starts, as long as that takes where the embedded Redis reads much data."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from aiohttp import web

from imagegen.errors import QueueUnavailable
from imagegen.metrics import Meter
from imagegen.web.api.schemas import ReadyView
from imagegen.web.http.listening import ListeningSite
from imagegen.web.http.middleware import RequestPipeline, install_pipeline
from imagegen.web.http.responses import json_response
from imagegen.web.http.server import ImagegenRunner
from imagegen.web.ops.health import healthz

CAUSE = "the service starts: Redis is not read yet"
RETRY_AFTER_S = 5


@asynccontextmanager
async def starting_responses(sockets: Sequence[socket.socket], max_connections: int) -> AsyncIterator[None]:
    """Answer on copies of the sockets meanwhile: that the process lives, and that it takes no requests yet.

    Each connection ends with its response; those that are not accepted yet stay for the service.
    """
    app = web.Application()
    install_pipeline(app, RequestPipeline(Meter(), access_log=False))
    app.on_response_prepare.append(_close_connection)
    app.router.add_get("/healthz", healthz)
    app.router.add_get("/readyz", _not_ready)
    app.router.add_route("*", "/{path:.*}", _refuse)
    runner = ImagegenRunner(app, max_connections=max_connections)
    await runner.setup()
    try:
        await ListeningSite(runner, [listening.dup() for listening in sockets], runner.connections).start()
        yield
    finally:
        await runner.cleanup()


async def _close_connection(_request: web.Request, response: web.StreamResponse) -> None:
    response.force_close()


async def _not_ready(_request: web.Request) -> web.StreamResponse:
    body: ReadyView = {"status": "not ready", "causes": [CAUSE]}
    return json_response(body, status=503)


async def _refuse(_request: web.Request) -> web.StreamResponse:
    raise QueueUnavailable(headers={"Retry-After": str(RETRY_AFTER_S)})
