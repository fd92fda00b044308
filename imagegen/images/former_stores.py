"""Current image store together with former ones, which an earlier `IMAGE_STORE` filled, until their images expire."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

from imagegen.errors import StoreUnavailable
from imagegen.images.store import ImageStore, OpenedImage, VerifiedImage
from imagegen.images.store_health import StoreHealth
from imagegen.tasks.image import StoredImage


class StoreWithFormer:
    """Store that saves into the current store, and reads from it and the former ones, by `StoredImage.store_id`.

    others_live: returns whether another instance may have an image of a folder that is not here.
    others_differ: returns whether an instance with another `IMAGE_STORE` may have one of a store that instances share.
    The caller starts and closes the former stores.
    """

    def __init__(
        self,
        store: ImageStore,
        formers: Sequence[ImageStore],
        others_live: Callable[[], bool] = lambda: False,
        others_differ: Callable[[], bool] = lambda: False,
    ) -> None:
        self._store = store
        self._formers = tuple(formers)
        self._others_live = others_live
        self._others_differ = others_differ

    @property
    def store_id(self) -> str:
        return self._store.store_id

    @property
    def health(self) -> StoreHealth:
        return self._store.health

    @property
    def spool_health(self) -> StoreHealth:
        return self._store.spool_health

    @property
    def spool_folder(self) -> Path | None:
        return self._store.spool_folder

    async def start(self) -> None:
        """Start the current store."""
        await self._store.start()

    async def close(self) -> None:
        """Close the current store."""
        await self._store.close()

    def save(self, task_id: str, index: int, image: VerifiedImage, expires_at_s: float) -> Coroutine[Any, Any, None]:
        """Save an image into the current store. Raises StoreUnavailable."""
        return self._store.save(task_id, index, image, expires_at_s)

    def open(self, task_id: str, image: StoredImage) -> Coroutine[Any, Any, OpenedImage | None]:
        """Open an image in the store that has it."""
        return self._store.open(task_id, image) if self._is_ours(image) else self._open_former(task_id, image)

    def contains(self, task_id: str, image: StoredImage) -> Coroutine[Any, Any, bool]:
        """Return whether one of the stores has an image."""
        return self._store.contains(task_id, image) if self._is_ours(image) else self._former_has(task_id, image)

    async def find(self, task_id: str, since_s: float) -> list[StoredImage]:
        """Return the images of a task that the current store finds."""
        return await self._store.find(task_id, since_s)

    async def contains_all(self, task_id: str, images: Sequence[StoredImage]) -> bool:
        """Return whether each image is in one of the stores."""
        if all(map(self._is_ours, images)):
            return await self._store.contains_all(task_id, images)
        here = [image for image in images if self._places(image)[0] is self._store]
        elsewhere = [image for image in images if image not in here]
        if here and not await self._store.contains_all(task_id, here):
            elsewhere += here
        for image in elsewhere:
            if not await self._in_any(task_id, image):
                return False
        return True

    async def reuse(self, source_id: str, image: StoredImage, task_id: str, index: int, expires_at_s: float) -> bool:
        """Save an image again in the current store under another task. It is read only if that store lacks it."""
        places = self._places(image)
        if self._store in places and await self._store.reuse(source_id, image, task_id, index, expires_at_s):
            return True
        if places == [self._store]:
            self._check_elsewhere(image)
            return False
        if (opened := await self._open_former(source_id, image)) is None:
            return False
        await self._save_opened(opened, image, task_id, index, expires_at_s)
        return True

    async def extend_expiry(self, task_id: str, images: Sequence[StoredImage], expires_at_s: float) -> None:
        """Set when images expire, in the current store, or in the former ones if it lacks them."""
        here = [image for image in images if self._store in self._places(image)]
        if here:
            await self._store.extend_expiry(task_id, here, expires_at_s)
        for image in images:
            formers = [store for store in self._places(image) if store is not self._store]
            if not formers or (image in here and await self._store.contains_all(task_id, [image])):
                continue
            for store in formers:
                await self._extend_in_former(store, task_id, image, expires_at_s)

    async def _extend_in_former(self, store: ImageStore, task_id: str, image: StoredImage, expires_at_s: float) -> None:
        """Set when an image expires in a former store. Of one that may only be read, it goes to the current store."""
        try:
            await store.extend_expiry(task_id, [image], expires_at_s)
        except StoreUnavailable:
            if self._store not in self._places(image):
                raise
            if (opened := await store.open(task_id, image)) is not None:
                await self._save_opened(opened, image, task_id, image.index, expires_at_s)

    async def _save_opened(
        self, opened: OpenedImage, image: StoredImage, task_id: str, index: int, expires_at_s: float
    ) -> None:
        """Save an image of a former store in the current one, and close it."""
        try:
            data = await opened.read_all()
        except OSError as error:
            raise StoreUnavailable from error
        finally:
            opened.close()
        await self._store.save(task_id, index, VerifiedImage.of(image, data=data), expires_at_s)

    def _is_ours(self, image: StoredImage) -> bool:
        """Return whether no store but the current one can have an image."""
        if not image.sha256:
            return True
        if image.store_id != self._store.store_id:
            return False
        for former in self._formers:  # a third of the time of all()
            if former.store_id == image.store_id:
                return False
        return bool(image.store_id) or not self._others_differ()

    def _places(self, image: StoredImage) -> list[ImageStore]:
        """Return the stores that may have an image, those with its id first."""
        if self._is_ours(image):
            return [self._store]
        named = [store for store in (self._store, *self._formers) if store.store_id == image.store_id]
        if self._store not in named and not image.store_id:
            named.insert(0, self._store)  # a folder that had no id when it saved the image
        return named or [self._store]

    async def _open_former(self, task_id: str, image: StoredImage) -> OpenedImage | None:
        for store in self._places(image):
            if (opened := await store.open(task_id, image)) is not None:
                return opened
        self._check_elsewhere(image)
        return None

    async def _former_has(self, task_id: str, image: StoredImage) -> bool:
        for store in self._places(image):
            if await store.contains(task_id, image):
                return True
        self._check_elsewhere(image)
        return False

    async def _in_any(self, task_id: str, image: StoredImage) -> bool:
        for store in self._places(image):
            if await store.contains_all(task_id, [image]):
                return True
        return self._elsewhere(image)

    def _check_elsewhere(self, image: StoredImage) -> None:
        if self._elsewhere(image):
            raise StoreUnavailable

    def _elsewhere(self, image: StoredImage) -> bool:
        """Return whether an instance with another folder, or another kind of store, may have an image."""
        if not image.store_id:
            return self._others_differ()
        known_ids = {store.store_id for store in (self._store, *self._formers)}
        return image.store_id not in known_ids and self._others_live()
