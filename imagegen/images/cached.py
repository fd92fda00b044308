"""Store of images that are kept away from here, in Redis or in a bucket, with a bounded cache on the disk."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing, suppress
from io import FileIO
from pathlib import Path
from typing import Protocol

from loguru import logger
from msgspec import Struct
from msgspec.structs import replace

from imagegen.errors import QueueUnavailable, StoreUnavailable
from imagegen.images.disk_watch import limit_s
from imagegen.images.files import SMALL_BYTES
from imagegen.images.store import (
    READ_S,
    ImageStore,
    OpenedImage,
    SpooledImageLost,
    StoreFull,
    VerifiedImage,
    file_threads,
    in_hash_thread,
)
from imagegen.images.store_health import StoreHealth, describe
from imagegen.images.store_recovery import FLAP_S, NeededSpace, RecoveryPace
from imagegen.tasks.image import StoredImage
from imagegen.turn_queue import TurnQueue

CACHE_MAX_BYTES = 128 * 1024 * 1024
CACHED_S = 600.0
"""How long an image that another instance saved is served from the disk before it is requested again."""

PROBE_INTERVAL_S = 2.0

_UNAVAILABLE = (QueueUnavailable, StoreUnavailable)


def cache_health() -> StoreHealth:
    """Return the health of a disk cache, which no upstream call depends on."""
    return StoreHealth("the disk cache", "they are read from the store each time")


class BlobStore(Protocol):
    """Store of bytes away from this machine: Redis, a bucket. All methods raise QueueUnavailable or StoreUnavailable.

    The images that it is given have a `sha256` and a size.
    """

    async def put(self, task_id: str, image: StoredImage, source: bytes | Path, expires_at_s: float) -> None:
        """Save the bytes, or those of a file, until `expires_at_s`. Saving them again is allowed."""
        ...

    async def reuse(self, source_id: str, image: StoredImage, task_id: str, index: int, expires_at_s: float) -> bool:
        """Copy the bytes within the store for another task. Return False if they are gone."""
        ...

    def get(self, task_id: str, image: StoredImage, offset: int, length: int) -> AsyncGenerator[bytes, None]:
        """Yield the bytes from `offset` in pieces: fewer than `length` if some are gone. They are not verified."""
        ...

    async def contains_all(self, task_id: str, images: Sequence[StoredImage]) -> bool:
        """Return whether each image is there with its size."""
        ...

    async def extend_expiry(self, task_id: str, images: Sequence[StoredImage], expires_at_s: float) -> None:
        """Set when the images expire; those that are gone stay gone."""
        ...

    async def probe(self, size_bytes: int) -> None:
        """Write what shows whether an image of this size could be saved."""
        ...

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    @property
    def loops(self) -> Mapping[str, Callable[[], Coroutine[None, None, None]]]:
        """Loops that the caller runs in the background, by name; none of them returns."""
        ...


class _Fetched(Struct, frozen=True):
    """Outcome of fetching an image: its bytes, or whether it is whole, and then in the cache if that works."""

    data: bytes | None = None
    whole: bool = False


class CachedStore:
    """`IMAGE_STORE=redis` and `s3`. A cache that fails costs a request to the store behind it, and never an image.

    Cached images are served also while that store is away; `contains_all` is its answer, so that all
    instances agree. The caller runs the loops of both, and `watch`.
    """

    store_id = ""

    def __init__(
        self,
        blobs: BlobStore,
        cache: ImageStore,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.health = StoreHealth("the image store")
        self._blobs = blobs
        self._cache = cache
        self._clock = clock
        self._turns = TurnQueue()
        self._fetching: dict[tuple[str, int, str], asyncio.Task[_Fetched]] = {}
        self._ended_fetches = 0
        self._reads_failed = False
        self._needed = NeededSpace(clock)

    @property
    def spool_health(self) -> StoreHealth:
        """The health of the cache."""
        return self._cache.spool_health

    @property
    def spool_folder(self) -> Path | None:
        """The folder of the cache, if files can be written there now."""
        return self._cache.spool_folder if self._cache.health.writable else None

    async def start(self) -> None:
        """Start both. Raises SettingsError if the blob store can't work with these settings."""
        await self._cache.start()
        try:
            await self._blobs.start()
        except _UNAVAILABLE as error:
            self.health.mark_failed(error.__cause__ or error)

    async def watch(self) -> None:
        """Probe a store that failed until it can be written; less often if it fails again soon. Never returns."""
        pace = RecoveryPace(PROBE_INTERVAL_S)
        while True:
            await asyncio.sleep(PROBE_INTERVAL_S)
            if not self.health.writable:
                await pace.recover(self.check, FLAP_S + pace.retry_s)

    async def check(self) -> bool:
        """Probe the blob store once; return whether images can be saved."""
        try:
            await self._blobs.probe(self._needed.size_bytes)
        except _UNAVAILABLE as error:
            self.health.mark_failed(error.__cause__ or error)
        else:
            self.health.mark_ok()
        return self.health.writable

    async def close(self) -> None:
        """Close both."""
        for fetching in self._fetching.values():
            fetching.cancel()
        await asyncio.gather(*self._fetching.values(), return_exceptions=True)
        await self._cache.close()
        await self._blobs.close()

    async def save(self, task_id: str, index: int, image: VerifiedImage, expires_at_s: float) -> None:
        """Save the image in the blob store, then in the cache."""
        if expires_at_s > self._clock():
            await self._put(task_id, image.stored_at(index), image, expires_at_s)
            await self._save_in_cache(task_id, index, image, expires_at_s)
        if image.path is not None:
            file_threads.put(image.path.unlink, missing_ok=True)

    async def reuse(self, source_id: str, image: StoredImage, task_id: str, index: int, expires_at_s: float) -> bool:
        """Copy the image in the blob store, and link it in the cache."""
        try:
            is_there = await self._blobs.reuse(source_id, image, task_id, index, expires_at_s)
        except _UNAVAILABLE as error:
            raise self._unavailable(error) from error
        if is_there:
            with suppress(StoreUnavailable):
                await self._cache.reuse(source_id, image, task_id, index, expires_at_s)
        return is_there

    async def open(self, task_id: str, image: StoredImage) -> OpenedImage | None:
        """Open the image in the cache, after copying it there; read it from the blob store in pieces if that fails."""
        if not image.sha256:
            return None
        ended = self._ended_fetches
        if cached := await self._open_cached(task_id, image):
            return cached
        try:
            fetched = await self._fetch(task_id, image, ended)
            if fetched.data is not None:
                return OpenedImage(image.size_bytes, fetched.data)
            if fetched.whole and (cached := await self._open_cached(task_id, image)):
                return cached
            if not fetched.whole or not await self._blobs.contains_all(task_id, [image]):
                return None
        except _UNAVAILABLE as error:
            raise self._unavailable(error) from error
        return OpenedImage(image.size_bytes, pieces=lambda offset, length: self._read(task_id, image, offset, length))

    async def contains(self, task_id: str, image: StoredImage) -> bool:
        """Return whether the cache or the blob store has the image."""
        with suppress(StoreUnavailable):
            if image.sha256 and await self._cache.contains(task_id, image):
                return True
        return bool(image.sha256) and await self.contains_all(task_id, [image])

    async def contains_all(self, task_id: str, images: Sequence[StoredImage]) -> bool:
        """Return whether the blob store has them all. An image that stays upstream is not missing here."""
        ours = [image for image in images if image.sha256]
        if len(ours) + sum(image.url is not None for image in images) < len(images):
            return False
        try:
            return not ours or await self._blobs.contains_all(task_id, ours)
        except _UNAVAILABLE as error:
            raise self._unavailable(error) from error

    async def find(self, task_id: str, since_s: float) -> list[StoredImage]:
        """Return the images of a task that are in the cache and in the store behind it."""
        cached: list[StoredImage] = []
        with suppress(StoreUnavailable):
            cached = await self._cache.find(task_id, since_s)
        images = [replace(image, store_id="") for image in cached]
        return [image for image in images if await self.contains_all(task_id, [image])]

    async def extend_expiry(self, task_id: str, images: Sequence[StoredImage], expires_at_s: float) -> None:
        """Set the expiry in both."""
        ours = [image for image in images if image.sha256]
        if not ours:
            return
        try:
            await self._blobs.extend_expiry(task_id, ours, expires_at_s)
        except _UNAVAILABLE as error:
            raise self._unavailable(error) from error
        with suppress(StoreUnavailable):
            await self._cache.extend_expiry(task_id, ours, expires_at_s)

    async def _put(self, task_id: str, stored: StoredImage, image: VerifiedImage, expires_at_s: float) -> None:
        source = image.source
        try:
            if isinstance(source, Path) and not await file_threads.run_within(READ_S, source.exists):
                raise SpooledImageLost
        except OSError as error:
            raise StoreUnavailable from error
        try:
            await self._blobs.put(task_id, stored, source, expires_at_s)
        except StoreFull:
            raise
        except _UNAVAILABLE as error:
            self._needed.save_failed(stored.size_bytes)
            self.health.mark_failed(error.__cause__ or error)
            raise StoreUnavailable from error
        self._needed.saved(stored.size_bytes)

    async def _open_cached(self, task_id: str, image: StoredImage) -> OpenedImage | None:
        try:
            return await self._cache.open(task_id, image)
        except StoreUnavailable:
            return None

    async def _save_in_cache(self, task_id: str, index: int, image: VerifiedImage, expires_at_s: float) -> None:
        if not self._cache.health.writable:
            return
        try:
            async with asyncio.timeout(limit_s(image.size_bytes)):
                await self._cache.save(task_id, index, image, expires_at_s)
        except (StoreUnavailable, TimeoutError) as error:
            logger.debug("An image is not cached on the disk: {}", error.__cause__ or type(error).__name__)

    async def _fetch(self, task_id: str, image: StoredImage, ended: int) -> _Fetched:
        """Fetch the image once for all who wait for it.

        ended: `_ended_fetches` before the caller looked in the cache. A fetch that ended since may have put it there.
        """
        key = (task_id, image.index, image.sha256)
        fetching = self._fetching.get(key)
        if fetching is None:
            look_again = ended != self._ended_fetches
            fetching = self._fetching[key] = asyncio.create_task(
                self._fetch_once(task_id, image, look_again=look_again)
            )
            fetching.add_done_callback(lambda done: self._fetched(key, done))
        return await self._turns.result_of(fetching)

    def _fetched(self, key: tuple[str, int, str], done: asyncio.Task[_Fetched]) -> None:
        self._fetching.pop(key, None)
        self._ended_fetches += 1
        if not done.cancelled() and done.exception() is None:
            self._reads_failed = False

    async def _fetch_once(self, task_id: str, image: StoredImage, *, look_again: bool) -> _Fetched:
        if look_again and (cached := await self._open_cached(task_id, image)):
            cached.close()
            return _Fetched(whole=True)
        expires_at_s = self._clock() + CACHED_S
        if image.size_bytes <= SMALL_BYTES:
            data = b"".join([piece async for piece in self._blobs.get(task_id, image, 0, image.size_bytes)])
            if len(data) != image.size_bytes or hashlib.sha256(data).hexdigest() != image.sha256:
                return _Fetched()
            await self._save_in_cache(task_id, image.index, VerifiedImage.of(image, data=data), expires_at_s)
            return _Fetched(data)
        if (folder := self.spool_folder) is None:
            return _Fetched(whole=True)
        path = folder / f"{secrets.token_hex(6)}.fetched"
        try:
            if not await self._download(task_id, image, path):
                return _Fetched()
            await self._save_in_cache(task_id, image.index, VerifiedImage.of(image, path=path), expires_at_s)
        except OSError as error:
            logger.debug("An image is not cached on the disk: {}", error)
        finally:
            file_threads.put(path.unlink, missing_ok=True)
        return _Fetched(whole=True)

    async def _download(self, task_id: str, image: StoredImage, path: Path) -> bool:
        """Write the image into a file; return whether it is whole. Raises OSError where the disk fails."""
        digest, size_bytes = hashlib.sha256(), 0
        file = await file_threads.run_within(READ_S, FileIO, path, "xb")
        try:
            async with aclosing(self._blobs.get(task_id, image, 0, image.size_bytes)) as pieces:
                async for piece in pieces:
                    await file_threads.run_within(READ_S, _write_hashed, file, digest, piece)
                    size_bytes += len(piece)
        finally:
            await file_threads.run_within(READ_S, file.close)
        return size_bytes == image.size_bytes and digest.hexdigest() == image.sha256

    async def _read(self, task_id: str, image: StoredImage, offset: int, length: int) -> AsyncGenerator[bytes, None]:
        """Yield pieces straight from the blob store. Of a whole image, the last one comes only if the hash is right."""
        digest, whole, left = hashlib.sha256(), length == image.size_bytes, length
        try:
            async with aclosing(self._blobs.get(task_id, image, offset, length)) as pieces:
                async for piece in pieces:
                    left -= len(piece)
                    if whole:
                        await in_hash_thread(digest.update, piece)
                        if left <= 0 and digest.hexdigest() != image.sha256:
                            raise StoreUnavailable
                    yield piece
        except _UNAVAILABLE as error:
            raise self._unavailable(error) from error

    def _unavailable(self, error: Exception) -> StoreUnavailable:
        """Log the first failing read of an outage, unless a failing save was logged."""
        if not self._reads_failed and self.health.writable:
            logger.warning("Images can't be read from the image store: {}", describe(error.__cause__ or error))
        self._reads_failed = True
        return StoreUnavailable()


def _write_hashed(file: FileIO, digest: hashlib._Hash, piece: bytes) -> None:
    digest.update(piece)
    file.write(piece)
