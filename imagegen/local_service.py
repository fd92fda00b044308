"""The service in this process for one command: on a port of loopback, with the queue and store of the settings."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

from imagegen import start_checks
from imagegen.app import ADMIN_TOKEN, create_app
from imagegen.process import drain
from imagegen.settings import Settings
from imagegen.web.http.listening import ListeningSite, base_address, open_sockets
from imagegen.web.http.server import ImagegenRunner

LOOPBACK = "127.0.0.1"
MAX_CONNECTIONS = 64


@dataclass(frozen=True, slots=True)
class LocalService:
    """Address of a running service, and the secret that it takes from the operator."""

    url: str
    secret: str = field(repr=False)


@asynccontextmanager
async def run_local_service(settings: Settings, stop: asyncio.Event) -> AsyncIterator[LocalService]:
    """Run the service meanwhile. Its end waits for running attempts, as that of `imagegen serve` does.

    With the Redis or the data folder of a running service it is one more instance of it, with the same tasks and
    images. Nothing limits the rate of the one client; budgets hold.

    Args:
        stop: set by a signal, it ends the wait at the end.

    Raises:
        SettingsError
    """
    start_checks.check_alert_webhook(settings)
    start_checks.check_data_dir(settings.data_dir)
    own = replace(
        settings,
        hosts=(LOOPBACK,),
        port=0,
        public_url=None,
        rate_limit_max=0,
        image_rate_limit_max=0,
        image_units_per_min=None,
        trusted_proxy_hops=0,
        on_render=False,  # nothing outside of this machine reaches loopback
    )
    sockets = open_sockets(own.hosts, own.port)
    app = create_app(own, [listening.getsockname()[:2] for listening in sockets])
    runner = ImagegenRunner(app, max_connections=MAX_CONNECTIONS)
    try:
        await runner.setup()
        await ListeningSite(runner, sockets, runner.connections).start()
        try:
            yield LocalService(base_address(sockets[0]), app[ADMIN_TOKEN].secret)
        finally:
            await drain(app, own.drain_s, stop)
    finally:
        await runner.cleanup()
        for listening in sockets:
            listening.close()
