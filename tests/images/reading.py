"""Reading of a whole image from a store."""

from __future__ import annotations

from contextlib import closing

from imagegen.images.store import ImageStore
from imagegen.tasks.image import StoredImage


async def load(store: ImageStore, task_id: str, image: StoredImage) -> bytes | None:
    """Return the bytes of an image, None if the store does not have it."""
    opened = await store.open(task_id, image)
    if opened is None:
        return None
    with closing(opened):
        return await opened.read_all()
