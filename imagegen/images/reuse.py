"""Reuse of stored images: by a task that differs only in `n`, and by the next epoch of a task that lacks some."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from operator import attrgetter

from msgspec.structs import replace

from imagegen.images.store import ImageStore
from imagegen.tasks.family import RequestFamily, ReusedImages, reusable_images
from imagegen.tasks.image import StoredImage
from imagegen.tasks.request import GenerationRequest
from imagegen.tasks.task import Task, missing_images_warning

_Take = Callable[[str, StoredImage, int], Awaitable[bool]]
"""Returns whether an image of a task of an id can be had at a place."""


class ImageReuse:
    """Reuse of the images of finished tasks for another task, so that either may expire. life_s: of the images."""

    def __init__(self, store: ImageStore, life_s: float, *, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._life_s = life_s
        self._clock = clock

    async def reuse(self, task_id: str, family: RequestFamily, finished: Sequence[Task]) -> ReusedImages:
        """Return the images of the finished task that has most of them. Raises StoreUnavailable."""
        request, reused = family.request, ReusedImages()
        usable = [(reusable_images(family, task), task) for task in finished if _is_sibling(task, family)]
        for images, task in sorted(usable, key=lambda pair: len(pair[0]), reverse=True):
            if len(reused.images) >= min(len(images), request.n):
                break
            stored = await self._store_again(task_id, task.id, images, request.n)
            if len(stored) > len(reused.images):
                reused = ReusedImages(stored, _lasting_warnings(task))
        return reused

    async def count(self, family: RequestFamily, finished: Sequence[Task]) -> int:
        """Return how many images `reuse` would return, and store nothing. Raises StoreUnavailable."""

        async def is_stored(source_id: str, image: StoredImage, _index: int) -> bool:
            return await self._store.contains_all(source_id, [image])

        count, most = family.request.n, 0
        for task in finished:
            if _is_sibling(task, family):
                fitting = await self._fitting(task.id, reusable_images(family, task), count, is_stored)
                most = max(most, len(fitting))
        return most

    async def _store_again(
        self, task_id: str, source_id: str, images: Iterable[tuple[int | None, StoredImage]], count: int
    ) -> tuple[StoredImage, ...]:
        """Store those of the images that are still there, as many as are requested."""
        expires_at_s = self._clock() + self._life_s

        async def store(source_id: str, image: StoredImage, index: int) -> bool:
            if (source_id, image.index) == (task_id, index):
                await self._store.extend_expiry(task_id, (image,), expires_at_s)
                return await self._store.contains_all(task_id, [image])
            return await self._store.reuse(source_id, image, task_id, index, expires_at_s)

        return await self._fitting(source_id, images, count, store, is_own=source_id == task_id)

    async def _fitting(
        self,
        source_id: str,
        images: Iterable[tuple[int | None, StoredImage]],
        count: int,
        take: _Take,
        *,
        is_own: bool = False,
    ) -> tuple[StoredImage, ...]:
        """Return those of the images that can be taken, as many as are requested, each at its place.

        is_own: they are of the same task, and stay in their store.
        """
        free, taken = set(range(count)), []
        for place, image in images:
            if not free:
                break
            index = min(free) if place is None else place
            own = replace(image, index=index, reused=True)
            if image.url is None:
                if not image.sha256 or not await take(source_id, image, index):
                    continue
                own = own if is_own else replace(own, store_id=self._store.store_id)
            taken.append(own)
            free.discard(index)
        return tuple(sorted(taken, key=attrgetter("index")))


def _is_sibling(task: Task, family: RequestFamily) -> bool:
    """Return whether a task has the request of the family: MD5 is not trusted."""
    try:
        return task.digest == family.digest(GenerationRequest.from_json(task.request_json).n)
    except ValueError:
        return False


def _lasting_warnings(task: Task) -> tuple[str, ...]:
    """Return the warnings about the images, without the one about their number."""
    short = missing_images_warning(len(task.images), GenerationRequest.from_json(task.request_json).n)
    return tuple(warning for warning in task.warnings if not warning.startswith(short))
