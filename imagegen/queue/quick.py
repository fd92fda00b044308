"""Owns what is replaced of redis-py's asyncio code because it costs more than all else that is done for a task."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import hiredis
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.connection import AbstractConnection, Connection, SSLConnection, UnixDomainSocketConnection


async def call(client: Redis, *command: str | bytes | float) -> Any:
    """One command, tried once, with its answer as it comes. Raises RedisError."""
    pool: Any = client.connection_pool
    connection = await pool.get_connection()
    try:
        await connection.send_command(*command)
        return await connection.read_response()
    finally:
        await pool.release(connection)


class QuickPool(BlockingConnectionPool):
    """Gives out what is free, and takes it back while nobody waits, without a lock."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._waiting = 0

    @classmethod
    def from_url(cls, url: str, **options: Any) -> QuickPool:
        pool = super().from_url(url, **options)
        pool.connection_class = _QUICK.get(pool.connection_class, pool.connection_class)
        return pool

    async def get_connection(self, *_: Any, **__: Any) -> Any:
        if not self._available_connections:
            return await self._wait_for_connection()
        connection: AbstractConnection = self.get_available_connection()  # type: ignore[no-untyped-call]
        try:
            await self.ensure_connection(connection)
        except BaseException:
            await self.release(connection)
            raise
        return connection

    async def release(self, connection: AbstractConnection) -> None:
        if self._waiting or connection.should_reconnect():  # type: ignore[no-untyped-call]
            await super().release(connection)
        else:
            self._in_use_connections.remove(connection)
            self._available_connections.append(connection)

    async def _wait_for_connection(self) -> Any:
        self._waiting += 1
        try:
            return await super().get_connection()  # type: ignore[no-untyped-call]
        finally:
            self._waiting -= 1


class _Quick(AbstractConnection):
    def pack_command(self, *args: Any) -> list[bytes]:
        """By hiredis. A name of two words, as redis-py gives it, is two arguments."""
        name = args[0]
        if " " in name:
            args = (*name.split(), *args[1:])
        return [hiredis.pack_command(args)]

    async def send_packed_command(self, command: bytes | str | Iterable[bytes], check_health: bool = True) -> None:  # noqa: FBT001, FBT002
        """Without a `wait_for` around each write, which before Python 3.12 loses a cancellation that comes then."""
        limit_s, self.socket_timeout = self.socket_timeout, None
        try:
            await super().send_packed_command(command, check_health)
        finally:
            self.socket_timeout = limit_s


class _Tcp(_Quick, Connection):
    pass


class _Tls(_Quick, SSLConnection):
    pass


class _Unix(_Quick, UnixDomainSocketConnection):
    pass


_QUICK: dict[type[AbstractConnection], type[AbstractConnection]] = {
    Connection: _Tcp,
    SSLConnection: _Tls,
    UnixDomainSocketConnection: _Unix,
}
