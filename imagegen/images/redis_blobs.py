"""Bytes of images in Redis: parts under keys that expire, and one index that holds them under a cap."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Coroutine, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import cast

from msgspec.structs import replace

from imagegen.errors import StoreUnavailable
from imagegen.images.needed_uploads import FindNeeded, is_upload, nothing_needed
from imagegen.images.store import READ_S, StoreFull, file_threads
from imagegen.redis_client.connection import Connection
from imagegen.redis_client.keys import Keys
from imagegen.redis_client.lua import load_script
from imagegen.redis_client.redis_errors import OutOfMemoryError, ResponseError, unavailable, wrong_type
from imagegen.tasks.image import StoredImage

PART_BYTES = 2 * 1024 * 1024
"""Upstash takes 10 MB a request, and one part has to pass within the deadline of a call. Readers count on this size:
another one would hide the larger images that are stored already."""

PROBE_LIFE_MS = 10_000

EVICT_BATCH = 100
"""In reserve.lua."""

EVICT_TO_FRACTION = 16
"""Over the cap, the oldest go until a sixteenth of it is free, so that not every save pays for evictions."""


class RedisBlobStore:
    """IMAGE_STORE=redis. An image of one part costs four commands to put, one to get, one to check.

    max_bytes: of all images together; the newest one always stays, also if it is larger.
    find_needed: returns the uploads that stay though they are the oldest.
    """

    def __init__(
        self,
        connection: Connection,
        keys: Keys,
        max_bytes: int,
        *,
        clock: Callable[[], float] = time.time,
        find_needed: FindNeeded = nothing_needed,
    ) -> None:
        self._connection = connection
        self._keys = keys
        self._max_bytes = max_bytes
        self._clock = clock
        self._find_needed = find_needed
        self._spent = partial(connection.meter.redis_commands_sent, "pictures")
        self._index_end_s = 0.0
        self._reserve = load_script(__package__, "reserve")
        self._put_back = load_script(__package__, "put_back")
        self._copy_parts = load_script(__package__, "copy_parts")

    @property
    def loops(self) -> Mapping[str, Callable[[], Coroutine[None, None, None]]]:
        """None: the keys expire by themselves."""
        return {}

    async def start(self) -> None:
        """Do nothing: the store needs no preparation."""

    async def close(self) -> None:
        """Do nothing: the connection belongs to the queue."""

    async def put(self, task_id: str, image: StoredImage, source: bytes | Path, expires_at_s: float) -> None:
        """Save the bytes, or those of a file, until `expires_at_s` (Unix time), after evicting the oldest.

        Raises: QueueUnavailable; StoreUnavailable if Redis has no memory for it or the file can't be read.
        """
        name, size_bytes = _name(task_id, image), image.size_bytes
        await self._make_space(f"{name}:{size_bytes}", size_bytes, expires_at_s)
        for part, key in enumerate(self._parts(name, size_bytes)):
            data = await _part_of(source, part)
            async with self._connection.deadline(), _refusal_checked():
                await self._connection.commands.set(key, data, pxat=int(expires_at_s * 1000))
            self._spent(1)

    async def reuse(self, source_id: str, image: StoredImage, task_id: str, index: int, expires_at_s: float) -> bool:
        """Copy the parts under another name, then count them: two commands a part, and four.

        Where Redis may not copy, they are read and written, since the image would be paid again otherwise. Return False
        if a part is gone. Raises QueueUnavailable, StoreUnavailable.
        """
        source, target, size_bytes = (
            _name(source_id, image),
            _name(task_id, replace(image, index=index)),
            image.size_bytes,
        )
        parts = list(zip(self._parts(source, size_bytes), self._parts(target, size_bytes), strict=True))
        keys, ends_at_ms = [key for part in parts for key in part], int(expires_at_s * 1000)
        async with self._connection.deadline():
            is_copied = await self._connection.commands.run_script(self._copy_parts, keys, [ends_at_ms])
        self._spent(1 + 2 * len(parts))
        if is_copied < 0:
            is_copied = await self._rewrite(parts, ends_at_ms)
        if not is_copied:
            return False
        await self._make_space(f"{target}:{size_bytes}", size_bytes, expires_at_s)
        return True

    async def _rewrite(self, parts: Sequence[tuple[str, str]], ends_at_ms: int) -> bool:
        """Read each part and write it under another key. Return False if one is gone."""
        for source, target in parts:
            if (data := await self._part(source)) is None:
                return False
            async with self._connection.deadline(), _refusal_checked():
                await self._connection.commands.set(target, data, pxat=ends_at_ms)
            self._spent(1)
        return True

    async def get(self, task_id: str, image: StoredImage, offset: int, length: int) -> AsyncGenerator[bytes, None]:
        """Yield the bytes from `offset` in pieces: fewer than `length` if a part is gone. Raises QueueUnavailable."""
        keys = list(self._parts(_name(task_id, image), image.size_bytes))
        end = offset + length
        for number in range(offset // PART_BYTES, -(-end // PART_BYTES)):
            part = await self._part(keys[number])
            if part is None:
                return
            start = number * PART_BYTES
            yield part[max(offset - start, 0) : end - start] if start < offset or end < start + len(part) else part

    async def _part(self, key: str) -> bytes | None:
        """Return a part; None if it is gone, or of another type. Raises QueueUnavailable."""
        self._spent(1)
        try:
            async with self._connection.deadline():
                return cast(bytes | None, await self._connection.commands.get(key))
        except ResponseError as error:
            if not wrong_type(error):
                raise
            return None

    async def probe(self, size_bytes: int) -> None:
        """Write a value as large as a part of such an image, and delete it.

        Raises QueueUnavailable, StoreUnavailable.
        """
        key, value = self._keys.image_part("probe", 0), bytes(max(min(size_bytes, PART_BYTES), 1))
        async with self._connection.deadline(), _refusal_checked():
            await self._connection.commands.set(key, value, px=PROBE_LIFE_MS)
            await self._connection.commands.unlink(key)
        self._spent(2)

    async def contains_all(self, task_id: str, images: Sequence[StoredImage]) -> bool:
        """Return whether every part of each is there; one command. Raises QueueUnavailable."""
        keys = self._all_parts(task_id, images)
        if not keys:
            return True
        async with self._connection.deadline():
            count = await self._connection.commands.exists(*keys)
        self._spent(1)
        return count == len(keys)

    async def extend_expiry(self, task_id: str, images: Sequence[StoredImage], expires_at_s: float) -> None:
        """Set when the parts expire; one command a part. Raises QueueUnavailable."""
        keys = self._all_parts(task_id, images)
        async with self._connection.deadline():
            pipeline = self._connection.commands.pipeline(transaction=False)
            for key in keys:
                _ = pipeline.pexpireat(key, int(expires_at_s * 1000))
            await pipeline.execute()
        self._spent(len(keys))

    async def _make_space(self, member: str, size_bytes: int, expires_at_s: float) -> None:
        """Count an image, and delete the oldest; needed uploads stay.

        Should we die between the calls, the images to delete live to their end, and are not counted.

        Raises: StoreFull for an upload, if needed uploads leave no space.
        """
        gone, stayed, total, again = list[str](), set[str](), 0, False
        while True:
            taken = await self._take_oldest(member, size_bytes, expires_at_s, again=again)
            stay = await self._needed(taken)
            gone += [oldest for oldest in taken if oldest not in stay]
            if not stay:
                total = 0  # it fits
                break
            total = await self._put_back_needed(stay)
            if total <= self._max_bytes or stay <= stayed:
                break
            stayed, again = stayed | stay, True
        await self._delete(gone)
        if total > self._max_bytes and is_upload(_task_of(member)):
            await self._uncount(member, size_bytes)
            raise StoreFull

    async def _take_oldest(self, member: str, size_bytes: int, expires_at_s: float, *, again: bool) -> list[str]:
        """Count an image, unless it is counted; take the oldest off the index until it fits, and return them."""
        now, index = self._clock(), self._keys.image_index
        index_end_s = max(expires_at_s + (expires_at_s - now), self._index_end_s)
        moved = expires_at_s > self._index_end_s
        floor_bytes = self._max_bytes - self._max_bytes // EVICT_TO_FRACTION
        args = (member, size_bytes, now, self._max_bytes, floor_bytes, int(index_end_s * 1000), int(moved), int(again))
        async with self._connection.deadline(), _refusal_checked():
            reply = await self._connection.commands.run_script(self._reserve, [index, f"{index}:aside"], args)
            taken = [oldest.decode(errors="replace") for oldest in reply]
        self._index_end_s = index_end_s if moved else self._index_end_s
        self._spent(3 + moved + (1 + 2 * -(-len(taken) // EVICT_BATCH) if taken else 0))
        return taken

    async def _needed(self, members: Sequence[str]) -> set[str]:
        """Return those members of the index that are uploads which unfinished tasks need."""
        uploads = set(filter(is_upload, map(_task_of, members)))
        needed = await self._find_needed(uploads) if uploads else ()
        return {member for member in members if _task_of(member) in needed}

    async def _put_back_needed(self, members: Collection[str]) -> int:
        """Put members back into the index, as the newest; return its total bytes."""
        index, now = self._keys.image_index, self._clock()
        async with self._connection.deadline(), _refusal_checked():
            total = int(await self._connection.commands.run_script(self._put_back, [index], [now, *members]))
        self._spent(3)
        return total

    async def _uncount(self, member: str, size_bytes: int) -> None:
        async with self._connection.deadline():
            await self._connection.commands.zrem(self._keys.image_index, member)
            await self._connection.commands.zincrby(self._keys.image_index, size_bytes, "total")
        self._spent(2)

    async def _delete(self, members: Sequence[str]) -> None:
        names = [member.rpartition(":") for member in members]
        if keys := [key for name, _, size in names for key in self._parts(name, int(size))]:
            async with self._connection.deadline():
                await self._connection.commands.unlink(*keys)
            self._spent(1)

    def _all_parts(self, task_id: str, images: Sequence[StoredImage]) -> list[str]:
        return [key for image in images for key in self._parts(_name(task_id, image), image.size_bytes)]

    def _parts(self, name: str, size_bytes: int) -> Iterator[str]:
        return (self._keys.image_part(name, part) for part in range(-(-size_bytes // PART_BYTES)))


async def _part_of(source: bytes | Path, part: int) -> bytes:
    """Return one part of the bytes or of a file. Raises StoreUnavailable."""
    if isinstance(source, bytes):
        return source[part * PART_BYTES : (part + 1) * PART_BYTES]
    try:
        return await file_threads.run_within(READ_S, _read, source, part * PART_BYTES)
    except OSError as error:
        raise StoreUnavailable from error


def _read(path: Path, offset: int) -> bytes:
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        return file.read(PART_BYTES)


@asynccontextmanager
async def _refusal_checked() -> AsyncIterator[None]:
    """Raise StoreUnavailable if Redis refuses a write, such as without memory left: it answers, so it is not away."""
    try:
        yield
    except ResponseError as error:
        is_full = "OOM " in str(error)[:120] or isinstance(error, OutOfMemoryError)
        if not is_full and unavailable(error):
            raise
        raise StoreUnavailable from error


def _task_of(member: str) -> str:
    return member.partition(":")[0]


def _name(task_id: str, image: StoredImage) -> str:
    return f"{task_id}:{image.index}:{image.sha256[:12]}"
