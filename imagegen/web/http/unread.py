"""Bytes of responses that clients have not taken yet, in the buffers of all connections: bounded in sum and in time."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from loguru import logger

STALL_S = 60.0
"""A client that takes nothing for this time is cut off."""

MAX_UNREAD_BYTES = 16 * 1024 * 1024
"""Of all clients together."""

_CHECKS_PER_STALL = 60
"""What a client took is seen at the next check, and a client is cut off two checks early, so that none lasts longer."""


@dataclass(slots=True)
class _Unread:
    address: str
    size_bytes: int
    moved_at_s: float


class UnreadResponses:
    """Registry of connections with unread bytes. One with a client that takes nothing for `stall_s` is cut off.

    Over `max_bytes`, the connection that has waited longest is cut off, of the client that holds most of them.
    """

    def __init__(self, *, max_bytes: int = MAX_UNREAD_BYTES, stall_s: float = STALL_S) -> None:
        self._max_bytes = max_bytes
        self._stall_s = stall_s
        self._held: dict[asyncio.Transport, _Unread] = {}
        self._sum_bytes = 0
        self._check: asyncio.TimerHandle | None = None

    def begin(self, transport: asyncio.Transport, address: str) -> None:
        """Register a connection with bytes that the system did not take at once."""
        size_bytes, loop = transport.get_write_buffer_size(), asyncio.get_running_loop()
        self._held[transport] = _Unread(address, size_bytes, loop.time())
        self._sum_bytes += size_bytes
        if self._sum_bytes > self._max_bytes:
            self._keep_limit(loop.time())
        if self._check is None:
            self._check = loop.call_later(self._stall_s / _CHECKS_PER_STALL, self._check_all)

    def end(self, transport: asyncio.Transport) -> None:
        """Forget a connection: all its bytes were taken, or it is lost."""
        if (unread := self._held.pop(transport, None)) is not None:
            self._sum_bytes -= unread.size_bytes

    def _keep_limit(self, now_s: float) -> None:
        self._measure(now_s)
        by_address: dict[str, int] = {}
        for unread in self._held.values():
            by_address[unread.address] = by_address.get(unread.address, 0) + unread.size_bytes
        while self._sum_bytes > self._max_bytes and len(self._held) > 1:
            most = max(by_address, key=lambda address: by_address[address])
            longest = next(transport for transport, unread in self._held.items() if unread.address == most)
            by_address[most] -= self._held[longest].size_bytes
            self._cut(longest)

    def _measure(self, now_s: float) -> None:
        """Measure what is left in each buffer; a stream adds to its own meanwhile."""
        self._sum_bytes = 0
        for transport, unread in self._held.items():
            size_bytes = transport.get_write_buffer_size()
            if size_bytes < unread.size_bytes:
                unread.moved_at_s = now_s
            unread.size_bytes = size_bytes
            self._sum_bytes += size_bytes

    def _check_all(self) -> None:
        loop = asyncio.get_running_loop()
        now_s = loop.time()
        self._keep_limit(now_s)
        delay_s = self._stall_s / _CHECKS_PER_STALL
        oldest_s = now_s - self._stall_s + 2 * delay_s
        for transport in [held for held, unread in self._held.items() if unread.moved_at_s <= oldest_s]:
            self._cut(transport)
        self._check = loop.call_later(delay_s, self._check_all) if self._held else None

    def _cut(self, transport: asyncio.Transport) -> None:
        self.end(transport)
        logger.debug("A client stopped reading its response: connection closed")
        transport.abort()
