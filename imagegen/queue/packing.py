"""Owns how commands become bytes: by hiredis, in a tenth of the time that redis-py's own asyncio code takes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from redis.asyncio.connection import AbstractConnection, Connection, SSLConnection, UnixDomainSocketConnection
from redis.connection import HiredisRespSerializer

_pack = HiredisRespSerializer().pack


class _Packing(AbstractConnection):
    def pack_command(self, *args: Any) -> list[bytes]:
        packed: list[bytes] = _pack(*args)
        return packed

    async def send_packed_command(self, command: bytes | str | Iterable[bytes], check_health: bool = True) -> None:  # noqa: FBT001, FBT002
        """Without a `wait_for` around each write, which before Python 3.12 loses a cancellation that comes then."""
        limit_s, self.socket_timeout = self.socket_timeout, None
        try:
            await super().send_packed_command(command, check_health)
        finally:
            self.socket_timeout = limit_s


class _Tcp(_Packing, Connection):
    pass


class _Tls(_Packing, SSLConnection):
    pass


class _Unix(_Packing, UnixDomainSocketConnection):
    pass


_QUICK: dict[type[AbstractConnection], type[AbstractConnection]] = {
    Connection: _Tcp,
    SSLConnection: _Tls,
    UnixDomainSocketConnection: _Unix,
}


def quick(kind: type[AbstractConnection]) -> type[AbstractConnection]:
    """The same kind of connection, packing quickly."""
    return _QUICK.get(kind, kind)
