"""Owns the pictures kept as files: where they lie, how long they stay, and how many bytes they may take.

`folder/<2 hex>/<task>/<index>-<12 hex of the SHA-256>.<ext>`; a file's mtime is the time when it expires. Files decide
what is there; the index in memory only knows which are oldest, so several processes may share a folder.
"""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import ParamSpec, TypeVar

from loguru import logger

from imagegen.errors import StoreUnavailable
from imagegen.images import files
from imagegen.images.files import Kept
from imagegen.images.health import StoreHealth
from imagegen.images.store import OpenedImage, VerifiedImage, bytes_of
from imagegen.tasks.image import StoredImage

P = ParamSpec("P")
T = TypeVar("T")

SWEEP_INTERVAL_S = 300.0
EXPIRED_AT_ONCE = 20
"""As many go together as make the way to a thread worth while; the rest goes with the sweep."""

_EXTENSIONS = {"image/png": "png", "image/jpeg": "jpg", "image/webp": "webp"}
_TASK_ID = re.compile(r"[0-9A-Za-z_-]{3,64}")


class DiskStore:
    """IMAGE_STORE=disk. `sweep` is a loop that the caller runs; until its first round, files of earlier runs are
    served but do not count towards `max_bytes`. others_live: whether another instance may hold what we miss."""

    def __init__(
        self,
        folder: Path,
        max_bytes: int,
        *,
        clock: Callable[[], float] = time.time,
        others_live: Callable[[], bool] = lambda: False,
    ) -> None:
        self._folder = folder
        self._root = str(folder)
        self._max_bytes = max_bytes
        self._clock = clock
        self._others_live = others_live
        self.store_id = ""
        self.health = StoreHealth(f"disk, {folder}")
        self.spool_folder: Path | None = None
        self._index: dict[Path, Kept] = {}
        self._total_bytes = 0
        self._writing: set[Path] = set()
        self._sweep_failed = False

    async def start(self) -> None:
        """Makes the folder, and its mark. Raises StoreUnavailable."""
        await _in_thread(self._folder.mkdir, parents=True, exist_ok=True)
        self.store_id = await _in_thread(files.marked, self._folder.with_name(f"{self._folder.name}.mark"))

    async def close(self) -> None:
        """Nothing is open between calls."""

    async def save(self, task_id: str, index: int, image: VerifiedImage, expires_at_s: float) -> None:
        """Writes the file, after the oldest ones made room for it. The newest picture always stays."""
        path, now = Path(self._name(task_id, index, image.sha256, image.content_type)), self._clock()
        self._add(path, Kept(image.size_bytes, expires_at_s))
        self._writing.add(path)
        try:
            if expired := self._expired(now):
                with suppress(StoreUnavailable):  # the sweep says so; the new picture may be kept all the same
                    await _in_thread(files.remove, expired, now)
            if oldest := self._over_cap():
                await _in_thread(files.remove, oldest)
            await _in_thread(files.write, path, bytes_of(image), expires_at_s)
        except StoreUnavailable as error:
            self._forget(path)
            self.health.mark_failed(error.__cause__ or error)
            raise
        else:
            self.health.mark_ok()
        finally:
            self._writing.discard(path)

    async def open(self, task_id: str, image: StoredImage) -> OpenedImage | None:
        """The bytes, compared with their SHA-256; a damaged file is removed.

        Raises StoreUnavailable also where another instance that lives has the only copy.
        """
        if not image.sha256:
            return None
        data = await _in_thread(files.read, self._stored_path(task_id, image), image, self._clock())
        if data is None and self._elsewhere(image):
            raise StoreUnavailable
        return None if data is None else OpenedImage(len(data), data)

    async def contains_all(self, task_id: str, images: Sequence[StoredImage]) -> bool:
        """Whether each file is there, whole and not expired. A picture that stays upstream is not ours to miss."""
        here = [image for image in images if image.sha256]
        if len(here) + sum(image.url is not None for image in images) < len(images):
            return False
        try:  # a few microseconds in most cases, where a thread would cost a hundred
            now = self._clock()
            missing = [image for image in here if not files.is_there(self._stored_name(task_id, image), image, now)]
        except OSError as error:
            raise StoreUnavailable from error
        return all(map(self._elsewhere, missing))

    async def extend_expiry(self, task_id: str, images: Sequence[StoredImage], expires_at_s: float) -> None:
        """Sets the files' end; those that are gone stay gone."""
        paths = [self._stored_path(task_id, image) for image in images if image.sha256]
        await _in_thread(files.set_end, paths, expires_at_s)

    async def sweep(self) -> None:
        """Runs until it is cancelled: a round at once, then one every few minutes. A failing disk is logged once."""
        while True:
            try:
                await self.sweep_once()
                self._sweep_failed = False
            except StoreUnavailable as error:
                if not self._sweep_failed:
                    logger.warning("the image folder can't be swept: {}", error.__cause__)
                self._sweep_failed = True
            await asyncio.sleep(SWEEP_INTERVAL_S)

    async def sweep_once(self) -> None:
        """Removes what has expired, learns what other processes did in the folder, and holds it under the cap."""
        before = self._index.keys() - self._writing
        place = {path: number for number, path in enumerate(self._index)}
        now = self._clock()
        found = await _in_thread(files.scan, self._folder, now)
        for path in before - found.kept.keys():
            self._forget(path)
        for path, kept in found.kept.items():
            self._add(path, kept)
        oldest_first = sorted(self._index.items(), key=lambda item: (item[1].expires_at_s, place.get(item[0], -1)))
        self._index = dict(oldest_first)
        await _in_thread(files.remove, found.useless, now)
        await _in_thread(files.remove, self._over_cap())

    def _elsewhere(self, image: StoredImage) -> bool:
        """Whether an instance with a folder of its own keeps it."""
        return image.keeper not in ("", self.store_id) and self._others_live()

    def _name(self, task_id: str, index: int, sha256: str, content_type: str) -> str:
        """The path as a string, which is made in a tenth of the time."""
        if not _TASK_ID.fullmatch(task_id):
            raise ValueError(f"not a task id: {task_id!r}")
        name = f"{index}-{sha256[:12]}.{_EXTENSIONS.get(content_type, 'bin')}"
        return os.path.join(self._root, task_id[:2], task_id, name)  # noqa: PTH118

    def _stored_name(self, task_id: str, image: StoredImage) -> str:
        return self._name(task_id, image.index, image.sha256, image.content_type)

    def _stored_path(self, task_id: str, image: StoredImage) -> Path:
        return Path(self._stored_name(task_id, image))

    def _add(self, path: Path, kept: Kept) -> None:
        self._forget(path)
        self._index[path] = kept
        self._total_bytes += kept.size_bytes

    def _forget(self, path: Path) -> None:
        if kept := self._index.pop(path, None):
            self._total_bytes -= kept.size_bytes

    def _expired(self, now: float) -> list[Path]:
        """Takes what has expired off the old end of the index, some at a time; else it would grow until the sweep."""
        expired: list[Path] = []
        for path, kept in self._index.items():
            if kept.expires_at_s > now or path in self._writing or len(expired) == EXPIRED_AT_ONCE:
                break
            expired.append(path)
        if len(expired) < EXPIRED_AT_ONCE:
            return []
        for path in expired:
            self._forget(path)
        return expired

    def _over_cap(self) -> list[Path]:
        """Takes the oldest off the index until the rest fits; what is being written stays."""
        oldest: list[Path] = []
        excess_bytes = self._total_bytes - self._max_bytes
        for path, kept in self._index.items():
            if excess_bytes <= 0 or len(oldest) == len(self._index) - 1:
                break
            if path not in self._writing:
                oldest.append(path)
                excess_bytes -= kept.size_bytes
        for path in oldest:
            self._forget(path)
        return oldest


async def _in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    try:
        return await asyncio.to_thread(function, *args, **kwargs)
    except OSError as error:
        raise StoreUnavailable from error
