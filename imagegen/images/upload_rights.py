"""Rights to uploads if each API key has its own: the SHA-256 of an image alone must not give access to it."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import blake2s
from typing import cast

from imagegen.redis_client.connection import Connection
from imagegen.redis_client.keys import Keys
from imagegen.redis_client.redis_errors import ResponseError, wrong_type, wrong_type_ignored

MAX_KNOWN = 10_000
"""Rights in memory."""


class UploadRights:
    """Rights of keys to the images that they sent. All methods raise QueueUnavailable.

    A right costs one command to give and to read. clock: Unix time.
    """

    def __init__(self, connection: Connection, keys: Keys, clock: Callable[[], float]) -> None:
        self._connection = connection
        self._keys = keys
        self._clock = clock
        self._cached: dict[str, float] = {}

    async def give(self, sha256: str, scope: str, until: float) -> bool:
        """Let the key of a scope use an image until a Unix time. Return whether it could not before."""
        name = self._name(sha256, scope)
        until_ms = int(until * 1000)
        try:
            before = await self._connection.multiplexer.execute("SET", name, until_ms, "GET", "PXAT", until_ms)
        except ResponseError as error:
            if not wrong_type(error):
                raise
            before = None
            await self._connection.multiplexer.execute("SET", name, until_ms, "PXAT", until_ms)
        self._connection.meter.redis_commands_sent("pictures", 1)
        self._remember(name, until)
        return before is None

    async def has(self, sha256: str, scope: str) -> bool:
        """Return whether the key of a scope may use an image."""
        name = self._name(sha256, scope)
        if self._cached.get(name, 0.0) > self._clock():
            return True
        until_ms: bytes | None = None
        with wrong_type_ignored():
            until_ms = cast(bytes | None, await self._connection.multiplexer.execute("GET", name))
        self._connection.meter.redis_commands_sent("pictures", 1)
        until = int(until_ms) / 1000 if until_ms and until_ms.isdigit() else 0.0  # else it is a foreign value
        self._remember(name, until)
        return until > self._clock()

    def _remember(self, name: str, until: float) -> None:
        self._cached.pop(name, None)
        if len(self._cached) >= MAX_KNOWN:
            del self._cached[next(iter(self._cached))]
        self._cached[name] = until

    def _name(self, sha256: str, scope: str) -> str:
        return self._keys.upload_right(sha256, blake2s(scope.encode(), digest_size=16).hexdigest())
