"""Test server with the connection handling and the middleware of the real service."""

from __future__ import annotations

from typing import Any

from aiohttp import web
from aiohttp.test_utils import TestServer

from imagegen.metrics import Meter
from imagegen.web.http.middleware import RequestPipeline, install_pipeline
from imagegen.web.http.server import ImagegenRunner


class EdgeServer(TestServer):
    """Test server for an application that has its middleware already."""

    __test__ = False

    async def _make_runner(self, **options: Any) -> web.AppRunner:
        return ImagegenRunner(self.app, **options)


def edge_server(app: web.Application, meter: Meter | None = None, *, access_log: bool = False) -> EdgeServer:
    """Install the middleware on the application and return its test server."""
    install_pipeline(app, RequestPipeline(meter or Meter(), access_log=access_log))
    return EdgeServer(app)
