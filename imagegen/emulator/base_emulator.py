"""Base of all emulators: it listens, queues faults, and runs as a command until a signal."""

from __future__ import annotations

import asyncio
import signal
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from time import monotonic

from aiohttp import web

from .fault_schedule import FaultSchedule
from .image_files import ShortLinks


class ListeningEmulator(ABC):
    """Emulator on a port. `stop()` ends all connections; a further `start()` takes the same port. The ledger stays."""

    _links: ShortLinks
    _script: FaultSchedule

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port
        self._runner: web.ServerRunner | None = None
        self._held: set[asyncio.Future[None]] = set()

    @property
    def url(self) -> str:
        return f"http://{self._host}:{self._port}"

    async def start(self) -> None:
        """Listen. Raises OSError if the port is taken."""
        server = web.Server(self._handle, handler_cancellation=True, access_log=None)
        self._runner = web.ServerRunner(server, shutdown_timeout=0.01)
        await self._runner.setup()
        await web.TCPSite(self._runner, self._host, self._port, backlog=1024).start()
        self._port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    def script(self, steps: Sequence[object]) -> None:
        """Queue faults. Raises UnknownFault."""
        self._script.add(steps, monotonic())

    def clear_script(self) -> None:
        self._script.clear()

    def set_fault(self, fault: str | None, share: float = 1.0) -> None:
        """Set what each call gets from now on, or a share of them; None: nothing. Raises UnknownFault."""
        self._script.set_default(fault, share, monotonic())

    def expire_links(self) -> None:
        """Let all links that were given out so far be dead from now on."""
        self._links.expire_all(monotonic())

    async def _hold(self) -> None:
        """Wait until the calls that are held are released."""
        released: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._held.add(released)
        try:
            await released
        finally:
            self._held.discard(released)

    def release(self) -> None:
        """Let the calls that are held now be answered."""
        for released in self._held:
            if not released.done():
                released.set_result(None)

    @abstractmethod
    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer a request."""


async def serve(emulator: ListeningEmulator) -> None:
    """Listen until SIGTERM or SIGINT. Raises OSError if the port is taken."""
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    await emulator.start()
    sys.stdout.write(f"emulator ready on {emulator.url}\n")
    sys.stdout.flush()
    await stopped.wait()
    await emulator.stop()
