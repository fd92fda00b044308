"""Owns the clients of Redis: their limits, one deadline over each call, and the two log lines of an outage."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType
from typing import Any, TypeVar, TypeVarTuple

from loguru import logger
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError, ResponseError

from imagegen.backoff import Backoff
from imagegen.errors import QueueUnavailable
from imagegen.metrics import Meter
from imagegen.redis_client.commands import Commands
from imagegen.redis_client.keys import Keys
from imagegen.redis_client.multiplexer import DEADLINE_S, Multiplexer, Script, WireEvents
from imagegen.redis_client.redis_errors import remedy, shown, unavailable
from imagegen.redis_client.server_clock import ServerClock
from imagegen.redis_client.server_info import ServerInfo
from imagegen.redis_client.subscription import Subscriptions
from imagegen.redis_client.topology import Servers

__all__ = ["BLOCK_S", "Connection", "Health", "unavailable"]

BLOCK_S = 57.0
"""One blocked read: long, since each is billed; under a minute, since proxies cut idle connections."""

SELDOM_CONNECTIONS = 4
"""For what is asked seldom. They are connected when several large values are under way at once."""

REFUSED_S, PARTLY_S = 10.0, 3.0
"""How long a refusal counts, one that lasts or one by a server that is full, read-only or part of a cluster that is
down: other commands succeed there, and must not report Redis as back in between."""

RECONNECT_S = 1.0

_Reply = TypeVar("_Reply")
_Args = TypeVarTuple("_Args")


class Connection:
    """The ways to one Redis. wire: for what is asked often; reads: for the one blocked read of the stream; commands:
    a client for what is asked seldom; subscriptions: for the control channel.

    The scripts can be repeated without harm, so what was sent and not answered is sent again. meter: told of each
    command by whoever sends it. prefix: the hash tag of our keys.

    server: the server that answered last. on_new_server: called with (known, new) when a new connection leads to
    another server, or to the same one with less data; before anything is sent on it. Callbacks must not raise.

    recovered: set, but not while lost writes are written back; no paid call may begin then.
    """

    def __init__(self, url: str, meter: Meter | None = None, *, prefix: str = "imagegen") -> None:
        """Raises SettingsError for a URL that can't work; nothing is connected yet."""
        self.servers = servers = Servers(url, prefix)
        self._probe_key = Keys(prefix).probe("text")
        self.health = Health()
        self.clock = ServerClock()
        self.recovered = asyncio.Event()
        self.recovered.set()
        self.meter = meter or Meter()
        self.server: ServerInfo | None = None
        self._reconnected_at = -math.inf
        self.on_new_server: list[Callable[[ServerInfo, ServerInfo], None]] = []
        silent = WireEvents(on_silent=self._reconnect)
        reader = WireEvents(self._identify, on_silent=self._reconnect)
        shared = WireEvents(self._identify, self.health.succeeded, self._to_client_error, self._reconnect)
        self.multiplexer = Multiplexer(servers, events=shared)
        self.blocking_reads = Multiplexer(servers, sends=1, events=reader)
        self._seldom = [Multiplexer(servers, events=silent) for _ in range(SELDOM_CONNECTIONS)]
        self.commands = Commands(self._seldom)
        self.subscriptions = Subscriptions(servers, self._reconnect)

    async def probe(self, script: Script, keys: Sequence[str]) -> Any:
        """Run a script on a connection of its own, whose failure counts as no outage. Raises RedisError, OSError."""
        wire = Multiplexer(self.servers, sends=1, events=WireEvents(greet=self._identify))
        try:
            return await wire.evalsha(script, keys, [])
        finally:
            self.servers.on_change.remove(wire.leave)
            await wire.close()

    async def ping(self) -> None:
        """PING, which is not billed; in a cluster one that the owner of our slot has to answer. Raises RedisError."""
        if self.servers.clustered:
            await self.commands.exists(self._probe_key)
        else:
            await self.commands.ping()

    async def is_reachable(self) -> bool:
        """Whether Redis answers now, and has not just refused what the queue needs."""
        try:
            async with self.deadline():
                await self.ping()
        except QueueUnavailable:
            return False
        return not self.health.refused

    def deadline(self) -> _Guard:
        """One deadline over what is inside; raises QueueUnavailable where Redis can't be used."""
        return _Guard(self._to_client_error, self.health.succeeded)

    async def retry_until_available(self, call: Callable[[*_Args], Awaitable[_Reply]], *given: *_Args) -> _Reply:
        """Repeats a call that can be repeated until Redis can be used."""
        backoff = Backoff(0.05, 1.0)
        while True:
            try:
                return await call(*given)
            except QueueUnavailable:
                await self.health.wait(backoff.next_s())

    async def _identify(self, connection: Any) -> None:
        """Request INFO, which is not billed, and report another server. Without the right to INFO nothing is known."""
        await connection.send_command("INFO")
        try:
            server = ServerInfo.parse((await connection.read_response()).decode(errors="replace"))
        except ResponseError:
            return
        if self.servers.sentinel_service is not None and server.role == "slave":
            raise RedisConnectionError("The sentinel named a replica as the master")
        if server.cluster:
            await self.servers.learn_nodes(connection)
        if server.time is not None:
            self.clock.learn(server.time)
        known, self.server = self.server, server
        if known is not None and server.run_id != known.run_id and self._may_reconnect():
            self._reconnect()
        if known is not None and server.replaces(known):
            for callback in self.on_new_server:
                callback(known, server)

    def _may_reconnect(self) -> bool:
        """Return whether the last time is a while ago: an address that leads now here, now there is no reason to."""
        now, last = time.monotonic(), self._reconnected_at
        self._reconnected_at = now
        return now - last > RECONNECT_S

    def _reconnect(self) -> None:
        """Replace the other connections: one was silent, or leads to another server, so they may be dead as well.

        What was sent and not answered is sent again; a blocked read begins again.
        """
        for wire in (self.multiplexer, self.blocking_reads, *self._seldom):
            wire.abort()
        self.subscriptions.hang_up()

    def _to_client_error(self, error: Exception) -> Exception:
        """What a caller is told of an error."""
        if not unavailable(error):
            return error
        self.health.failed(error)
        refusal = QueueUnavailable(headers={"Retry-After": "2"})
        refusal.__cause__ = error
        return refusal

    async def close(self) -> None:
        for wire in (self.multiplexer, self.blocking_reads, *self._seldom):
            await wire.close()
        self.subscriptions.hang_up()
        await self.commands.aclose()
        await self.servers.close()


class _Guard:
    def __init__(self, refusal: Callable[[Exception], Exception], succeeded: Callable[[], None]) -> None:
        self._to_client_error = refusal
        self._succeeded = succeeded
        self._timeout = asyncio.timeout(DEADLINE_S)

    async def __aenter__(self) -> None:
        await self._timeout.__aenter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self._timeout.__aexit__(kind, error, trace)
        except TimeoutError as late:
            error = late
        if error is None:
            self._succeeded()
        elif isinstance(error, RedisError | OSError | TimeoutError):
            told = self._to_client_error(error)
            if told is not error:
                raise told from error


class Health:
    """Knows whether Redis can be used: one log line when it goes, one with the downtime when it is back.

    down_since, back_at: when the present outage began, and when the last one ended; monotonic.
    """

    def __init__(self) -> None:
        self.down_since: float | None = None
        self._refused_until = -math.inf
        self.back_at = -math.inf
        self._back = asyncio.Event()
        self._back.set()

    @property
    def refused(self) -> bool:
        """Whether Redis has just refused a command that it had to take."""
        return self.down_since is not None and time.monotonic() < self._refused_until

    def failed(self, error: BaseException) -> None:
        to_do = remedy(error)
        if to_do is not None or isinstance(error, ResponseError):
            self._refused_until = time.monotonic() + (PARTLY_S if to_do is None else REFUSED_S)
        if self.down_since is None:
            self.down_since = time.monotonic()
            self._back.clear()
            logger.warning("Redis can't be used: {}{}", shown(error), f"; {to_do}" if to_do else "")

    def succeeded(self) -> None:
        if self.down_since is not None and not self.refused:
            logger.info("Redis is back after {:.1f} s", time.monotonic() - self.down_since)
            self.down_since, self.back_at = None, time.monotonic()
            self._back.set()

    async def wait(self, at_most_s: float) -> None:
        """Until Redis is known to be back, or the time is over."""
        if self._back.is_set():
            await asyncio.sleep(at_most_s)
            return
        try:
            async with asyncio.timeout(at_most_s):
                await self._back.wait()
        except TimeoutError:
            return
