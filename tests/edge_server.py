"""Test server with the connection handling and the middleware of the real service."""

from __future__ import annotations

from typing import Any

from aiohttp import web
from aiohttp.test_utils import TestServer

from imagegen.metrics import Meter
from imagegen.web.http.middleware import RequestPipeline, install_pipeline
from imagegen.web.http.server import ImagegenRunner
from imagegen.web.http.unread import UnreadResponses


class EdgeServer(TestServer):
    """Test server for an application that has its middleware already. unread: bounds what clients do not read."""

    __test__ = False

    def __init__(self, app: web.Application, *, unread: UnreadResponses | None = None, **options: Any) -> None:
        super().__init__(app, **options)
        self._unread = unread

    async def _make_runner(self, **options: Any) -> web.AppRunner:
        return ImagegenRunner(self.app, unread=self._unread, **options)


def edge_server(
    app: web.Application,
    meter: Meter | None = None,
    *,
    access_log: bool = False,
    unread: UnreadResponses | None = None,
) -> EdgeServer:
    """Install the middleware on the application and return its test server."""
    install_pipeline(app, RequestPipeline(meter or Meter(), access_log=access_log))
    return EdgeServer(app, unread=unread)
