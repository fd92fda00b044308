"""The service in this process for one command: on a port of loopback, with the queue and store of the settings."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

from imagegen import start_checks
from imagegen.app import ADMIN_TOKEN, create_app
from imagegen.command_redis import connected_redis
from imagegen.errors import QueueUnavailable, SettingsError
from imagegen.process import drain
from imagegen.redis_client.keys import Keys
from imagegen.redis_client.redis_errors import RedisError
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

    It has the tasks, images and budgets of the stopped service with these settings, and the sandbox has its own: every
    instance runs the tasks of all others, and a running service may have another provider.

    Args:
        stop: set by a signal, it ends the wait at the end.

    Raises:
        SettingsError: wrong settings, or a service with this Redis runs already.
    """
    start_checks.check_alert_webhook(settings)
    if settings.is_sandbox:
        apart = f"{settings.redis_prefix}-sandbox"
        settings = replace(settings, redis_prefix=apart, data_dir=settings.data_dir / "sandbox")
    start_checks.check_data_dir(settings.data_dir)
    if not settings.is_sandbox:
        await _check_alone(settings)
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


async def _check_alone(settings: Settings) -> None:
    """Raise SettingsError if another instance is connected to this Redis."""
    async with connected_redis(settings) as connection:
        try:
            async with connection.deadline():
                subscribers = await connection.commands.pubsub_numsub(Keys(settings.redis_prefix).notifications)
        except (QueueUnavailable, RedisError):  # the service waits for Redis, or may work without this right
            return
    if any(count for _, count in subscribers):
        raise SettingsError(
            "a service or another command works with this Redis: give the address of the service with --url, or try "
            "again when the other command has ended"
        )
