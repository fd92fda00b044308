"""Way of an image from an upstream's answer into the store."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from imagegen.images.fetch import ImageFetcher
from imagegen.images.spool import Spool
from imagegen.images.store import Describe, ImageStore, VerifiedImage, in_check_thread
from imagegen.tasks.image import GivenImage, ImageLink, StoredImage


class StoringSaver:
    """Saver that fetches images into the spool and saves them in the store.

    life_s: how long an image is kept from then on. embed_metadata: whether its parameters are written into its file.
    """

    def __init__(
        self,
        fetcher: ImageFetcher,
        spool: Spool,
        store: ImageStore,
        life_s: float,
        *,
        embed_metadata: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._embed_metadata = embed_metadata
        self._fetcher = fetcher
        self._spool = spool
        self._store = store
        self._life_s = life_s
        self._clock = clock
        self.fetch = fetcher.fetch
        self.discard = spool.discard

    @property
    def writable(self) -> bool:
        """Whether images of new calls could be saved."""
        return self._store.health.writable

    async def wait_writable(self, within_s: float) -> None:
        """Wait until images can be saved, `within_s` seconds at most."""
        try:
            async with asyncio.timeout(within_s):
                await self._store.health.wait_writable()
        except TimeoutError:
            pass

    def passthrough(self, _index: int, _image: GivenImage, _seed: int | None) -> StoredImage | None:
        """Return None: bytes are fetched, and kept here."""
        return None

    def save(
        self, task_id: str, index: int, image: VerifiedImage, seed: int | None, describe: Describe
    ) -> Coroutine[Any, Any, StoredImage]:
        """Save a fetched image. Raises StoreUnavailable."""
        if not self._embed_metadata:
            return self._save(task_id, index, image, seed)
        return self._save_described(task_id, index, image, seed, describe)

    async def _save_described(
        self, task_id: str, index: int, image: VerifiedImage, seed: int | None, describe: Describe
    ) -> StoredImage:
        described = await in_check_thread(self._spool.embed, image, *describe(image, seed))
        try:
            return await self._save(task_id, index, described, seed)
        finally:
            if described is not image:
                self._spool.discard(described)

    async def _save(self, task_id: str, index: int, image: VerifiedImage, seed: int | None) -> StoredImage:
        await self._store.save(task_id, index, image, self._clock() + self._life_s)
        return image.stored_at(index, seed=seed, store_id=self._store.store_id)

    async def find(self, task_id: str, since_s: float) -> list[StoredImage]:
        """Return the images of a task in the store that were saved since a Unix time. Raises StoreUnavailable."""
        return await self._store.find(task_id, since_s)

    async def extend_expiry(self, task_id: str, images: Sequence[StoredImage]) -> None:
        """Let images live as long as if they were saved now. Raises StoreUnavailable."""
        await self._store.extend_expiry(task_id, images, self._clock() + self._life_s)

    def resolve(self, link: ImageLink) -> ImageLink:
        """Return the link as an absolute one. Raises ImageRejected."""
        return self._fetcher.resolve(link)


class LinkOnlySaver:
    """Saver of `IMAGE_STORE=upstream`: it keeps the provider's own links; bytes without one go to the store."""

    def __init__(self, saver: StoringSaver) -> None:
        self._saver = saver
        self._bytes_came = False
        self.save = saver.save
        self.discard = saver.discard
        self.find = saver.find
        self.wait_writable = saver.wait_writable

    @property
    def writable(self) -> bool:
        """Whether images of new calls could be saved: links need no store."""
        return not self._bytes_came or self._saver.writable

    def passthrough(self, index: int, image: GivenImage, seed: int | None) -> StoredImage | None:
        """Return an image that came as a link."""
        if isinstance(image, ImageLink):
            return StoredImage(index, seed=seed, url=self._saver.resolve(image).url)
        self._bytes_came = True
        return None

    async def fetch(self, image: GivenImage, *, age_s: float = 0.0) -> VerifiedImage:
        """Check bytes that came without a link. Raises as `ImageFetcher.fetch`."""
        return await self._saver.fetch(image, age_s=age_s)

    async def extend_expiry(self, task_id: str, images: Sequence[StoredImage]) -> None:
        """Let images that are kept here live longer. Raises StoreUnavailable."""
        await self._saver.extend_expiry(task_id, [image for image in images if image.url is None])
