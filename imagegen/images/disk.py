"""Store of images as files in a folder, `IMAGE_STORE=disk`, and the cache in front of other stores.

Names of files: `imagegen.images.file_names`. Next to the folder: `<folder>.expiry`, the index of when images expire;
`<folder>.mark`, its id; `<folder>.flat`, if its names are flat; `spool/`, files that are not saved yet. Files decide
what exists; the index in memory only holds which are oldest, so several processes may share a folder.

A file's content is hashed when this process reads it for the first time, and again when its inode, size or times differ
from then; what this process wrote itself was hashed before. Its size is compared at each read.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from loguru import logger
from msgspec import Struct

from imagegen.errors import StoreUnavailable
from imagegen.images import files
from imagegen.images.checked_files import CachedImage, CheckedFiles
from imagegen.images.disk_calls import DiskCalls
from imagegen.images.disk_index import EXPIRED_AT_ONCE, DiskIndex, IndexEntry
from imagegen.images.disk_sweep import SweptFolder, sweep_folder
from imagegen.images.disk_watch import DiskWatch
from imagegen.images.expiry import ExpiryIndex
from imagegen.images.file_names import task_of
from imagegen.images.files import Signature
from imagegen.images.folder_names import FolderNames
from imagegen.images.needed_uploads import FindNeeded, is_upload, nothing_needed, take_over_cap
from imagegen.images.saved_files import find_images
from imagegen.images.store import (
    OpenedImage,
    SpooledImageLost,
    StoreFull,
    VerifiedImage,
    in_file_thread,
    in_flush_thread,
)
from imagegen.images.store_health import StoreHealth
from imagegen.tasks.image import StoredImage

SWEEP_INTERVAL_S = 300.0

CLOSE_S = 2.0

FLUSH_S = 1.0
"""An image that was saved is durable after this time at most, as with `appendfsync everysec` of Redis."""

_COARSE_TIME_S = 2.0
"""A file's time may differ by this from the one that was set: FAT has steps of two seconds."""

ORPHAN_S = 600.0
"""An unfinished file that a sweep finds again after this time was left by a process that died while it wrote."""


class DiskLookups(Struct, frozen=True):
    """Look-ups outside of a disk store.

    others_live: returns whether another instance may have an image that is missing here.
    find_needed: returns the uploads that stay though they are the oldest.
    may_be_flat, meet_peers: see `FolderNames`; is_cache: see `DiskWatch`.
    """

    others_live: Callable[[], bool] = lambda: False
    find_needed: FindNeeded = nothing_needed
    may_be_flat: Callable[[], bool] = lambda: True
    meet_peers: Callable[[], Awaitable[None]] = partial(asyncio.sleep, 0)
    is_cache: bool = False


class DiskStore:
    """Store of images in one folder. The caller runs the loops `sweep` and `watch`.

    Until the first sweep, files of earlier runs are served, but do not count towards `max_bytes`.

    Args:
        life_s: how long an image of unknown expiry is kept, from when a sweep finds it.
    """

    def __init__(
        self,
        folder: Path,
        max_bytes: int,
        *,
        life_s: float = 86_400.0,
        health: StoreHealth | None = None,
        clock: Callable[[], float] = time.time,
        lookups: DiskLookups | None = None,
    ) -> None:
        self.health = health or StoreHealth(f"the folder {folder}")
        self._folder = folder
        self._root = str(folder)
        self._life_s = life_s
        self._clock = clock
        self._lookups = lookups or DiskLookups()
        self._index = DiskIndex(max_bytes)
        self._expiry = ExpiryIndex(folder.with_name(f"{folder.name}.expiry"))
        self._checked = CheckedFiles()
        self._watch = DiskWatch(folder, self.health, clock, self._index.newest, is_cache=self._lookups.is_cache)
        self._calls = DiskCalls(self._watch)
        self._names = FolderNames(folder, self._calls, self._lookups.may_be_flat, self._lookups.meet_peers)
        self._parts: dict[str, float] = {}
        self._sweep_failed = False
        self._flush_timer: asyncio.TimerHandle | None = None
        self._flushing: asyncio.Task[None] | None = None

    @property
    def store_id(self) -> str:
        """The id of the folder; empty until the folder could be written, if it has none from before."""
        return self._watch.folder_id

    @property
    def spool_health(self) -> StoreHealth:
        """The health of this store."""
        return self.health

    @property
    def spool_folder(self) -> Path | None:
        """The folder for files that are not saved yet, on the same file system as the images; None if that hangs."""
        return None if self._watch.hangs else self._watch.spool.path

    async def start(self) -> None:
        """Make the folder and probe it. A folder that can't be used is not healthy, and is tried again by `watch`."""
        await self._watch.start()

    async def close(self) -> None:
        """Write the index of expiries, and remove the spool folder of this process."""
        if self._flush_timer is not None:
            self._flush_timer.cancel()
        if self._flushing is not None:
            self._flushing.cancel()
        closing = asyncio.ensure_future(in_file_thread(self._close_files))
        await asyncio.wait({closing}, timeout=CLOSE_S)

    def _close_files(self) -> None:
        self._expiry.flush()
        self._watch.spool.remove()

    async def watch(self) -> None:
        """Check until cancelled whether images can be saved."""
        await self._watch.run()

    async def check(self) -> None:
        """Check once whether images can be saved."""
        await self._watch.check()

    async def save(self, task_id: str, index: int, image: VerifiedImage, expires_at_s: float) -> None:
        """Write the file, after the oldest ones are removed to fit it. The newest image always stays."""
        try:
            await self._calls.quick(self._watch.require_volume)
            await self._names.choose()
        except StoreUnavailable as error:
            self._watch.save_failed(image.size_bytes, error.__cause__ or error)
            raise
        name = self._names.new(task_id, index, image.sha256, image.content_type)
        self._index.add_unwritten(name, image.size_bytes, expires_at_s)
        self._watch.save_begins(name, image.size_bytes)
        try:
            signature = await self._evict_and_write(name, task_id, image, expires_at_s)
        except StoreUnavailable as error:
            self._forget([name])
            if not isinstance(error, SpooledImageLost | StoreFull):
                self._watch.save_failed(image.size_bytes, error.__cause__ or error)
            raise
        finally:
            self._index.written(name)
            self._watch.save_ends(name)
        self._watch.saved(image.size_bytes)
        self._flush_soon()
        if signature is not None:
            self._checked.add(name, image.sha256, signature, self._cacheable(image))

    async def reuse(self, source_id: str, image: StoredImage, task_id: str, index: int, expires_at_s: float) -> bool:
        """Give the file a name of the other task too. Return False if it is not in this folder."""
        if (source := await self._find(source_id, image)) is None:
            return False
        name = self._names.new(task_id, index, image.sha256, image.content_type)
        self._index.add_unwritten(name, image.size_bytes, expires_at_s)
        try:
            is_there = await self._calls.repeatable(image.size_bytes, self._link, source, name, image, expires_at_s)
        except StoreUnavailable as error:
            self._forget([name])
            self._watch.save_failed(image.size_bytes, error.__cause__ or error)
            raise
        finally:
            self._index.written(name)
        if not is_there:
            self._forget([name])
            return False
        self._index.share(source)
        self._flush_soon()
        return True

    def _link(self, source: str, name: str, image: StoredImage, expires_at_s: float) -> bool:
        self._expiry.note(task_of(name), expires_at_s)
        is_there = files.link_image(self._folder, source, name, image, expires_at_s)
        self._expiry.flush()
        return is_there

    async def open(self, task_id: str, image: StoredImage) -> OpenedImage | None:
        """Open the file; None if it is gone or damaged.

        Raises StoreUnavailable also where another instance that lives has the only copy.
        """
        if not image.sha256:
            return None
        await self._names.learn()
        for name in self._names.stored(task_id, image):
            if (opened := await self._open(name, image)) is not None:
                return opened
        self._check_elsewhere(image)
        return None

    async def _open(self, name: str, image: StoredImage) -> OpenedImage | None:
        if await self._is_expired(name):
            return None
        if (cached := await self._cached(name, image)) is not None:
            return OpenedImage(image.size_bytes, cached.data, reservation=cached.reservation)
        signature, reservation = self._checked.signature(name, image.sha256), self._checked.reserve(image.size_bytes)
        max_data_bytes = files.SMALL_BYTES if reservation is None else image.size_bytes
        try:
            read = await self._calls.repeatable(
                image.size_bytes, files.read_image, self._root, name, image, signature, max_data_bytes
            )
            if read is None:
                await self._calls.quick(self._watch.require_volume)
        except StoreUnavailable as error:
            self.health.log_failed_read(error.__cause__ or error)
            raise
        if read is None:
            self._forget([name])
            return None
        cached = CachedImage(read.data, reservation) if read.data is not None and reservation is not None else None
        self._checked.add(name, image.sha256, read.signature, cached)
        is_slow = not self._watch.is_quick
        return OpenedImage(image.size_bytes, read.data, read.file, reservation=reservation, is_slow=is_slow)

    async def contains(self, task_id: str, image: StoredImage) -> bool:
        """Return whether the file is there. Raises StoreUnavailable also as `open` does."""
        if image.sha256 and await self._find(task_id, image) is not None:
            return True
        self._check_elsewhere(image)
        return False

    async def contains_all(self, task_id: str, images: Sequence[StoredImage]) -> bool:
        """Return whether each file is there with its size. An image that stays upstream is not missing here."""
        here = [image for image in images if image.sha256]
        if len(here) + sum(image.url is not None for image in images) < len(images):
            return False
        missing = [image for image in here if await self._find(task_id, image) is None]
        return all(map(self._elsewhere, missing))

    async def find(self, task_id: str, since_s: float) -> list[StoredImage]:
        """Return the images of a task that are here, by their names."""
        await self._calls.quick(self._watch.require_volume)
        return await self._calls.repeatable(0, find_images, self._root, task_id, since_s, self.store_id)

    async def extend_expiry(self, task_id: str, images: Sequence[StoredImage], expires_at_s: float) -> None:
        """Set when the files expire; those that are gone stay gone."""
        files_of = [(await self._file_of(task_id, image), image) for image in images if image.sha256]
        there = {name: image for name, image in files_of if name is not None}
        for name, image in there.items():
            self._index.add(name, image.size_bytes, expires_at_s)
        if there:
            await self._calls.repeatable(0, self._note_expiry, task_id, list(there), expires_at_s)

    async def sweep(self) -> None:
        """Sweep until cancelled: at once, then every few minutes. A failing disk is logged once."""
        while True:
            try:
                await self.sweep_once()
                self._sweep_failed = False
            except StoreUnavailable as error:
                if not self._sweep_failed:
                    logger.warning("the image folder can't be swept: {}", error.__cause__ or "the disk does not answer")
                self._sweep_failed = True
            await asyncio.sleep(SWEEP_INTERVAL_S)

    async def sweep_once(self) -> None:
        """Remove expired images, add those that other processes saved, and hold the folder under the cap."""
        now = self._clock()
        await self._calls.quick(self._watch.require_volume)
        swept = await self._calls.unlimited(
            sweep_folder, self._folder, self._index.snapshot(), self._expiry, now=now, life_s=self._life_s
        )
        changed = self._index.replace(swept.entries)
        for name in swept.gone:
            if name not in changed:
                self._checked.forget(name)
        self._parts = {name: self._parts.get(name, now) for name in swept.parts}
        orphans = [name for name, seen_at_s in self._parts.items() if now - seen_at_s >= ORPHAN_S]
        expired = self._index.take_expired(now)
        await self._calls.unlimited(self._finish_sweep, swept, expired, [*orphans, *await self._take_over_cap()])

    def _finish_sweep(self, swept: SweptFolder, expired: dict[str, IndexEntry], useless: list[str]) -> None:
        self._expiry.refresh()
        for task_id, expires_at_s in swept.unknown.items():
            if self._expiry.expiry_of(task_id) is None:
                self._expiry.note(task_id, expires_at_s)
        self._expiry.flush()
        self._remove_superfluous(expired, useless)
        self._expiry.forget_expired(self._clock(), keep=swept.tasks)

    async def _evict_and_write(
        self, name: str, task_id: str, image: VerifiedImage, expires_at_s: float
    ) -> Signature | None:
        expired = self._index.take_expired(self._clock(), batch=EXPIRED_AT_ONCE)
        over_cap = await self._take_over_cap() if self._index.is_over_cap else []
        is_full = is_upload(task_id) and self._index.is_over_cap

        def write() -> Signature | None:
            if expired or over_cap:
                with suppress(OSError):
                    self._remove_superfluous(expired, over_cap)
            if is_full:
                raise StoreFull
            self._expiry.note(task_id, expires_at_s)
            try:
                files.write_image(self._folder, name, image, expires_at_s)
            except FileNotFoundError as error:
                if image.path is not None and not image.path.exists():
                    raise SpooledImageLost from error
                raise
            with suppress(OSError):
                status = os.stat(name)  # noqa: PTH116 - a Path costs more than the call
                if abs(status.st_mtime - expires_at_s) > _COARSE_TIME_S:
                    self._expiry.flush()  # the file does not show it to processes that hold its name for expired
                return Signature.of(status)
            return None

        return await self._calls.unlimited(write)

    async def _take_over_cap(self) -> list[str]:
        if not self._index.is_over_cap:
            return []
        return await take_over_cap(self._index, task_of, self._lookups.find_needed)

    def _flush_soon(self) -> None:
        """Flush within FLUSH_S, once for all images that are saved until then."""
        if self._flush_timer is None:
            self._flush_timer = asyncio.get_running_loop().call_later(FLUSH_S, self._start_flush)

    def _start_flush(self) -> None:
        self._flush_timer = None
        if self._flushing is None or self._flushing.done():
            self._flushing = asyncio.create_task(self._flush())
        else:
            self._flush_soon()

    async def _flush(self) -> None:
        """Write the index of expiries and make the files durable. A disk that can't do it is not healthy."""
        try:
            await in_flush_thread(self._flush_files)
        except OSError as error:
            self.health.mark_failed(error)

    def _flush_files(self) -> None:
        self._expiry.flush()
        with suppress(*files.MISSING):
            files.flush(self._root)

    def _remove_superfluous(self, expired: dict[str, IndexEntry], over_cap: list[str]) -> None:
        """Remove files. Keep expired ones that were written again, or that another process has extended, meanwhile."""
        if expired:
            self._expiry.refresh()
        files.remove([*(name for name, entry in expired.items() if not self._extended(name, entry)), *over_cap])

    def _note_expiry(self, task_id: str, names: list[str], expires_at_s: float) -> None:
        self._expiry.note(task_id, expires_at_s)
        self._expiry.flush()
        for name in names:
            files.stamp(name, expires_at_s)

    def _extended(self, name: str, entry: IndexEntry) -> float | None:
        """Return a later expiry that another process noted, or will note within FLUSH_S and set as the file's time."""
        later_s = self._expiry.later_than(task_of(name), entry.expires_at_s)
        latest_s = self._clock() + 2 * self._life_s
        with suppress(OSError):
            if later_s is None and entry.expires_at_s + 1 < (modified_s := os.stat(name).st_mtime) <= latest_s:  # noqa: PTH116
                return modified_s
        return later_s

    def _read_extended(self, name: str, entry: IndexEntry) -> float | None:
        self._expiry.refresh()
        return self._extended(name, entry)

    async def _is_expired(self, name: str) -> bool:
        entry, now = self._index.get(name), self._clock()
        if entry is None or entry.expires_at_s > now:
            return False
        later_s = await self._calls.repeatable(0, self._read_extended, name, entry)
        if later_s is None or later_s <= now:
            return True
        self._index.add(name, entry.size_bytes, later_s)
        return False

    async def _find(self, task_id: str, image: StoredImage) -> str | None:
        """Return the path of an image's file; None if it is gone or expired."""
        name = await self._file_of(task_id, image)
        return None if name is None or await self._is_expired(name) else name

    async def _file_of(self, task_id: str, image: StoredImage) -> str | None:
        await self._names.learn()
        for name in self._names.stored(task_id, image):
            if await self._has_file(name, image):
                return name
        return None

    async def _has_file(self, name: str, image: StoredImage) -> bool:
        size_bytes = await self._calls.quick(files.stat_file, self._root, name)
        if size_bytes is None:
            await self._calls.quick(self._watch.require_volume)
        return size_bytes == image.size_bytes

    async def _cached(self, name: str, image: StoredImage) -> CachedImage | None:
        """Return the bytes in memory, if the file is still the same."""
        cached, signature = self._checked.cached(name, image.sha256), self._checked.signature(name, image.sha256)
        if cached is None or len(cached.data) != image.size_bytes:
            return None
        try:
            status = await self._calls.quick(os.stat, name)
        except StoreUnavailable:
            return None
        return cached if Signature.of(status) == signature else None

    def _cacheable(self, image: VerifiedImage) -> CachedImage | None:
        """Return the bytes of a small image that is saved, with their reservation."""
        if image.data is None or image.size_bytes > files.SMALL_BYTES:
            return None
        reservation = self._checked.reserve(image.size_bytes)
        return CachedImage(image.data, reservation) if reservation is not None else None

    def _check_elsewhere(self, image: StoredImage) -> None:
        if self._elsewhere(image):
            raise StoreUnavailable

    def _elsewhere(self, image: StoredImage) -> bool:
        """Return whether an instance with its own folder keeps it."""
        return image.store_id not in ("", self.store_id) and self._lookups.others_live()

    def _forget(self, names: Iterable[str]) -> None:
        for name in names:
            self._index.forget(name)
            self._checked.forget(name)
