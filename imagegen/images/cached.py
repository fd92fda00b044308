"""Owns the store whose bytes live away from here, with a bounded cache on the disk in front of them."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from loguru import logger

from imagegen.errors import QueueUnavailable, StoreUnavailable
from imagegen.images.health import StoreHealth
from imagegen.images.store import ImageStore, OpenedImage, VerifiedImage, bytes_of, in_file_thread
from imagegen.tasks.image import StoredImage

CACHE_MAX_BYTES = 128 * 1024 * 1024
CACHED_S = 600.0
"""How long a picture that another instance saved is served from the disk before it is asked for again."""

PATIENCE_S = 600.0
"""How long a save waits for a store that is away. The picture is paid for, and a retry would pay for another."""

_AWAY = (QueueUnavailable, StoreUnavailable)


class BytesPort(Protocol):
    """Where the bytes live: in Redis, in a bucket. All of it raises QueueUnavailable or StoreUnavailable.

    The images that it is given have a `sha256` and a size; what it brings is checked by the caller.
    """

    async def put(self, task_id: str, image: StoredImage, data: bytes, expires_at_s: float) -> None:
        """Keeps it until `expires_at_s`, and the whole under its byte cap. The same picture again is fine."""
        ...

    async def get(self, task_id: str, image: StoredImage) -> bytes | None:
        """What lies there, None where nothing does."""
        ...

    async def holds(self, task_id: str, images: Sequence[StoredImage]) -> bool: ...

    async def extend(self, task_id: str, images: Sequence[StoredImage], expires_at_s: float) -> None: ...

    async def start(self) -> None: ...

    async def close(self) -> None: ...


class CachedStore:
    """IMAGE_STORE=redis and s3. What the cache can't do costs a question, and never a picture.

    The cache serves what it has, also while the port is away; `holds` is the port's word, so that all instances agree.
    The caller runs the loops of both.
    """

    store_id = ""

    def __init__(
        self,
        port: BytesPort,
        cache: ImageStore,
        *,
        patience_s: float = PATIENCE_S,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.health = StoreHealth("shared store")
        self._port = port
        self._cache = cache
        self._patience_s = patience_s
        self._clock = clock

    @property
    def spool_folder(self) -> Path | None:
        return self._cache.spool_folder

    async def start(self) -> None:
        """Raises SettingsError where the port can't work as it is set up."""
        await self._port.start()
        try:
            await self._cache.start()
        except StoreUnavailable as error:
            logger.warning("Pictures are not cached on the disk: {}", error.__cause__)

    async def close(self) -> None:
        await self._cache.close()
        await self._port.close()

    async def save(self, task_id: str, index: int, image: VerifiedImage, expires_at_s: float) -> None:
        """Returns when the picture is safe; waits for a port that is away, then raises StoreUnavailable."""
        if expires_at_s <= self._clock():
            return
        await self._put(task_id, image.stored_at(index), await in_file_thread(bytes_of, image), expires_at_s)
        await self._remember(task_id, index, image, expires_at_s)

    async def open(self, task_id: str, image: StoredImage) -> OpenedImage | None:
        """The bytes, compared with their SHA-256. Raises StoreUnavailable."""
        if not image.sha256:
            return None
        if cached := await self._cached(task_id, image):
            return cached
        try:
            data = await self._port.get(task_id, image)
        except QueueUnavailable as error:
            raise StoreUnavailable from error
        if data is None or not await asyncio.to_thread(_is_whole, data, image):
            return None
        checked = VerifiedImage(image.content_type, len(data), image.width, image.height, image.sha256, data)
        await self._remember(task_id, image.index, checked, self._clock() + CACHED_S)
        return OpenedImage(len(data), data)

    async def contains_all(self, task_id: str, images: Sequence[StoredImage]) -> bool:
        """Whether the port has them all. A picture that stays upstream is not ours to miss. Raises StoreUnavailable."""
        ours = [image for image in images if image.sha256]
        if len(ours) + sum(image.url is not None for image in images) < len(images):
            return False
        try:
            return not ours or await self._port.holds(task_id, ours)
        except QueueUnavailable as error:
            raise StoreUnavailable from error

    async def extend_expiry(self, task_id: str, images: Sequence[StoredImage], expires_at_s: float) -> None:
        """Raises StoreUnavailable."""
        ours = [image for image in images if image.sha256]
        if not ours:
            return
        try:
            await self._port.extend(task_id, ours, expires_at_s)
        except QueueUnavailable as error:
            raise StoreUnavailable from error
        with suppress(StoreUnavailable):
            await self._cache.extend_expiry(task_id, ours, expires_at_s)

    async def _put(self, task_id: str, image: StoredImage, data: bytes, expires_at_s: float) -> None:
        now = asyncio.get_running_loop().time
        give_up_at, delay_s = now() + self._patience_s, 0.25
        while True:
            try:
                await self._port.put(task_id, image, data, expires_at_s)
            except _AWAY as error:
                self.health.mark_failed(error.__cause__ or error)
                if now() + delay_s > give_up_at:
                    raise StoreUnavailable from error
            else:
                self.health.mark_ok()
                return
            await asyncio.sleep(delay_s)
            delay_s = min(delay_s * 2, 5.0)

    async def _cached(self, task_id: str, image: StoredImage) -> OpenedImage | None:
        try:
            return await self._cache.open(task_id, image)
        except StoreUnavailable:
            return None

    async def _remember(self, task_id: str, index: int, image: VerifiedImage, expires_at_s: float) -> None:
        try:
            await self._cache.save(task_id, index, image, expires_at_s)
        except StoreUnavailable as error:
            logger.debug("A picture is not cached on the disk: {}", error.__cause__)


def _is_whole(data: bytes, image: StoredImage) -> bool:
    return len(data) == image.size_bytes and hashlib.sha256(data).hexdigest().startswith(image.sha256)
