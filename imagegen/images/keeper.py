"""Owns the way of a picture from an answer into the store."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from imagegen.images.fetch import ImageFetcher
from imagegen.images.store import ImageStore
from imagegen.tasks.image import ImageBytes, ImageLink, StoredImage


class Keeper:
    """life_s: how long a picture is kept from when it is stored."""

    def __init__(
        self, fetcher: ImageFetcher, store: ImageStore, life_s: float, *, clock: Callable[[], float] = time.time
    ) -> None:
        self._fetcher = fetcher
        self._store = store
        self._life_s = life_s
        self._clock = clock

    def as_it_is(self, _index: int, _picture: ImageLink | ImageBytes, _seed: int | None) -> StoredImage | None:
        """None: bytes are fetched, and kept here."""
        return None

    async def keep(self, task_id: str, index: int, picture: ImageLink | ImageBytes, seed: int | None) -> StoredImage:
        """Fetches, checks and stores it. Raises UpstreamError, StoreUnavailable."""
        image = await self._fetcher.fetch(picture)
        await self._store.save(task_id, index, image, self._clock() + self._life_s)
        return image.stored_at(index, seed=seed, keeper=self._store.store_id)

    async def extend(self, task_id: str, images: Sequence[StoredImage]) -> None:
        """Lets pictures live as long as if they were kept now. Raises StoreUnavailable."""
        await self._store.extend_expiry(task_id, images, self._clock() + self._life_s)


class LinkKeeper:
    """`IMAGE_STORE=upstream`: the provider's own links are kept; bytes that came without one go to the store."""

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper
        self.keep = keeper.keep

    def as_it_is(self, index: int, picture: ImageLink | ImageBytes, seed: int | None) -> StoredImage | None:
        """A picture that came as a link."""
        return StoredImage(index, seed=seed, url=picture.url) if isinstance(picture, ImageLink) else None

    async def extend(self, task_id: str, images: Sequence[StoredImage]) -> None:
        await self._keeper.extend(task_id, [image for image in images if image.url is None])
