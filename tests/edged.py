"""Test servers whose connections and edge are those of the real service."""

from __future__ import annotations

from typing import Any

from aiohttp import web
from aiohttp.test_utils import TestServer

from imagegen.metrics import Meter
from imagegen.web.http import middleware as edge
from imagegen.web.http.server import ImagegenRunner


class EdgedServer(TestServer):
    """Of an application that has its edge already."""

    __test__ = False

    async def _make_runner(self, **options: Any) -> web.AppRunner:
        return ImagegenRunner(self.app, **options)


def edged(app: web.Application, meter: Meter | None = None, *, access_log: bool = False) -> EdgedServer:
    """A server of an application that gets its edge here."""
    edge.install(app, edge.RequestPipeline(meter or Meter(), access_log=access_log))
    return EdgedServer(app)
