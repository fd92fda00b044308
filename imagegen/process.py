"""The process of the service: from its settings to its sockets, and from a signal to a clean end."""

from __future__ import annotations

import asyncio
import signal
import sys
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime

from aiohttp import web
from loguru import logger

from imagegen import __version__, log, standard_streams, start_checks
from imagegen.accounts.admin_token import read_admin_token
from imagegen.accounts.key_store import KeyRing
from imagegen.app import (
    ADMIN_TOKEN,
    ALERT_DELIVERIES,
    DELIVERIES,
    LEDGER,
    LIFECYCLE,
    QUEUE,
    SETTINGS,
    SUPERVISOR,
    create_app,
)
from imagegen.channel_parts import call_slots, load_tables
from imagegen.disk_patience import until_answered
from imagegen.doctor import check_models
from imagegen.errors import SettingsError
from imagegen.memory_tuning import return_freed_memory, tune_gc, tune_malloc
from imagegen.resolver import EventLoop
from imagegen.settings import Settings
from imagegen.web.guard import GUARD
from imagegen.web.handler_services import SERVICES
from imagegen.web.http.connections import connection_cap, raise_descriptor_limit
from imagegen.web.http.listening import ListeningSite, base_address, local_address, open_sockets
from imagegen.web.http.server import ImagegenRunner
from imagegen.web.ops.admin import ADMIN
from imagegen.web.ops.starting import starting_responses

WEBHOOK_DRAIN_TIMEOUT_S = 1.0
"""Time for running tries at the end, so that they need not be repeated after the restart."""


ALERT_DRAIN_TIMEOUT_S = 3.0
"""Time for the first try of alerts at the end: the cause may be the end itself."""

LOG_DRAIN_TIMEOUT_S = 2.0
"""Time for the last lines at the end, if the reader of the log is slow."""


LONG_START_S = 1.0
"""Time of a start after which health checks and clients are answered meanwhile."""


async def serve(settings: Settings) -> int:
    """Run the service until a signal; return the exit code. Raises SettingsError."""
    stop = _stop_on_signals()
    cap = connection_cap(raise_descriptor_limit(), settings.worker_concurrency)
    sockets = open_sockets(settings.hosts, settings.port)
    app = create_app(settings, [listening.getsockname()[:2] for listening in sockets])
    runner = ImagegenRunner(app, max_connections=cap)
    try:
        if not await _set_up(runner, stop, starting_responses(sockets, cap)):
            return 0
        tune_gc()
        if tune_malloc():
            app[SUPERVISOR].run("memory-return", return_freed_memory())
        await ListeningSite(runner, sockets, runner.connections).start()
        logger.info("imagegen {} listens on {}", __version__, " and ".join(map(base_address, sockets)))
        for line in start_checks.overview(settings, local_address(sockets[0]), call_slots(settings)):
            logger.info("{}", line)
        _show_admin_token(app, settings.public_url or local_address(sockets[0]))
        exposed = asyncio.create_task(_until_exposed(app[GUARD].ring, settings))
        ends = [exposed, *map(asyncio.create_task, (app[SUPERVISOR].failed.wait(), stop.wait()))]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        is_exposed = exposed.done()
        for end in ends:
            end.cancel()
        _ignore_hang_ups()
        await drain(app, settings.drain_s, stop)
        if is_exposed:
            start_checks.check_exposure(settings, has_keys=False)
        return 0 if app[SUPERVISOR].alive else 1
    finally:
        await runner.cleanup()
        for listening in sockets:
            listening.close()
        _ignore_signals()


def _show_admin_token(app: web.Application, base_url: str) -> None:
    """Log where the admin token is. A token on a disk that does not answer is used once it does."""
    settings, token, auth = app[SETTINGS], app[ADMIN_TOKEN], app[ADMIN]
    is_local = settings.is_loopback and not settings.on_render

    async def use_when_read() -> None:
        read = await until_answered(read_admin_token, settings.data_dir)
        auth.replace(read.secret)
        read.log_place(base_url, is_local=is_local)
        await asyncio.Event().wait()  # the end of a loop would count as its death

    token.log_place(base_url, is_local=is_local)
    if token.is_late:
        app[SUPERVISOR].run("admin-token", use_when_read())


async def _set_up(runner: ImagegenRunner, stop: asyncio.Event, responses: AbstractAsyncContextManager[None]) -> bool:
    """Start all parts; return False if a signal came before, as while the embedded Redis reads much data.

    responses: answers clients meanwhile, if it takes long.
    """
    setting_up, stopping = asyncio.create_task(runner.setup()), asyncio.create_task(stop.wait())
    ends = setting_up, stopping
    if not (await asyncio.wait(ends, timeout=LONG_START_S, return_when=asyncio.FIRST_COMPLETED))[0]:
        async with responses:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if setting_up.done():
        await setting_up
        return True
    setting_up.cancel()
    await asyncio.gather(setting_up, return_exceptions=True)
    return False


async def _until_exposed(ring: KeyRing, settings: Settings) -> None:
    """Wait until the keys were read from Redis; return if there is none and the service may not do without.

    Until then, and after a key was revoked, no client is admitted.
    """
    await ring.loaded.wait()
    if ring.has_keys or settings.may_be_open:
        await asyncio.Event().wait()


async def drain(app: web.Application, drain_s: float, stop: asyncio.Event) -> None:
    """Finish running attempts while reads are answered; a second signal releases them at once."""
    app[SERVICES].readiness.draining = True
    app[QUEUE].feed.wake_all()
    stop.clear()
    again = asyncio.create_task(stop.wait())
    draining = asyncio.create_task(app[LIFECYCLE].drain(drain_s))
    await asyncio.wait([again, draining], return_when=asyncio.FIRST_COMPLETED)
    again.cancel()
    draining.cancel()
    await asyncio.gather(again, draining, return_exceptions=True)
    await app[DELIVERIES].drain(WEBHOOK_DRAIN_TIMEOUT_S)
    if alerts := app[ALERT_DELIVERIES]:
        await alerts.drain(ALERT_DRAIN_TIMEOUT_S)
    await app[LEDGER].close()  # before the instance leaves: after that no other instance counts for it
    await app[LIFECYCLE].stop()


def _stop_on_signals() -> asyncio.Event:
    """Return the event that a signal to stop sets; no other usual signal may end the process within a paid call."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    for number in (signal.SIGHUP, signal.SIGQUIT):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            loop.add_signal_handler(number, stop.set)
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        loop.add_signal_handler(number, logger.info, "{} has no meaning for imagegen", number.name)
    return stop


def _ignore_signals() -> None:
    """Let further signals not end the process before its last lines are logged; the loop ends before them."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)


def _ignore_hang_ups() -> None:
    """Let SIGHUP be no second signal: a terminal that closes may send it twice, and systemd after SIGTERM.

    https://www.freedesktop.org/software/systemd/man/latest/systemd.kill.html#SendSIGHUP=
    """
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, lambda: None)


def main() -> int:
    """Run the service; return 0 after a signal, 1 if a part died, 2 if the settings can't work."""
    standard_streams.open_standard_streams()
    try:
        settings = Settings.load()
        log.configure(settings.log_level, settings.log_format)
        start_checks.check_alert_webhook(settings)
        start_checks.check_data_dir(settings.data_dir)
        for line in start_checks.warnings(settings):
            logger.warning("{}", line)
        for finding in check_models(settings, load_tables(settings)[0], datetime.now(UTC).date()):
            logger.warning("{}", finding.text)
        with asyncio.Runner(loop_factory=EventLoop) as runner:
            return runner.run(serve(settings))
    except SettingsError as error:
        print(error, file=sys.stderr)  # noqa: T201 - the one message of a start that can't succeed
        return 2
    finally:
        log.finish(LOG_DRAIN_TIMEOUT_S)
        standard_streams.flush_standard_streams()
