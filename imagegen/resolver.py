"""DNS resolver of outgoing calls, apart from the thread pool that serves the disk: a silent server blocks nothing else.

Names are resolved by c-ares without threads (it reads /etc/hosts, resolv.conf and search domains). The system resolves
the others (mDNS, NIS), and the name of Redis, on few threads of our own.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import aiodns
from aiohttp.abc import AbstractResolver, ResolveResult

DEADLINE_S = 5.0
"""For one name, all tries of all servers."""

TRY_S = 2.0
TRIES = 2
SYSTEM_AT_ONCE = 8
"""Threads in getaddrinfo; each may hang for as long as resolv.conf allows."""

_NUMERIC = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
_SILENT = frozenset({aiodns.error.ARES_ETIMEOUT, aiodns.error.ARES_ECANCELLED})

RESOLV_CONF = Path("/etc/resolv.conf")

_FileState = tuple[int, int, int]
"""Time of the last change, size and inode."""

AddressInfo = tuple[socket.AddressFamily, socket.SocketKind, int, str, tuple[Any, ...]]


class SystemResolver:
    """The system's getaddrinfo, on daemon threads: nothing waits for them at the end of the process."""

    def __init__(self) -> None:
        self._free = asyncio.Semaphore(SYSTEM_AT_ONCE)

    async def getaddrinfo(
        self, host: bytes | str | None, port: bytes | str | int | None, **hints: int
    ) -> list[AddressInfo]:
        """Return what `socket.getaddrinfo` returns. A thread that hangs keeps its place until it returns."""
        await self._free.acquire()
        loop = asyncio.get_running_loop()
        future: asyncio.Future[list[AddressInfo]] = loop.create_future()

        def finish(resolved: list[Any], error: Exception | None) -> None:
            self._free.release()
            if future.done():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(resolved)

        def work() -> None:
            resolved: list[Any] = []
            error = None
            try:
                resolved = socket.getaddrinfo(host, port, **hints)
            except Exception as failure:  # noqa: BLE001 - raised again to its waiters
                error = failure
            with suppress(RuntimeError):  # the loop was closed meanwhile
                loop.call_soon_threadsafe(finish, resolved, error)

        try:
            threading.Thread(target=work, name="resolver", daemon=True).start()
        except RuntimeError as error:  # the system refuses another thread
            self._free.release()
            raise socket.gaierror(socket.EAI_AGAIN, "no thread is free to resolve it") from error
        return await future


class FallbackExecutor(ThreadPoolExecutor):
    """Pool of threads that runs a call in the calling thread if the system has no thread left for the pool."""

    _has_thread = False

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Return the future of a call; the call is already done if the pool has no thread and none could be started."""
        future: Future[Any] = Future()
        calls = [(future, partial(fn, *args, **kwargs))]  # emptied by the call: the pool keeps what it can't start

        def work() -> None:
            if calls:
                _run(*calls.pop())

        try:
            super().submit(work)
        except RuntimeError as error:
            if "new thread" not in str(error):  # it is shut down
                raise
            if not self._has_thread:
                work()
        else:
            self._has_thread = True
        return future


def _run(future: Future[Any], call: Callable[[], Any]) -> None:
    """Run a call and set its result or error on its future, unless that is cancelled."""
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(call())
    except BaseException as error:  # noqa: BLE001 - it belongs to the caller
        future.set_exception(error)


class EventLoop(asyncio.SelectorEventLoop):
    """The event loop of the service: names are not resolved in the pool of threads that serves the disk.

    No call in that pool fails because the system has no thread left.
    """

    _system: SystemResolver | None = None

    def __init__(self) -> None:
        super().__init__()
        self._executor = FallbackExecutor(thread_name_prefix="asyncio")
        self.set_default_executor(self._executor)

    def remove_signal_handler(self, sig: int) -> bool:
        """Remove a handler, as the end of the loop does with all; a signal that is ignored stays so."""
        return signal.getsignal(sig) is not signal.SIG_IGN and super().remove_signal_handler(sig)

    async def shutdown_default_executor(self, *args: Any) -> None:
        """Wait for the calls of the pool. If that needs a thread and the system has none, do not wait."""
        try:
            await super().shutdown_default_executor(*args)
        except RuntimeError:
            self._executor.shutdown(wait=False)

    async def getaddrinfo(  # type: ignore[override]
        self,
        host: bytes | str | None,
        port: bytes | str | int | None,
        *,
        family: int = 0,
        type: int = 0,  # noqa: A002 - asyncio's signature
        proto: int = 0,
        flags: int = 0,
    ) -> list[AddressInfo]:
        if self._system is None:
            self._system = SystemResolver()
        return await self._system.getaddrinfo(host, port, family=family, type=type, proto=proto, flags=flags)


class Resolver(AbstractResolver):
    """Resolver for aiohttp's connectors, with a deadline for each name.

    nameservers: `host` or `host:port`; those of resolv.conf if not given. Their channel is opened for the first name,
    and again after that file has changed.
    """

    def __init__(self, nameservers: Sequence[str] | None = None, *, deadline_s: float = DEADLINE_S) -> None:
        self._nameservers = nameservers
        self._dns: aiodns.DNSResolver | None = None
        self._read_config: _FileState | None = None
        self._system = SystemResolver()
        self._deadline_s = deadline_s

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """Return the addresses of a name.

        Raises:
            OSError: there are none, or no answer came in time.
        """
        try:
            async with asyncio.timeout(self._deadline_s):
                resolved = await self._addresses(host, port, family)
        except TimeoutError as error:
            raise socket.gaierror(socket.EAI_AGAIN, f"no answer within {self._deadline_s:g} s") from error
        return [
            ResolveResult(hostname=host, host=address, port=port, family=family, proto=0, flags=_NUMERIC)
            for address, family in resolved
        ]

    async def close(self) -> None:
        if self._dns is not None:
            await self._dns.close()

    async def _addresses(self, host: str, port: int, family: int) -> list[tuple[str, int]]:
        try:
            resolved = await (await self._channel()).getaddrinfo(
                host, port=port, family=socket.AddressFamily(family), type=socket.SOCK_STREAM
            )
            return [(_text(node.addr[0]), int(node.family)) for node in resolved.nodes]
        except aiodns.error.DNSError as error:
            if error.args[0] in _SILENT:
                raise socket.gaierror(socket.EAI_AGAIN, "no DNS server answered") from error
        infos = await self._system.getaddrinfo(host, port, family=family, type=socket.SOCK_STREAM)
        return [(_scoped(info[4]), int(info[0])) for info in infos]

    async def _channel(self) -> aiodns.DNSResolver:
        """Return the channel to the DNS servers, a new one if their file has changed.

        c-ares notices that only in the folder itself, not in a container (a mount) or behind a link to another folder.
        """
        state = _state_of(RESOLV_CONF) if self._nameservers is None else None
        if self._dns is None or state != self._read_config:
            former, self._read_config = self._dns, state
            self._dns = aiodns.DNSResolver(self._nameservers, timeout=TRY_S, tries=TRIES)
            if former is not None:
                await former.close()
        return self._dns


def _state_of(path: Path) -> _FileState | None:
    """Return a value that changes if a file is written or replaced; None without a file. It takes some microseconds."""
    try:
        found = os.stat(path)  # noqa: PTH116
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def _text(address: bytes | str) -> str:
    return address.decode("ascii") if isinstance(address, bytes) else address


def _scoped(address: tuple[Any, ...]) -> str:
    """Return the host of a socket address, with the zone that a link-local one needs."""
    zone = address[3] if len(address) > 3 else 0
    return f"{address[0]}%{zone}" if zone and "%" not in address[0] else str(address[0])
