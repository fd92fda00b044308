"""Connections to Redis: their limits, one deadline over each call, and the server's clock."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, TypeVar, TypeVarTuple, cast

from msgspec.structs import replace
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError, ResponseError

from imagegen.backoff import Backoff
from imagegen.errors import QueueUnavailable
from imagegen.metrics import Meter
from imagegen.redis_client.cluster_multiplexer import ClusterMultiplexer
from imagegen.redis_client.commands import Commands
from imagegen.redis_client.keys import Keys
from imagegen.redis_client.multiplexer import MultiplexerEvents, Script
from imagegen.redis_client.redis_errors import ScanRefused, UnreadableReply, remedy, unavailable
from imagegen.redis_client.redis_health import Health
from imagegen.redis_client.replies import DECODE_ERRORS, decoding, unreadable
from imagegen.redis_client.server_info import ServerInfo
from imagegen.redis_client.subscription import Subscriptions
from imagegen.redis_client.topology import Servers

BLOCK_S = 57.0
"""One blocked read: long, since each is billed; under a minute, since proxies cut idle connections."""

RARE_CONNECTIONS = 4
"""Connections for rare commands. All are opened only if several large values are in flight together."""

RECONNECT_S = 1.0

CLOCK_TOLERANCE_S = 2.0
"""A reply may be so late. Smaller differences are no reason to set the clock."""

JUMP_S = 5.0
"""Difference at which the server's clock has jumped, or another server with another clock answers."""

MAX_JUMPS = 20

_Reply = TypeVar("_Reply")
_Args = TypeVarTuple("_Args")


class Connection:
    """All connections of one process to Redis.

    Scripts can be repeated without harm, so unanswered commands are sent again.

    Attributes:
        multiplexer: for frequent commands.
        blocking_reads: for the one blocked read of the stream.
        commands: redis-py's client for rare commands.
        subscriptions: for the channel of the instances.
        meter: counts commands; each sender reports its own.
        server: the server that answered last.
        on_new_server: called with (previous, new) when a new connection leads to another server, or to the same one
            with less data, before anything is sent on it. Callbacks must not raise.
        recovered: cleared while lost writes are written back; no paid call may begin then.
        unsettled_until: monotonic time until which this instance or a slower peer may write lost data back. A claim
            that Redis confirmed before may be of a task that has ended.

    Args:
        prefix: hash tag of our keys.
    """

    def __init__(self, url: str, meter: Meter | None = None, *, prefix: str = "imagegen") -> None:
        """Prepare the connections without connecting. Raises SettingsError for an invalid URL."""
        self.servers = servers = Servers(url, prefix)
        self._probe_key = Keys(prefix).probe("text")
        self.health = Health()
        self.clock = ServerClock()
        self.recovered = asyncio.Event()
        self.recovered.set()
        self.unsettled_until = -math.inf
        self.meter = meter or Meter()
        self.server: ServerInfo | None = None
        self._reconnected_at = -math.inf
        self.on_new_server: list[Callable[[ServerInfo, ServerInfo], None]] = []
        silent = MultiplexerEvents(on_silent=self._reconnect)
        reader = MultiplexerEvents(self._identify, on_silent=self._reconnect)
        shared = MultiplexerEvents(self._greet, self.health, self._to_client_error, self._reconnect)
        self.multiplexer = ClusterMultiplexer(servers, events=shared)
        self.blocking_reads = ClusterMultiplexer(servers, sends=1, events=reader)
        self._rare = [ClusterMultiplexer(servers, events=silent) for _ in range(RARE_CONNECTIONS)]
        self.commands = Commands(self._rare)
        self.subscriptions = Subscriptions(servers, self._reconnect)

    async def probe(self, script: Script, keys: Sequence[str], commands: Iterable[Sequence[str | int]]) -> Any:
        """Run a script on a separate connection; its failure is no outage. Raises RedisError, OSError.

        EVAL is tried too: a server that has the script from an earlier start runs it by EVALSHA alone.

        Args:
            commands: sent if the script returns no fault, since a proxy may refuse what the script may run. Only
                refusals that last count.
        """
        multiplexer = ClusterMultiplexer(self.servers, sends=1, events=MultiplexerEvents(greet=self._identify))
        try:
            await multiplexer.execute("EVAL", "return 1", 1, keys[0])
            reply = await multiplexer.evalsha(script, keys, [])
            for command in () if reply else commands:
                try:
                    await multiplexer.execute(*command)
                except ResponseError as error:
                    if remedy(error) is not None:
                        raise
            return reply
        finally:
            self.servers.on_change.remove(multiplexer.leave)
            await multiplexer.close()

    async def ping(self) -> None:
        """Send PING, which is not billed, or in a cluster a command for the owner of our slot. Raises RedisError."""
        if self.servers.clustered:
            await self.commands.exists(self._probe_key)
        else:
            await self.commands.ping()

    async def scan(self, cursor: int, match: str, count: int) -> tuple[int, list[bytes]]:
        """Return the next cursor, 0 at the end, and the keys of one page. Raises ScanRefused, QueueUnavailable."""
        async with self.deadline():
            try:
                cursor, names = await self.commands.scan(cursor, match=match, count=count)
            except RedisError as error:
                if remedy(error) is None:
                    raise
                raise ScanRefused(str(error)) from error
        return cursor, cast(list[bytes], names)

    async def is_reachable(self) -> bool:
        """Return whether Redis answers now, and has not just refused a command of the queue."""
        try:
            async with self.deadline():
                await self.ping()
        except QueueUnavailable:
            return False
        return not self.health.refused

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """Return a context that decodes a reply; it raises QueueUnavailable if that fails."""
        try:
            with decoding():
                yield
        except UnreadableReply as error:
            raise self._to_client_error(error) from error

    def unreadable(self, error: Exception) -> Exception:
        """Return the error for the caller of a command with a reply that can't be decoded."""
        return self._to_client_error(error if isinstance(error, UnreadableReply) else unreadable(error))

    def deadline(self) -> _Deadline:
        """Return a context with one deadline; it raises QueueUnavailable if Redis is unavailable.

        It does so too for a reply that can't be decoded in it.
        """
        return _Deadline(self.servers.deadline_s, self._to_client_error, self.health.succeeded)

    async def learn_time(self) -> None:
        """Set the clock by INFO, which is not billed. Do nothing without an answer, or without the right to INFO."""
        try:
            async with asyncio.timeout(self.servers.deadline_s):
                micros = (await self.commands.info("server")).get("server_time_usec")
        except (RedisError, OSError, TimeoutError):
            return
        if micros is not None:
            self.clock.learn(int(micros) / 1e6)

    async def retry_until_available(self, call: Callable[[*_Args], Awaitable[_Reply]], *args: *_Args) -> _Reply:
        """Repeat an idempotent call until Redis is available."""
        backoff: Backoff | None = None
        while True:
            try:
                return await call(*args)
            except QueueUnavailable:
                backoff = backoff or Backoff(0.05, 1.0)
                await self.health.wait(backoff.next_s())

    async def _identify(self, connection: Any) -> None:
        """Request INFO, which is not billed, and report another server. Do nothing without the right to INFO."""
        await connection.send_command("INFO")
        try:
            server = ServerInfo.parse((await connection.read_response()).decode(errors="replace"))
        except ResponseError:
            return
        if self.servers.sentinel_service is not None and server.role == "slave":
            raise RedisConnectionError("The sentinel named a replica as the master")
        if server.cluster:
            server = replace(server, shard=await self.servers.learn_nodes(connection))
        if server.time is not None:
            self.clock.learn(server.time)
        previous = self.server
        self.server = server if previous is None else server.after(previous)
        if previous is not None and server.run_id != previous.run_id and self._may_reconnect():
            self._reconnect()
        if previous is not None and server.replaces(previous):
            for callback in self.on_new_server:
                callback(previous, server)

    async def _greet(self, connection: Any) -> None:
        """Identify the server of the shared connection, and withdraw what was to be sent to the one before."""
        await self._identify(connection)
        if not self.recovered.is_set():
            self.multiplexer.withdraw()

    def _may_reconnect(self) -> bool:
        """Return whether the last reconnect is a while ago, since an address may lead to two servers in turn."""
        now, last = time.monotonic(), self._reconnected_at
        self._reconnected_at = now
        return now - last > RECONNECT_S

    def _reconnect(self) -> None:
        """Replace all connections: one was silent, or leads to another server, so others may be dead as well.

        Unanswered commands are sent again; a blocked read begins again.
        """
        for multiplexer in (self.multiplexer, self.blocking_reads, *self._rare):
            multiplexer.abort()
        self.subscriptions.hang_up()

    def _to_client_error(self, error: Exception) -> Exception:
        """Return the error to raise to a caller."""
        if not unavailable(error):
            return error
        self.health.failed(error)
        if isinstance(error, UnreadableReply) and self._may_reconnect():  # later replies may be those of others too
            asyncio.get_running_loop().call_soon(self._reconnect)
        refusal = QueueUnavailable(headers={"Retry-After": "2"})
        refusal.__cause__ = error
        return refusal

    async def close(self) -> None:
        for multiplexer in (self.multiplexer, self.blocking_reads, *self._rare):
            await multiplexer.close()
        self.subscriptions.hang_up()
        await self.commands.aclose()
        await self.servers.close()


class _Deadline:
    """Context of calls with one deadline; it raises the error for clients if Redis is unavailable."""

    def __init__(
        self, within_s: float, refusal: Callable[[Exception], Exception], succeeded: Callable[[], None]
    ) -> None:
        self._to_client_error = refusal
        self._succeeded = succeeded
        self._timeout = asyncio.timeout(within_s)

    async def __aenter__(self) -> None:
        await self._timeout.__aenter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self._timeout.__aexit__(kind, error, trace)
        except TimeoutError as late:
            error = late
        if isinstance(error, DECODE_ERRORS):
            error = unreadable(error)
        if error is None:
            self._succeeded()
        elif isinstance(error, RedisError | OSError | TimeoutError):
            client_error = self._to_client_error(error)
            if client_error is not error:
                raise client_error from error


class ServerClock:
    """Callable that returns the Unix time of the server in seconds; this machine's time until a reply had it.

    All instances measure ages and deadlines by it. It runs on the monotonic clock, so a jump of this machine's clock
    changes nothing. It is set by what replies carry anyway: the server's time in INFO, which each new connection begins
    with, and the id of an entry that was just added.

    jumped_at: monotonic time at which a jump of the server's clock was noticed last.
    """

    def __init__(
        self, *, wall: Callable[[], float] = time.time, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._monotonic = monotonic
        self._offset = wall() - monotonic()
        self._is_set = False
        self._jumps: list[tuple[float, float]] = []
        self.jumped_at = -math.inf

    def __call__(self) -> float:
        return self._monotonic() + self._offset

    def learn(self, server_s: float) -> None:
        """Set the clock by the server's Unix time in a reply that came just now, if it is wrong."""
        now = self()
        ahead_s = server_s - now
        if abs(ahead_s) > CLOCK_TOLERANCE_S:
            if self._is_set and abs(ahead_s) > JUMP_S:
                self.jumped_at = time.monotonic()
                self._jumps = [*self._jumps[1 - MAX_JUMPS :], (now, ahead_s)]
            self._offset += ahead_s
        self._is_set = True

    def after_jumps(self, unix_s: float) -> float:
        """Return a time before jumps of the server's clock to the future as it would be after them.

        The age of a task is then what has passed, and not what the clock jumped over.
        """
        shifted_s = unix_s
        for at, ahead_s in self._jumps:
            if shifted_s <= at:
                shifted_s += ahead_s
        return max(unix_s, shifted_s)
