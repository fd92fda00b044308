"""Listening sockets: bound to each host of the settings, accepting within the cap of connections."""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import cast

import orjson
from aiohttp import web
from loguru import logger

from imagegen.errors import SettingsError, TooManyConnections
from imagegen.turn_queue import TurnLimit
from imagegen.web.http.connections import EXHAUSTED, Connections, Outage, has_bytes_waiting
from imagegen.web.http.responses import SECURITY_HEADERS, fresh_request_id

BACKLOG = 4_096
"""Connections that wait to be accepted, Linux's own limit. A client over it tries again only after a second."""

ACCEPTS_PER_TURN = 16
"""Connections that are accepted in one turn of the event loop: each leads to a request that takes up to 0.5 ms.

As many that were accepted before, and have sent a whole head now, are passed on.
"""

LATE_PER_TURN = 2
"""Connections with a part of a head only that are passed on in a turn: hundreds of them delay no whole request."""

_PEEKED_BYTES = 4096

CHOSEN_PORT_TRIES = 5
"""The system chooses a port for one address; on another one a client's connection may have it."""

FULL_RETRY_S = 5
SPARING_S = 0.004
"""How long no connection is accepted while each that could be closed for it may have sent a request."""

PAUSE_S = 0.25
"""How long no connection is accepted after the system had no descriptor for one."""

_ANY_V4, _ANY_V6 = "0.0.0.0", "::"  # noqa: S104 - compared, not bound


def open_sockets(hosts: Sequence[str], port: int) -> list[socket.socket]:
    """Bind a socket for each address of the hosts; `::` takes IPv4 too. Port 0 is chosen once for all of them.

    An address that two of the hosts have, or that an any-address among them takes, is bound once.

    Raises:
        SettingsError: a host is unknown or can't be bound.
    """
    for _ in range(0 if port else CHOSEN_PORT_TRIES - 1):
        with suppress(SettingsError):
            return _open_sockets(hosts, port)
    return _open_sockets(hosts, port)


def _open_sockets(hosts: Sequence[str], port: int) -> list[socket.socket]:
    sockets: list[socket.socket] = []
    try:
        for host in sorted(hosts, key=lambda host: host not in (_ANY_V4, _ANY_V6)):
            port = sockets[0].getsockname()[1] if sockets else port
            sockets += _bind(host, port, sockets, dual=_ANY_V4 not in hosts)
    except BaseException:
        for listening in sockets:
            listening.close()
        raise
    return sockets


def _bind(host: str, port: int, existing: Sequence[socket.socket], *, dual: bool) -> list[socket.socket]:
    """Bind every address of a host that `existing` sockets don't take; of a name with several, at least one."""
    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise SettingsError(f"HOST: {host!r} is no address of this machine and no name that resolves") from error
    bound: list[socket.socket] = []
    failure: OSError | None = None
    addresses = dict.fromkeys((info[0], info[4]) for info in infos)
    wanted = [(family, address) for family, address in addresses if not _is_taken(family, address, existing)]
    for family, address in wanted:
        at = (address[0], bound[0].getsockname()[1], *address[2:]) if bound else address
        try:
            bound.append(_listen(family, at, dual=dual and host == _ANY_V6))
        except OSError as error:
            failure = error
    if wanted and not bound:
        reason = failure.strerror if failure else "no address"
        raise SettingsError(f"HOST, PORT: can't listen on {where} ({reason}); choose another HOST or PORT") from failure
    return bound


def _is_taken(family: int, address: tuple[object, ...], sockets: Sequence[socket.socket]) -> bool:
    """Return whether one of these sockets takes the connections to this address."""
    for listening in sockets:
        host, _, *scope = listening.getsockname()
        same = host == address[0] and tuple(scope) == address[2:]
        if listening.family == family and (same or host in (_ANY_V4, _ANY_V6)):
            return True
        if host == _ANY_V6 and not listening.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY):
            return True
    return False


def _listen(family: int, address: tuple[object, ...], *, dual: bool) -> socket.socket:
    """Make one listening socket; unlike `socket.create_server` it takes scope ids."""
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if dual else 1)
        listening.bind(address)
        listening.listen(BACKLOG)
        listening.settimeout(0)
    except BaseException:
        listening.close()
        raise
    return listening


def base_address(listening: socket.socket) -> str:
    """Return the address of a listening socket as a URL."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def local_address(listening: socket.socket) -> str:
    """Return the URL by which this machine reaches a listening socket."""
    host, port = listening.getsockname()[:2]
    return f"http://localhost:{port}" if host in (_ANY_V4, _ANY_V6) else base_address(listening)


class ListeningSite(web.BaseSite):
    """Site that accepts connections on bound sockets for a runner, as `web.SockSite` does, but within a cap."""

    def __init__(self, runner: web.BaseRunner, sockets: Sequence[socket.socket], connections: Connections) -> None:
        super().__init__(runner)
        self._sockets = sockets
        self._connections = connections

    @property
    def name(self) -> str:
        return ", ".join(map(base_address, self._sockets))

    async def start(self) -> None:
        await super().start()
        server = self._runner.server
        if server is None:
            raise RuntimeError("the runner is not set up")
        self._server = cast(asyncio.AbstractServer, _Acceptor(self._sockets, server, self._connections))


class _Acceptor:
    """Accept loop of several sockets.

    asyncio's own logs a traceback for each connection that it can't accept, and has no cap.
    """

    def __init__(
        self, sockets: Sequence[socket.socket], factory: Callable[[], asyncio.Protocol], connections: Connections
    ) -> None:
        self.sockets = sockets
        self._factory = factory
        self._connections = connections
        self._loop = asyncio.get_running_loop()
        self._connecting: set[asyncio.Task[None]] = set()
        self._turns = TurnLimit(ACCEPTS_PER_TURN)
        self._late = deque[_EarlyConnection]()
        self._held: tuple[socket.socket, str] | None = None
        self._resume: asyncio.TimerHandle | None = None
        self._exhaustion = Outage()
        self._watch()

    def close(self) -> None:
        """Stop accepting; open connections stay."""
        if self._resume is not None:
            self._resume.cancel()
            self._resume = None
        if self._held is not None:
            self._held[0].close()
            self._held = None
        self._unwatch()
        for listening in self.sockets:
            listening.close()

    def _watch(self) -> None:
        self._resume = None
        for listening in self.sockets:
            self._loop.add_reader(listening, self._accept, listening)

    def _unwatch(self) -> None:
        for listening in self.sockets:
            if listening.fileno() >= 0:
                self._loop.remove_reader(listening)

    def _accept(self, listening: socket.socket) -> None:
        for _ in range(ACCEPTS_PER_TURN):
            try:
                accepted, peer = listening.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                self._pause(error)
                return
            accepted.settimeout(0)
            if not self._place(accepted, str(peer[0])):
                self._unwatch()
                return

    def _place(self, accepted: socket.socket, address: str) -> bool:
        """Take an accepted connection, or refuse it. Return False if that waits: then nothing is accepted meanwhile."""
        admitted = self._connections.admit(address, len(self._connecting))
        if admitted is None:
            self._held = accepted, address
            self._resume = self._loop.call_later(SPARING_S, self._place_held)
            return False
        if admitted:
            _EarlyConnection(accepted, address, self._connections, self._start_connecting, self._add_late)
        else:
            _refuse(accepted)
        return True

    def _place_held(self) -> None:
        held, self._held = self._held, None
        if held is not None and self._place(*held):
            self._watch()

    def _add_late(self, connection: _EarlyConnection) -> None:
        if not self._late:
            self._loop.call_soon(self._connect_late)
        self._late.append(connection)

    def _connect_late(self) -> None:
        for _ in range(min(LATE_PER_TURN, len(self._late))):
            self._late.popleft().connect()
        if self._late:
            self._loop.call_soon(self._connect_late)

    def _start_connecting(self, accepted: socket.socket) -> None:
        connecting = self._loop.create_task(self._connect(accepted))
        self._connecting.add(connecting)
        connecting.add_done_callback(self._connecting.discard)

    async def _connect(self, accepted: socket.socket) -> None:
        self._turns.begun += 1
        if self._turns.begun >= self._turns.noticed and self._turns.is_reached():
            await self._turns.wait()
        try:
            await self._loop.connect_accepted_socket(self._factory, accepted)
        except OSError as error:
            logger.debug("A connection was lost while it was accepted: {}", error)
            accepted.close()

    def _pause(self, error: OSError) -> None:
        """Accept nothing for a moment: the socket stays readable, and trying again at once would spin."""
        if self._exhaustion.begins():
            logger.warning("No connection can be accepted for now: {}", error.strerror)
        self._unwatch()
        self._resume = self._loop.call_later(PAUSE_S, self._watch)
        if error.errno in EXHAUSTED and len(self._connections):
            self._connections.close_least_needed()


class _EarlyConnection:
    """Accepted socket that has sent no whole head yet. The HTTP server gets it with its first byte, or its end.

    A connection of the HTTP server takes three times the CPU and ten times the memory. That matters in a flood of
    clients that send nothing.

    Args:
        on_request: takes the socket, as soon as a whole head came.
        on_rest: takes this connection where less came, to call `connect` in its turn.
    """

    idle = True
    receiving = resumable = waiting = False
    head_begun = False
    _is_late = False

    def __init__(
        self,
        accepted: socket.socket,
        address: str,
        connections: Connections,
        on_request: Callable[[socket.socket], None],
        on_rest: Callable[[_EarlyConnection], None],
    ) -> None:
        self.address = address
        self._accepted = accepted
        self._connections = connections
        self._on_request = on_request
        self._on_rest = on_rest
        self._peek()

    def _peek(self) -> None:
        try:
            received = self._accepted.recv(_PEEKED_BYTES, socket.MSG_PEEK)
        except BlockingIOError:
            self._connections.add(self)
            asyncio.get_running_loop().add_reader(self._accepted, self._peek_again)
        except OSError:
            self._accepted.close()
        else:
            if b"\r\n\r\n" in received:
                self._on_request(self._accepted)
            else:
                self._is_late = True
                self._connections.add(self)
                self._on_rest(self)

    def _peek_again(self) -> None:
        asyncio.get_running_loop().remove_reader(self._accepted)
        self._connections.discard(self)
        self._peek()

    @property
    def has_unread(self) -> bool:
        """Return whether bytes came that were not looked at."""
        return not self._is_late and has_bytes_waiting(self._accepted.fileno())

    def connect(self) -> None:
        """Pass the socket on, unless it was closed."""
        if self._accepted.fileno() >= 0:
            self._connections.discard(self)
            self._on_request(self._accepted)

    def end_wait(self) -> None:
        """Do nothing: it has sent no whole request."""

    def force_close(self) -> None:
        if self._accepted.fileno() >= 0:
            asyncio.get_running_loop().remove_reader(self._accepted)
            self._accepted.close()


def _refuse(accepted: socket.socket) -> None:
    """Answer 503 and close, as far as that goes without waiting."""
    request_id = fresh_request_id()
    error = TooManyConnections()
    body = orjson.dumps(
        {
            "success": False,
            "statusCode": error.status,
            "code": error.code,
            "message": error.message("zh"),
            "retryable": error.retryable,
            "requestId": request_id,
            "details": [],
        }
    )
    lines = [
        f"HTTP/1.1 {error.status} Service Unavailable",
        f"X-Request-Id: {request_id}",
        f"Retry-After: {FULL_RETRY_S}",
        "Connection: close",
        "Content-Type: application/json; charset=utf-8",
        f"Content-Length: {len(body)}",
        *(f"{name}: {value}" for name, value in SECURITY_HEADERS.items()),
    ]
    try:
        accepted.send("\r\n".join([*lines, "", ""]).encode() + body)
        accepted.shutdown(socket.SHUT_WR)
    except OSError as failure:
        logger.debug("A refused client could not be sent its answer: {}", failure)
    finally:
        accepted.close()
