"""Owns the store of `IMAGE_STORE=upstream`: the provider's own links are handed out, no bytes are kept."""

from __future__ import annotations

from collections.abc import Sequence

from imagegen.images.store import ImageStore
from imagegen.tasks.image import StoredImage


class UpstreamStore:
    """A picture is its `url`, and lives as long as the provider lets it. `behind` keeps what came without a link."""

    def __init__(self, behind: ImageStore) -> None:
        self._behind = behind
        self.save = behind.save
        self.load = behind.load
        self.start = behind.start
        self.close = behind.close

    @property
    def mark(self) -> str:
        return self._behind.mark

    async def holds(self, task_id: str, images: Sequence[StoredImage]) -> bool:
        """A link is taken for alive."""
        return await self._behind.holds(task_id, [image for image in images if image.url is None])

    async def extend(self, task_id: str, images: Sequence[StoredImage], expires_at_s: float) -> None:
        await self._behind.extend(task_id, [image for image in images if image.url is None], expires_at_s)
