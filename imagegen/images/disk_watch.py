"""Watch of a folder of images: whether it can be written and has enough free space, also after it could not."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from pathlib import Path

from imagegen.images.folder_mark import mark_of, read_id, read_mark
from imagegen.images.folder_probe import ProbeFailed, check_access, check_space, step
from imagegen.images.mounts import is_local
from imagegen.images.spool_folder import SpoolFolder
from imagegen.images.store import in_file_thread
from imagegen.images.store_health import StoreHealth
from imagegen.images.store_recovery import NeededSpace, RecoveryPace

CHECK_INTERVAL_S = 1.0
KNOWN_IMAGES = 20
"""Images of which one is enough to recognise the folder."""

SLOW_CHECK_S = 10.0
"""A check of the disk that takes longer is a failure of the disk."""

BYTES_PER_S = 1_000_000
"""Slowest rate of a disk that answers: the bytes of an image lengthen the time limit of its call by it."""

NO_ANSWER = f"ETIMEDOUT the disk does not answer within {SLOW_CHECK_S:g} s"

FileId = tuple[int, int]

QUICK_CHECK_S = 0.1
"""While a check takes longer, the disk may keep any call waiting."""


class DiskWatch:
    """Watch that probes a folder at the start, and again after a failure until it succeeds; it sets `health`.

    folder_id: the id of the folder, empty until it could be written if it has no mark.
    hangs: whether a check has not ended for SLOW_CHECK_S.
    newest: returns paths of the images that were saved last, up to a number.
    is_cache: the images are elsewhere too, so that a deleted or replaced folder costs nothing.
    """

    def __init__(
        self,
        folder: Path,
        health: StoreHealth,
        clock: Callable[[], float],
        newest: Callable[[int], list[str]],
        *,
        is_cache: bool,
    ) -> None:
        self._is_cache = is_cache
        self.folder_id = ""
        self.hangs = False
        self.spool = SpoolFolder(folder.with_name("spool"))
        self._folder = folder
        self._root = str(folder)
        self._health = health
        self._largest_bytes = 0
        self._needed = NeededSpace(clock)
        self._mark = mark_of(folder)
        self._newest = newest
        self._checking_since_s: float | None = None
        self._save_ends_by_s: dict[str, float] = {}
        self._beginning: asyncio.Future[None] | None = None
        self._is_local = False
        self._data_id: FileId | None = None
        self._images_id: FileId | None = None
        self._is_gone = False

    @property
    def is_quick(self) -> bool:
        """Whether the loop itself may call the system for a file: the disk is of this machine, and answers."""
        since_s = self._checking_since_s
        return self._is_local and (since_s is None or time.monotonic() - since_s < QUICK_CHECK_S)

    async def start(self) -> None:
        """Make the folder and probe it. For a disk that does not answer, `run` waits on."""
        self._beginning = asyncio.ensure_future(self._begin())
        if (await asyncio.wait([self._beginning], timeout=SLOW_CHECK_S + QUICK_CHECK_S))[0]:
            await self._beginning

    async def _begin(self) -> None:
        call = asyncio.ensure_future(in_file_thread(self._folder.parent.mkdir, parents=True, exist_ok=True))
        try:
            await self._result_of(call)
        except OSError as error:
            self._health.mark_failed(error)
            return
        finally:
            self._checking_since_s, self.hangs = None, False
        if not await self.check():
            self.folder_id = await in_file_thread(read_id, self._mark)

    async def _result_of(self, call: asyncio.Future[None]) -> bool:
        """Wait for a call, and set meanwhile whether the disk hangs; return whether it did. Raises as the call."""
        self._checking_since_s = time.monotonic()
        hung = self.hangs = bool((await asyncio.wait({call}, timeout=SLOW_CHECK_S))[1])
        if hung:
            self._health.mark_failed(NO_ANSWER)
        await call
        return hung

    def saved(self, size_bytes: int) -> None:
        """Record the size of an image that was saved."""
        self._largest_bytes = max(self._largest_bytes, size_bytes)
        self._needed.saved(size_bytes)

    def save_failed(self, size_bytes: int, error: BaseException) -> None:
        """Record that an image could not be saved: as much space is needed before the folder is healthy again."""
        self._needed.save_failed(size_bytes)
        self._health.mark_failed(error)

    def save_begins(self, name: str, size_bytes: int) -> None:
        """Record that an image is being saved."""
        self._save_ends_by_s[name] = time.monotonic() + limit_s(size_bytes)

    def save_ends(self, name: str) -> None:
        """Record that an image is saved, or can't be."""
        self._save_ends_by_s.pop(name, None)

    async def run(self) -> None:
        """Check until cancelled; less often if each recovery is soon followed by a failure."""
        pace = RecoveryPace(CHECK_INTERVAL_S)
        if self._beginning is not None:
            await self._beginning
        while True:
            await asyncio.sleep(CHECK_INTERVAL_S)
            if self._save_ends_by_s and min(self._save_ends_by_s.values()) < time.monotonic():
                self._health.mark_failed(NO_ANSWER)
            if self._health.writable:
                await self.check()
            else:
                await pace.recover(self.check)

    async def check(self) -> bool:
        """Check the free space, and after a failure everything else; return whether images can be saved."""
        may_end_failure = not self._health.writable
        newest = self._newest(KNOWN_IMAGES)
        call = asyncio.ensure_future(in_file_thread(self._inspect, self._needed.size_bytes, newest))
        try:
            may_end_failure = await self._result_of(call) or may_end_failure
        except ProbeFailed as error:
            self._health.mark_failed(str(error))
        except OSError as error:
            self._health.mark_failed(error)
        else:
            if may_end_failure:  # if a save failed meanwhile, only a check of everything shows that it is over
                self._health.mark_ok()
        finally:
            self._checking_since_s, self.hangs = None, False
        return self._health.writable

    def require_volume(self) -> None:
        """Raise OSError if the folder is not there, or another one than at the last check; one call of the system."""
        try:
            images_id = self._id_of(os.stat(self._root))  # noqa: PTH116 - a Path costs more than the call
        except OSError:
            if self._images_id is None or self._is_cache:
                return  # its use reports that
            raise
        if self._is_gone or self._images_id not in (None, images_id):
            raise OSError(f"its volume is gone: {another(self._images_id, images_id)}")

    def _inspect(self, needed_bytes: int, newest: list[str]) -> None:
        try:
            self._check_volume()
            if self._images_id is None or self._is_cache:  # an empty folder would be in the way of one that is put back
                self._folder.mkdir(exist_ok=True)
            self._check_images(newest)
        except (ProbeFailed, FileNotFoundError, NotADirectoryError):
            self._is_gone = True
            raise
        self._is_gone = False
        check_space(self._folder, self._largest_bytes, needed_bytes)
        if self._health.writable and self.folder_id:
            return
        check_access(self._folder, needed_bytes)
        with step(f"making a folder in {self.spool.path.parent.name}"):
            self.spool.make()
            self.spool.remove_abandoned()
        with step(f"reading {self._mark.name}"):
            self.folder_id = self.folder_id or read_mark(self._mark)

    def _check_volume(self) -> None:
        """Raise ProbeFailed if another folder is in the place of DATA_DIR, as below a volume that was unmounted."""
        data_id = self._id_of(self._folder.parent.stat())
        if self._data_id not in (None, data_id) and not self._mark.exists():
            raise ProbeFailed(f"ENOENT its volume is gone: {another(self._data_id, data_id)}, without its mark")
        self._data_id = data_id

    def _check_images(self, newest: list[str]) -> None:
        """Raise ProbeFailed if another folder is in the place of this one, without the newest images.

        They are there after the volume was mounted again, or if the images were moved.
        """
        images_id = self._id_of(self._folder.stat())
        if self._images_id not in (None, images_id) and newest and not any(map(os.path.exists, newest)):
            raise ProbeFailed(f"ENOENT its volume is gone: {another(self._images_id, images_id)}, without its images")
        if images_id != self._images_id:
            self._is_local = is_local(self._folder)
        self._images_id = images_id

    def _id_of(self, status: os.stat_result) -> FileId:
        """Return device and inode of a folder, 0 as the inode of a cache."""
        return status.st_dev, 0 if self._is_cache else status.st_ino


def another(before: FileId | None, now: FileId) -> str:
    """Return how a folder differs from that of the last check."""
    if before is not None and before[0] == now[0]:
        return "another folder is in its place"
    return "the folder is on another file system"


def limit_s(size_bytes: int) -> float:
    """Return the time limit, in seconds, of a call that moves these bytes."""
    return SLOW_CHECK_S + size_bytes / BYTES_PER_S
