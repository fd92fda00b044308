"""Store of `IMAGE_STORE=upstream`: clients get the provider's own links, and no bytes are kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from imagegen.images.store import ImageStore
from imagegen.images.store_health import StoreHealth
from imagegen.tasks.image import StoredImage


class UpstreamStore:
    """An image is its `url`, and lives as long as the provider lets it. `fallback` has what came without a link."""

    def __init__(self, fallback: ImageStore) -> None:
        self._fallback = fallback
        self.save = fallback.save
        self.open = fallback.open
        self.reuse = fallback.reuse
        self.contains = fallback.contains
        self.find = fallback.find
        self.start = fallback.start
        self.close = fallback.close

    @property
    def store_id(self) -> str:
        return self._fallback.store_id

    @property
    def health(self) -> StoreHealth:
        return self._fallback.health

    @property
    def spool_health(self) -> StoreHealth:
        return self._fallback.spool_health

    @property
    def spool_folder(self) -> Path | None:
        return self._fallback.spool_folder

    async def contains_all(self, task_id: str, images: Sequence[StoredImage]) -> bool:
        """Return True: a link counts as alive."""
        return await self._fallback.contains_all(task_id, [image for image in images if image.url is None])

    async def extend_expiry(self, task_id: str, images: Sequence[StoredImage], expires_at_s: float) -> None:
        await self._fallback.extend_expiry(task_id, [image for image in images if image.url is None], expires_at_s)
