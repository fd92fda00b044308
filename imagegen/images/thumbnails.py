"""Thumbnails of stored images: each is made once for all instances, and kept in the image store like an image.

A thumbnail has the task and the index of its image, so it expires and counts under the store's cap as that does. Its
record in Redis describes its bytes; while it is made, the record is a claim of the instance that makes it.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing, suppress
from operator import itemgetter
from typing import BinaryIO, TypeVar, cast

import msgspec
from loguru import logger
from msgspec import Struct

from imagegen.errors import FieldError, QueueUnavailable, StoreUnavailable, UnsupportedImage
from imagegen.images.shrink import NoThumbnail, NoThumbnailNow, shrink
from imagegen.images.store import ImageStore, OpenedImage, VerifiedImage
from imagegen.images.threads import WorkThreads
from imagegen.redis_client.connection import Connection
from imagegen.redis_client.keys import Keys
from imagegen.redis_client.redis_errors import wrong_type_ignored
from imagegen.tasks.image import StoredImage
from imagegen.turn_queue import TurnQueue

_V = TypeVar("_V")

SIZES = (64, 128, 256, 512)
"""Pixels on the longer side."""

CLAIM_S = 20.0
"""Longest time for one thumbnail: then another instance may make it, since this one may have died."""

POLL_S = 0.1
"""How often an instance looks whether another one has made the thumbnail."""

MAX_KNOWN = 10_000
"""Records, and unusable images, in memory."""

_CLAIM = b"making"
_OTHER_TYPE = b""
"""In place of the value of a key of another type, which is replaced as any foreign value."""

_in_thread = WorkThreads(1, "thumbnails").run
"""Make thumbnails in one thread: each may take 256 MiB."""


OLDEST_EACH = 4
"""Of the thumbnails that wait, each fourth one made is the one that waits longest, the others are the quickest."""


class ThumbnailLine:
    """Line for the thread that makes thumbnails: one of 50 megapixels takes a second, and a small one 10 ms."""

    def __init__(self) -> None:
        self._is_busy = False
        self._given = 0
        self._waiting: list[tuple[int, asyncio.Future[None]]] = []

    def __len__(self) -> int:
        return len(self._waiting)

    @asynccontextmanager
    async def turn(self, pixels: int) -> AsyncIterator[None]:
        """Wait for the turn of an image of so many pixels, which ends with the context."""
        if self._is_busy:
            await self._wait(pixels)
        self._is_busy = True
        try:
            yield
        finally:
            self._give_turn()

    async def _wait(self, pixels: int) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((pixels, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # it had the turn
                self._give_turn()
            raise

    def _give_turn(self) -> None:
        self._waiting = [waiter for waiter in self._waiting if not waiter[1].done()]
        self._is_busy = bool(self._waiting)
        if self._waiting:
            self._given += 1
            first = self._waiting[0] if self._given % OLDEST_EACH == 0 else min(self._waiting, key=itemgetter(0))
            self._waiting.remove(first)
            first[1].set_result(None)


class ThumbnailSpec(Struct, frozen=True):
    """A thumbnail of one size of one image.

    size: one of SIZES. expires_at: when the image's task expires, Unix time; None while it is unfinished.
    """

    task_id: str
    image: StoredImage
    size: int
    expires_at: float | None

    @property
    def name(self) -> str:
        """The thumbnail's name in Redis; another image at the same place has another one."""
        return f"{self.task_id}:{self.image.index}:{self.image.sha256[:12]}:{self.size}"


class _Made(Struct, frozen=True):
    """A thumbnail's record, and its bytes if they were just made."""

    record: StoredImage
    data: bytes | None = None


class Thumbnails:
    """Thumbnails of all instances. While Redis is away, each instance makes its own.

    line: of those that are to be made here. life_s: how long a thumbnail of an unfinished task is kept.
    """

    def __init__(
        self,
        store: ImageStore,
        connection: Connection,
        keys: Keys,
        *,
        life_s: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._connection = connection
        self._keys = keys
        self._life_s = life_s
        self._clock = clock
        self._records: dict[str, StoredImage] = {}
        self._unusable: dict[str, None] = {}
        self._finding: dict[str, asyncio.Task[_Made | None]] = {}
        self.line = ThumbnailLine()
        self._turns = TurnQueue()

    async def open(self, spec: ThumbnailSpec) -> tuple[StoredImage, OpenedImage] | None:
        """Return a thumbnail with its bytes, made now if there is none; None if the image is gone.

        Raises: StoreUnavailable; UnsupportedImage if the image can't be decoded.
        """
        gone = None
        for _ in range(2):
            cached = self._records.get(spec.name)
            made = _Made(cached) if cached is not None else await self._find(spec, gone)
            if made is None:
                return None
            if made.data is not None:
                return made.record, OpenedImage(made.record.size_bytes, made.data)
            if opened := await self._store.open(spec.task_id, made.record):
                return made.record, opened
            gone = self._records.pop(spec.name, made.record)
        raise StoreUnavailable

    async def _find(self, spec: ThumbnailSpec, gone: StoredImage | None) -> _Made | None:
        """Find or make a thumbnail once for all who wait for it. gone: a record that has lost its bytes."""
        finding = self._finding.get(spec.name)
        if finding is None:
            finding = self._finding[spec.name] = asyncio.create_task(self._find_or_make(spec, gone))
            finding.add_done_callback(lambda done: self._found(spec.name, done))
        return await self._turns.result_of(finding)

    async def close(self) -> None:
        """Stop making thumbnails and withdraw their claims, so that other instances need not wait for them to end."""
        making = list(self._finding.values())
        for task in making:
            task.cancel()
        await asyncio.gather(*making, return_exceptions=True)

    def _found(self, name: str, done: asyncio.Task[_Made | None]) -> None:
        self._finding.pop(name, None)
        if not done.cancelled() and done.exception() is None and (made := done.result()):
            _put(self._records, name, made.record)

    async def _find_or_make(self, spec: ThumbnailSpec, gone: StoredImage | None) -> _Made | None:
        if spec.name in self._unusable:
            raise _unusable()
        try:
            if record := await self._claim(spec.name, gone):
                return _Made(record)
        except QueueUnavailable:
            return await self._make(spec)
        made = None
        try:
            made = await self._make(spec)
        finally:
            with suppress(QueueUnavailable):
                await self._write(spec, None if made is None else made.record)
        return made

    async def _claim(self, name: str, gone: StoredImage | None) -> StoredImage | None:
        """Return the record of a thumbnail; None once this instance has to make it. Raises QueueUnavailable."""
        key, life_ms = self._keys.thumbnail(name), int(CLAIM_S * 1000)
        while True:
            stored: bytes | None = _OTHER_TYPE
            with wrong_type_ignored():
                async with self._connection.deadline():
                    stored = cast(
                        bytes | None,
                        await self._connection.commands.set(key, _CLAIM, px=life_ms, nx=True, get=True),
                    )
            self._count(1)
            if stored is None:
                return None
            if stored != _CLAIM:
                record = _parse(stored)
                if record is not None and record != gone:
                    return record
                async with self._connection.deadline():
                    await self._connection.commands.set(key, _CLAIM, px=life_ms)
                self._count(1)
                return None
            await asyncio.sleep(POLL_S)

    async def _write(self, spec: ThumbnailSpec, record: StoredImage | None) -> None:
        """Replace the claim by the record; by nothing if there is none. Raises QueueUnavailable."""
        key = self._keys.thumbnail(spec.name)
        async with self._connection.deadline():
            if record is None:
                await self._connection.commands.unlink(key)
            else:
                end_ms = int(self._expires_at(spec) * 1000)
                await self._connection.commands.set(key, msgspec.json.encode(record), pxat=end_ms)
        self._count(1)

    async def _make(self, spec: ThumbnailSpec) -> _Made | None:
        """Make and save a thumbnail; None if the image is gone. Raises StoreUnavailable, UnsupportedImage."""
        async with self.line.turn(spec.image.width * spec.image.height):
            opened = await self._store.open(spec.task_id, spec.image)
            if opened is None:
                return None
            with closing(opened):
                source = opened.file or await opened.read_all()
                try:
                    data, width, height = await _in_thread(shrink, cast(BinaryIO, source), spec.size)
                except NoThumbnail as error:
                    logger.info("No thumbnail can be made of an image: {}", error)
                    _put(self._unusable, spec.name, None)
                    raise _unusable() from error
                except NoThumbnailNow as error:
                    logger.warning("No thumbnail can be made now: {}", error)
                    raise StoreUnavailable from error
        self._connection.meter.thumbnails += 1
        sha256 = hashlib.sha256(data).hexdigest()
        image = VerifiedImage("image/webp", len(data), width, height, sha256, data)
        await self._save(spec, image)
        return _Made(image.stored_at(spec.image.index, store_id=self._store.store_id), data)

    async def _save(self, spec: ThumbnailSpec, image: VerifiedImage) -> None:
        """Save a thumbnail if the store can take it; else it is made again when it is requested next."""
        if self._store.health.writable:
            with suppress(StoreUnavailable):
                await self._store.save(spec.task_id, spec.image.index, image, self._expires_at(spec))

    def _expires_at(self, spec: ThumbnailSpec) -> float:
        return self._clock() + self._life_s if spec.expires_at is None else spec.expires_at

    def _count(self, commands: int) -> None:
        self._connection.meter.redis_commands_sent("pictures", commands)


def _unusable() -> UnsupportedImage:
    return UnsupportedImage(details=[FieldError("size", "no thumbnail can be made of this image: request it whole")])


def _put(values: dict[str, _V], name: str, value: _V) -> None:
    """Add to a bounded dictionary; the oldest goes first."""
    if len(values) >= MAX_KNOWN:
        del values[next(iter(values))]
    values[name] = value


def _parse(written: bytes) -> StoredImage | None:
    try:
        return msgspec.json.decode(written, type=StoredImage)
    except (msgspec.MsgspecError, ValueError):
        return None
