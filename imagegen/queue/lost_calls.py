"""Calls that ended without their answer, in Redis, so that another instance recognizes their repeats."""

from __future__ import annotations

import hashlib
from typing import cast

from imagegen.redis_client.connection import Connection
from imagegen.redis_client.keys import Keys

LIFE_S = 600


class LostCalls:
    """Variants of a client's equal calls that ended without an answer. A variant is taken once.

    Nothing is written while one instance alone remembers its calls.
    """

    def __init__(self, connection: Connection, keys: Keys) -> None:
        self._connection = connection
        self._keys = keys

    async def add(self, client: str, request_id: str, variant: int) -> None:
        """Store the variant of a call for `LIFE_S` seconds. Raises QueueUnavailable."""
        name = self._name(client, request_id)
        async with self._connection.deadline():
            await self._connection.commands.zadd(name, {str(variant): variant})
            await self._connection.commands.expire(name, LIFE_S)
        self._connection.meter.redis_commands_sent("idempotency", 2)

    async def take(self, client: str, request_id: str) -> int | None:
        """Remove and return a variant, None if there is none. Raises QueueUnavailable."""
        name = self._name(client, request_id)
        async with self._connection.deadline():
            while variants := cast(list[bytes], await self._connection.commands.zrange(name, 0, 0)):
                taken = await self._connection.commands.zrem(name, variants[0])
                self._connection.meter.redis_commands_sent("idempotency", 2)
                if taken:
                    return int(variants[0])
        self._connection.meter.redis_commands_sent("idempotency", 1)
        return None

    async def remove(self, client: str, request_id: str, variant: int) -> None:
        """Remove a variant that its repeat joined here. Raises QueueUnavailable."""
        async with self._connection.deadline():
            await self._connection.commands.zrem(self._name(client, request_id), str(variant))
        self._connection.meter.redis_commands_sent("idempotency", 1)

    def _name(self, client: str, request_id: str) -> str:
        return self._keys.lost_calls(hashlib.sha256(f"{client}\n{request_id}".encode()).hexdigest()[:32])
