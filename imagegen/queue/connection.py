"""Owns the clients of Redis: their limits, one deadline over each call, and the two log lines of an outage."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any, TypeVar, TypeVarTuple

from loguru import logger
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialWithJitterBackoff
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    BusyLoadingError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from imagegen.errors import QueueUnavailable, SettingsError
from imagegen.metrics import Meter
from imagegen.queue.server_info import ServerInfo
from imagegen.queue.wire import DEADLINE_S, Wire

BLOCK_S = 57.0
"""One blocked read: long, since each is billed; under a minute, since proxies cut idle connections."""

_Answer = TypeVar("_Answer")
_Given = TypeVarTuple("_Given")

_UNUSABLE = ("OOM", "READONLY", "MISCONF", "LOADING", "BUSY", "CLUSTERDOWN", "MASTERDOWN", "TRYAGAIN", "NOREPLICAS")
_UPSTASH_REFUSALS = (
    "capacity quota exceeded",
    "requests limit exceeded",
    "request limit exceeded",
    "max concurrent connections",
)
"""https://upstash.com/docs/redis/troubleshooting: plain ERR replies that mean the plan's end."""


def unavailable(error: BaseException) -> bool:
    """Whether it says that Redis can't be used now, and not that we asked wrongly."""
    if isinstance(error, RedisConnectionError | RedisTimeoutError | OSError | TimeoutError | BusyLoadingError):
        return True
    if isinstance(error, OutOfMemoryError | ReadOnlyError):
        return True
    text = str(error)
    return isinstance(error, ResponseError) and (
        any(f"{word} " in text[:120] or text.startswith(word) for word in _UNUSABLE)
        or any(words in text for words in _UPSTASH_REFUSALS)
    )


class Connection:
    """The ways to one Redis. wire: for what is asked often; reads: for the one blocked read of the stream; commands:
    a client for what is asked seldom; blocking: one for the subscription.

    The scripts can be repeated without harm, so commands are retried twice, quickly; redis-py's own default would
    retry ten times and take seconds. meter: told of each command by whoever sends it.

    server: the server that answered last. on_new_server: called with (known, new) when a new connection leads to
    another server, or to the same one with less data; before anything is sent on it. Callbacks must not raise.

    recovered: set, but not while lost writes are written back; no paid call may begin then.
    """

    def __init__(self, url: str, meter: Meter | None = None) -> None:
        try:
            self.commands = _client(url, size=8, read_timeout_s=None, retries=2, cap_s=0.2)
            self.blocking = _client(url, size=3, read_timeout_s=BLOCK_S + 5.0, retries=0, cap_s=0.2)
        except (ValueError, TypeError, RedisError) as error:
            raise SettingsError(f"REDIS_URL: it can't be used: {error}") from error
        self.health = Health()
        self.recovered = asyncio.Event()
        self.recovered.set()
        self.meter = meter or Meter()
        self.server: ServerInfo | None = None
        self.on_new_server: list[Callable[[ServerInfo, ServerInfo], None]] = []
        pool = self.commands.connection_pool
        self.wire = Wire(pool, greet=self._identify, on_answer=self.health.succeeded, on_failure=self._refusal)
        self.reads = Wire(pool, sends=1, greet=self._identify)

    async def check_settings(self) -> None:
        """Asks once, so that a wrong password stops the start. Raises SettingsError; an unreachable Redis is fine."""
        try:
            async with asyncio.timeout(DEADLINE_S):
                await self.ping()
        except (AuthenticationError, AuthorizationError, NoPermissionError) as error:
            raise SettingsError(f"REDIS_URL, REDIS_TOKEN: Redis refuses the user or password ({error}).") from error
        except ResponseError as error:
            if any(word in str(error) for word in ("WRONGPASS", "NOAUTH", "invalid username-password", "AUTH")):
                raise SettingsError(f"REDIS_URL, REDIS_TOKEN: Redis refuses the user or password ({error}).") from error
            self.health.failed(error)
        except (RedisError, OSError, TimeoutError) as error:
            self.health.failed(error)

    async def ping(self) -> None:
        await self.commands.ping()

    async def answers(self) -> bool:
        """Whether Redis answers now."""
        try:
            async with self.guarded():
                await self.ping()
        except QueueUnavailable:
            return False
        return True

    def guarded(self) -> _Guard:
        """One deadline over what is inside; raises QueueUnavailable where Redis can't be used."""
        return _Guard(self._refusal, self.health.succeeded)

    async def until_back(self, call: Callable[[*_Given], Awaitable[_Answer]], *given: *_Given) -> _Answer:
        """Repeats a call that can be repeated until Redis can be used."""
        delay_s = 0.05
        while True:
            try:
                return await call(*given)
            except QueueUnavailable:
                await self.health.wait(delay_s)
                delay_s = min(delay_s * 2, 1.0)

    async def _identify(self, connection: Any) -> None:
        """Request INFO, which is not billed, and report another server. Without the right to INFO nothing is known."""
        await connection.send_command("INFO")
        try:
            server = ServerInfo.parse((await connection.read_response()).decode(errors="replace"))
        except ResponseError:
            return
        known, self.server = self.server, server
        if known is not None and server.differs_from(known):
            for callback in self.on_new_server:
                callback(known, server)

    def _refusal(self, error: Exception) -> Exception:
        """What a caller is told of an error."""
        if not unavailable(error):
            return error
        self.health.failed(error)
        refusal = QueueUnavailable(headers={"Retry-After": "2"})
        refusal.__cause__ = error
        return refusal

    async def close(self) -> None:
        await self.wire.close()
        await self.reads.close()
        for client in (self.commands, self.blocking):
            await client.aclose()


class _Guard:
    def __init__(self, refusal: Callable[[Exception], Exception], succeeded: Callable[[], None]) -> None:
        self._refusal = refusal
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
            told = self._refusal(error)
            if told is not error:
                raise told from error


class Health:
    """Knows whether Redis can be used: one log line when it goes, one with the downtime when it is back."""

    def __init__(self) -> None:
        self.down_since: float | None = None
        self._back = asyncio.Event()
        self._back.set()

    def failed(self, error: BaseException) -> None:
        if self.down_since is None:
            self.down_since = time.monotonic()
            self._back.clear()
            logger.warning("Redis can't be used: {}", _shown(error))

    def succeeded(self) -> None:
        if self.down_since is not None:
            logger.info("Redis is back after {:.1f} s", time.monotonic() - self.down_since)
            self.down_since = None
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


def _shown(error: BaseException) -> str:
    text = f"{type(error).__name__}: {error}".strip(": ")
    return text.splitlines()[0][:200]


def _client(url: str, *, size: int, read_timeout_s: float | None, retries: int, cap_s: float) -> Redis:
    pool = BlockingConnectionPool.from_url(
        url,
        max_connections=size,
        timeout=DEADLINE_S,
        protocol=2,
        socket_connect_timeout=DEADLINE_S,
        socket_timeout=read_timeout_s,
        health_check_interval=25,
        retry=Retry(ExponentialWithJitterBackoff(base=0.02, cap=cap_s), retries),
    )
    return Redis.from_pool(pool)
