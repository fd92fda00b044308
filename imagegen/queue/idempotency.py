"""Idempotency keys: the task that a client's key was first used for, in one plain command."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import cast

from imagegen.errors import IdempotencyMismatch, QueueUnavailable
from imagegen.queue.unreadable import Unreadable
from imagegen.redis_client.connection import Connection
from imagegen.redis_client.keys import Keys
from imagegen.redis_client.multiplexer import Batcher, CommandBatch
from imagegen.redis_client.redis_errors import ResponseError, wrong_type

KEY_LIFE_S = 86_400


class IdempotencyKeys:
    """Keys in Redis. A value is the task's id, a digest of the body, and a random token of the writer."""

    def __init__(self, connection: Connection, keys: Keys) -> None:
        self._connection = connection
        self._keys = keys
        self._unreadable = Unreadable(connection.meter)
        self._in_progress: dict[str, asyncio.Event] = {}
        self._claim = Batcher[tuple[str, bytes], bytes | None](connection.multiplexer, self._encode, self._decode)

    @asynccontextmanager
    async def first_use_or_existing(
        self, client: str, key: str, task_id: str, body_digest: str
    ) -> AsyncIterator[str | None]:
        """Yield None for the first use of a key, else the task id of the first use.

        A first use that fails does not count; a repeat at the same moment waits for it. Raises QueueUnavailable, and
        IdempotencyMismatch if the key was used with another body.
        """
        name = self._keys.idempotency(hashlib.sha256(f"{client}\n{key}".encode()).hexdigest()[:32])
        value = f"{task_id} {body_digest} {secrets.token_hex(4)}".encode()
        stored = await self._claimed(name, value)
        if stored is None:
            async with self._first_use(name):
                yield None
            return
        first_id, first_digest = stored
        if first_digest != body_digest:
            raise IdempotencyMismatch
        if in_progress := self._in_progress.get(name):
            await in_progress.wait()
        yield first_id

    async def _claimed(self, name: str, value: bytes) -> tuple[str, str] | None:
        """Return task id and body digest of the first use, None if that is this one.

        A value that another program wrote is replaced.
        """
        try:
            stored = await self._claim((name, value))
        except ResponseError as error:
            if not wrong_type(error):
                raise
            stored = await self._replaced_if_foreign(name, value)
        if stored is None or stored == value:
            return None
        if (first := _parse(stored)) is not None:
            return first
        self._unreadable.report("idempotency key", name, stored)
        await self._replace(name, value)
        return None

    async def _replaced_if_foreign(self, name: str, value: bytes) -> bytes | None:
        """Claim a key alone, after an error of the batch that may be another key's."""
        self._connection.meter.redis_commands_sent("idempotency", 1)
        try:
            async with self._connection.deadline():
                commands, life_ms = self._connection.commands, KEY_LIFE_S * 1000
                return cast(bytes | None, await commands.set(name, value, nx=True, get=True, px=life_ms))
        except ResponseError as error:
            if not wrong_type(error):
                raise
        self._unreadable.report("idempotency key", name, "of another type")
        await self._replace(name, value)
        return None

    async def _replace(self, name: str, value: bytes) -> None:
        async with self._connection.deadline():
            await self._connection.commands.set(name, value, px=KEY_LIFE_S * 1000)
        self._connection.meter.redis_commands_sent("idempotency", 1)

    @asynccontextmanager
    async def _first_use(self, name: str) -> AsyncIterator[None]:
        self._in_progress[name] = done = asyncio.Event()
        try:
            yield
        except BaseException:
            with suppress(QueueUnavailable):
                async with self._connection.deadline():
                    await self._connection.commands.delete(name)
                    self._connection.meter.redis_commands_sent("idempotency", 1)
            raise
        finally:
            del self._in_progress[name]
            done.set()

    def _encode(self, items: list[tuple[str, bytes]]) -> CommandBatch:
        return CommandBatch([("SET", name, value, "NX", "GET", "PX", KEY_LIFE_S * 1000) for name, value in items])

    def _decode(self, items: list[tuple[str, bytes]], replies: list[bytes | None]) -> list[bytes | None]:
        self._connection.meter.redis_commands_sent("idempotency", len(items))
        return replies


def _parse(stored: bytes) -> tuple[str, str] | None:
    """Return task id and body digest of a stored value, None if it is not one of ours."""
    parts = stored.split(b" ")
    return (parts[0].decode(), parts[1].decode()) if len(parts) == 3 and stored.isascii() else None
