"""Input images that clients upload: kept in the image store under the SHA-256 of their bytes.

In the store an upload is image 0 of a task with the SHA-256 as its id, so it counts under the store's cap like any
image. Its record is in Redis, for all instances.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Iterable
from contextlib import suppress
from typing import Self
from weakref import WeakValueDictionary

from msgspec import Struct
from msgspec.structs import replace

from imagegen.byte_budget import ByteBudget
from imagegen.errors import (
    BodyTooLarge,
    FieldError,
    ImageTooLarge,
    StoreUnavailable,
    UnsupportedImage,
    UploadNotFound,
)
from imagegen.images.needed_uploads import NeededUploads
from imagegen.images.sniff import NotAnImage, TooManyPixels
from imagegen.images.spool import ImageSink, Spool
from imagegen.images.store import ImageStore, OpenedImage, VerifiedImage, file_threads
from imagegen.images.upload_records import UploadRecord, UploadRecords
from imagegen.images.upload_rights import UploadRights
from imagegen.tasks.image import StoredImage
from imagegen.tasks.request import UPLOAD_PATTERN, UPLOAD_PREFIX

FILE_FIELD = "file"
"""The field that an error names if the request has no other."""

CHECKED_BYTES = 256 * 1024
"""Bytes that are checked and written at once."""

MEMORY_BYTES = 32 * 1024 * 1024
"""Of uploads that are held in memory, as the disk can't take them."""

STORED_LONGER_S = 60.0
"""The store keeps an image beyond its record's end: an upload that was found can be opened."""

NEED_STEP_S = 600.0
"""A need is recorded for longer by this, so that many tasks with one image write it once."""

_ID = re.compile(UPLOAD_PATTERN)
_MARKUP = re.compile(rb"<(?:script|html|iframe|body)[\s>/]|<(?:!doctype|\?php)\s", re.IGNORECASE)
_MARKUP_BYTES = 16
"""Of the longest match."""


def upload_id_of(image: VerifiedImage | StoredImage) -> str:
    """Return the id of an image as an upload."""
    return f"{UPLOAD_PREFIX}{image.sha256}"


class Upload(Struct, frozen=True):
    """An uploaded image. id: `upload:` and its SHA-256; expires_at: Unix time, no new task may use it from then on."""

    id: str
    content_type: str
    size_bytes: int
    width: int
    height: int
    expires_at: float

    @classmethod
    def of(cls, record: UploadRecord) -> Self:
        image = record.image
        return cls(
            upload_id_of(image),
            image.content_type,
            image.size_bytes,
            image.width,
            image.height,
            record.expires_at,
        )


class Uploads:
    """Uploads of all instances. Methods raise QueueUnavailable, StoreUnavailable.

    A scope is the name of a key that has its own uploads. An image of several such keys is stored once.

    Args:
        rights: of API keys that have their own uploads.
        needed: shared with the store.
        life_s: how long an upload lives after it was saved last.
        max_bytes: of one upload.
    """

    def __init__(
        self,
        store: ImageStore,
        records: UploadRecords,
        rights: UploadRights,
        needed: NeededUploads,
        *,
        life_s: float,
        max_bytes: int,
    ) -> None:
        self.max_bytes = max_bytes
        self._store = store
        self._spool = Spool(store, ByteBudget(MEMORY_BYTES))
        self._needed = needed
        self._records = records
        self._rights = rights
        self._life_s = life_s
        self._clock = records.clock
        self._saving: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def save(
        self, chunks: AsyncIterator[bytes], max_bytes: int | None = None, *, scope: str | None = None
    ) -> tuple[Upload, bool]:
        """Save an image that comes in pieces; return it, and whether it is new. An upload that exists lives longer.

        Raises as `receive` and `store`.
        """
        image = await self.receive(chunks, max_bytes)
        try:
            return await self.store(image, scope)
        finally:
            self.discard(image)

    async def receive(self, chunks: AsyncIterator[bytes], max_bytes: int | None = None) -> VerifiedImage:
        """Check and spool an image that comes in pieces; the caller stores or discards it.

        What follows the end of the image is dropped.

        Raises: UnsupportedImage, ImageTooLarge, BodyTooLarge; StoreUnavailable if nothing can be stored now.
        """
        if not self._store.health.writable:
            raise StoreUnavailable
        try:
            return await self._receive(chunks, self.max_bytes if max_bytes is None else max_bytes)
        except NotAnImage as error:
            raise _refusal(error) from error

    async def store(self, image: VerifiedImage, scope: str | None = None) -> tuple[Upload, bool]:
        """Store an image that was received, or let it live longer. Discard it afterwards."""
        async with self._saving.setdefault(image.sha256, asyncio.Lock()):
            upload, is_new = await self._store_image(image)
        if scope is not None:
            is_new = await self._rights.give(image.sha256, scope, upload.expires_at)
        return upload, is_new

    def discard(self, image: VerifiedImage) -> None:
        """Forget an image that was received."""
        self._spool.discard(image)

    async def find(self, upload_id: str, scope: str | None = None) -> Upload | None:
        """Return an upload; None if it is unknown or expired, its bytes are gone, or another key's in a scope."""
        record = await self._record(upload_id)
        if record is None or record.expires_at <= self._clock() or not await self._is_stored(record):
            return None
        if scope is not None and not await self._rights.has(record.image.sha256, scope):
            return None
        return Upload.of(record)

    async def open(self, upload_id: str) -> OpenedImage | None:
        """Open an upload for reading, also after its expiry if a task needs it; None if its bytes are gone."""
        record = await self._record(upload_id)
        return None if record is None else await self._store.open(record.image.sha256, record.image)

    async def describe(self, upload_id: str) -> Upload | None:
        """Return an upload, also after its expiry if a task needs it; None if its bytes are gone."""
        record = await self._record(upload_id)
        return Upload.of(record) if record is not None and await self._is_stored(record) else None

    async def keep(self, upload_ids: Iterable[str], until: float) -> None:
        """Keep uploads until a Unix time, also beyond their expiry."""
        for upload_id in upload_ids:
            record = await self._record(upload_id)
            if record is None:
                continue
            self._needed.note(record.image.sha256)
            if record.needed_until >= until:
                continue
            needed = replace(record, needed_until=until + NEED_STEP_S)
            if needed.ends_at > record.ends_at:
                await self._extend(needed)
            await self._records.write(needed)

    async def _receive(self, chunks: AsyncIterator[bytes], max_bytes: int) -> VerifiedImage:
        receiver, received, pending, pieces = _Receiver(self._spool.sink()), 0, 0, list[bytes]()
        try:
            async for chunk in chunks:
                received += len(chunk)
                if received > max_bytes:
                    raise BodyTooLarge(limit=max_bytes)
                pieces.append(chunk)
                pending += len(chunk)
                if pending >= CHECKED_BYTES:
                    await self._spool.fill(receiver.sink, receiver.write, pieces)
                    pieces, pending = [], 0
            return await self._spool.fill(receiver.sink, receiver.finish, pieces)
        finally:
            if not receiver.sink.closed:
                file_threads.put(receiver.sink.discard)

    async def _store_image(self, image: VerifiedImage) -> tuple[Upload, bool]:
        expires_at = self._clock() + self._life_s
        existing, is_stored = await self._records.read(image.sha256), False
        if existing is not None:
            with suppress(StoreUnavailable):  # another instance may have the only copy: this one keeps its own
                is_stored = await self._is_stored(existing)
        if existing is not None and is_stored:
            later = replace(existing, expires_at=max(expires_at, existing.expires_at))
            await self._extend(later)
            is_new = existing.expires_at <= self._clock()
        else:
            later = UploadRecord(image.stored_at(0, store_id=self._store.store_id), expires_at)
            needed_until = existing.needed_until if existing is not None else 0.0
            await self._store.save(image.sha256, 0, image, max(expires_at, needed_until) + STORED_LONGER_S)
            is_new = True
        return Upload.of(await self._records.write(later)), is_new

    async def _record(self, upload_id: str) -> UploadRecord | None:
        if not _ID.fullmatch(upload_id):
            return None
        return await self._records.read(upload_id.removeprefix(UPLOAD_PREFIX))

    async def _is_stored(self, record: UploadRecord) -> bool:
        stored = await self._store.contains(record.image.sha256, record.image)
        if not stored:
            self._records.forget(record.image.sha256)
        return stored

    async def _extend(self, record: UploadRecord) -> None:
        await self._store.extend_expiry(record.image.sha256, [record.image], record.ends_at + STORED_LONGER_S)


class _Receiver:
    """Check of an upload while it comes, and the sink that holds it. Its methods block."""

    def __init__(self, sink: ImageSink) -> None:
        self.sink = sink
        self._tail = b""

    def write(self, pieces: list[bytes]) -> None:
        """Check and hold the next bytes. Raises NotAnImage, StoreUnavailable."""
        self._refuse_markup(pieces)
        self.sink.write(pieces)

    def finish(self, pieces: list[bytes]) -> VerifiedImage:
        """Return the whole image, after the last bytes. Raises as `write` does."""
        self._refuse_markup(pieces)
        return self.sink.finish(pieces)

    def _refuse_markup(self, pieces: list[bytes]) -> None:
        """Raise NotAnImage for a file that a browser or a server might read as a page, though it is an image too."""
        joined = self._tail + b"".join(pieces)
        if _MARKUP.search(joined):
            raise NotAnImage("it contains HTML or a script", lasting=True)
        self._tail = joined[-_MARKUP_BYTES:]


def upload_not_found(field: str) -> UploadNotFound:
    """Return the error for a field of a request that names an upload that is unknown or expired."""
    return UploadNotFound(details=[FieldError(field, "is unknown or has expired: upload the image again")])


def _refusal(error: NotAnImage) -> UnsupportedImage | ImageTooLarge:
    kind = ImageTooLarge if isinstance(error, TooManyPixels) else UnsupportedImage
    return kind(details=[FieldError(FILE_FIELD, str(error))])
