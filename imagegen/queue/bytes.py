"""Owns the bytes of pictures in Redis: parts under keys that expire, and one index that holds them under a cap."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import cast

from imagegen.queue.connection import Connection
from imagegen.queue.keys import Keys
from imagegen.queue.scripts import lua
from imagegen.tasks.image import StoredImage

PART_BYTES = 2 * 1024 * 1024
"""Upstash takes 10 MB a request, and one part has to pass within the deadline of a call. Readers count on this size:
another one would hide the larger pictures that are stored already."""

TAKEN_AT_ONCE = 100
"""In keep.lua."""

SLACK = 16
"""Over the cap, the oldest go until a sixteenth of it is free, so that not every save pays for making room."""


class RedisBytes:
    """IMAGE_STORE=redis. A picture of one part costs four commands to put, one to get, one to ask for.

    max_bytes: of all pictures together; the newest one always stays, also where it is larger.
    """

    def __init__(
        self, connection: Connection, keys: Keys, max_bytes: int, *, clock: Callable[[], float] = time.time
    ) -> None:
        self._connection = connection
        self._keys = keys
        self._max_bytes = max_bytes
        self._clock = clock
        self._spent = partial(connection.meter.spent, "pictures")
        self._index_end_s = 0.0
        self._keep = connection.commands.register_script(lua("keep"))

    async def start(self) -> None:
        """Nothing has to be ready."""

    async def close(self) -> None:
        """The connection is not ours."""

    async def put(self, task_id: str, image: StoredImage, data: bytes, expires_at_s: float) -> None:
        """Keeps it until `expires_at_s` (Unix time), after the oldest made room. Raises QueueUnavailable."""
        name = _name(task_id, image)
        await self._make_room(f"{name}:{len(data)}", len(data), expires_at_s)
        for part, key in enumerate(self._parts(name, len(data))):
            async with self._connection.guarded():
                await self._connection.commands.set(
                    key, data[part * PART_BYTES : (part + 1) * PART_BYTES], pxat=int(expires_at_s * 1000)
                )
            self._spent(1)

    async def get(self, task_id: str, image: StoredImage) -> bytes | None:
        """The bytes, or None where some of them are gone. Raises QueueUnavailable."""
        parts: list[bytes] = []
        for key in self._parts(_name(task_id, image), image.size_bytes):
            async with self._connection.guarded():
                part = cast(bytes | None, await self._connection.commands.get(key))
            self._spent(1)
            if part is None:
                return None
            parts.append(part)
        return b"".join(parts)

    async def holds(self, task_id: str, images: Sequence[StoredImage]) -> bool:
        """Whether every part of each is there; one command. Raises QueueUnavailable."""
        keys = self._all_parts(task_id, images)
        if not keys:
            return True
        async with self._connection.guarded():
            count = await self._connection.commands.exists(*keys)
        self._spent(1)
        return count == len(keys)

    async def extend(self, task_id: str, images: Sequence[StoredImage], expires_at_s: float) -> None:
        """Moves their end; one command a part. Raises QueueUnavailable."""
        keys = self._all_parts(task_id, images)
        async with self._connection.guarded():
            pipeline = self._connection.commands.pipeline(transaction=False)
            for key in keys:
                _ = pipeline.pexpireat(key, int(expires_at_s * 1000))
            await pipeline.execute()
        self._spent(len(keys))

    async def _make_room(self, member: str, size_bytes: int, expires_at_s: float) -> None:
        """Should we die between the two calls, what was to be deleted lives to its end, and is not counted."""
        now = self._clock()
        index_end_s = max(expires_at_s + (expires_at_s - now), self._index_end_s)
        moved = expires_at_s > self._index_end_s
        floor_bytes = self._max_bytes - self._max_bytes // SLACK
        args = (member, size_bytes, now, self._max_bytes, floor_bytes, int(index_end_s * 1000), int(moved))
        async with self._connection.guarded():
            taken = cast(list[bytes], await self._keep(keys=[self._keys.pictures], args=args))
        self._index_end_s = index_end_s if moved else self._index_end_s
        self._spent(3 + moved + (1 + 2 * -(-len(taken) // TAKEN_AT_ONCE) if taken else 0))
        names = [oldest.decode().rpartition(":") for oldest in taken]
        if keys := [key for name, _, size in names for key in self._parts(name, int(size))]:
            async with self._connection.guarded():
                await self._connection.commands.unlink(*keys)
            self._spent(1)

    def _all_parts(self, task_id: str, images: Sequence[StoredImage]) -> list[str]:
        return [key for image in images for key in self._parts(_name(task_id, image), image.size_bytes)]

    def _parts(self, name: str, size_bytes: int) -> Iterator[str]:
        return (self._keys.picture(name, part) for part in range(-(-size_bytes // PART_BYTES)))


def _name(task_id: str, image: StoredImage) -> str:
    return f"{task_id}:{image.index}:{image.sha256[:12]}"
