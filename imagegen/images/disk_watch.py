"""Watch of a folder of images: whether it can be written and has enough free space, also after it could not."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from imagegen.images import files
from imagegen.images.folder_probe import ProbeFailed, check_access, check_space
from imagegen.images.spool_folder import SpoolFolder
from imagegen.images.store import in_file_thread
from imagegen.images.store_health import StoreHealth

CHECK_INTERVAL_S = 1.0
MAX_CHECK_INTERVAL_S = 30.0
FLAP_S = 10.0
"""A failure this soon after a recovery shows that the check does not see what fails."""

SLOW_CHECK_S = 10.0
"""A check of the disk that takes longer is a failure of the disk."""

NEEDED_S = 600.0
"""How long the size of an image that could not be saved counts as needed: its task may have ended meanwhile."""


class DiskWatch:
    """Probes a folder at the start, and again after a failure until it succeeds; keeps `health` up to date.

    folder_id: the id of the folder, empty until it could be written.
    """

    def __init__(self, folder: Path, health: StoreHealth, clock: Callable[[], float]) -> None:
        self.folder_id = ""
        self.spool = SpoolFolder(folder.with_name("spool"))
        self._folder = folder
        self._health = health
        self._clock = clock
        self._largest_bytes = 0
        self._needed_bytes, self._needed_until_s = 0, 0.0
        self._mark = folder.with_name(f"{folder.name}.mark")
        self._device: int | None = None

    async def start(self) -> None:
        """Make the folder and probe it."""
        try:
            await in_file_thread(self._folder.parent.mkdir, parents=True, exist_ok=True)
        except OSError as error:
            self._health.mark_failed(error)
            return
        await self.check()

    def saved(self, size_bytes: int) -> None:
        """Record the size of an image that was saved."""
        self._largest_bytes = max(self._largest_bytes, size_bytes)
        if size_bytes >= self._needed_bytes:
            self._needed_bytes = 0

    def save_failed(self, size_bytes: int, error: BaseException) -> None:
        """Record that an image could not be saved: as much space is needed before the folder is healthy again."""
        self._needed_bytes = max(self._needed(), size_bytes)
        self._needed_until_s = self._clock() + NEEDED_S
        self._health.mark_failed(error)

    async def run(self) -> None:
        """Check until cancelled; seldomer if each recovery is soon followed by a failure."""
        loop = asyncio.get_running_loop()
        retry_s, recovered_at_s = CHECK_INTERVAL_S, -FLAP_S
        while True:
            await asyncio.sleep(CHECK_INTERVAL_S)
            if self._health.writable:
                await self.check()
                continue
            flaps = loop.time() - recovered_at_s < FLAP_S
            retry_s = min(2 * retry_s, MAX_CHECK_INTERVAL_S) if flaps else CHECK_INTERVAL_S
            await asyncio.sleep(retry_s - CHECK_INTERVAL_S)
            healthy = await self.check()
            while not healthy:
                await asyncio.sleep(retry_s)
                healthy = await self.check()
            recovered_at_s = loop.time()

    async def check(self) -> bool:
        """Check the free space, and after a failure everything else; return whether images can be saved."""
        call = asyncio.ensure_future(in_file_thread(self._inspect, self._needed()))
        _, late = await asyncio.wait({call}, timeout=SLOW_CHECK_S)
        if late:
            self._health.mark_failed(f"ETIMEDOUT the disk does not answer within {SLOW_CHECK_S:g} s")
        try:
            await call
        except ProbeFailed as error:
            self._health.mark_failed(str(error))
        except OSError as error:
            self._health.mark_failed(error)
        else:
            self._health.mark_ok()
        return self._health.writable

    def _inspect(self, needed_bytes: int) -> None:
        self._check_volume()
        self._folder.mkdir(exist_ok=True)
        check_space(self._folder, self._largest_bytes, needed_bytes)
        if self._health.writable and self.folder_id:
            return
        check_access(self._folder, needed_bytes)
        self.spool.make()
        self.spool.remove_abandoned()
        self.folder_id = self.folder_id or files.read_marker(self._mark)

    def _check_volume(self) -> None:
        """Raise ProbeFailed if the volume was unmounted: images are not to be saved in the folder below it."""
        device = self._folder.parent.stat().st_dev
        if self._device not in (None, device) and not self._mark.exists():
            raise ProbeFailed("ENOENT its volume is gone: the folder is on another file system, without its mark")
        self._device = device

    def _needed(self) -> int:
        return self._needed_bytes if self._clock() < self._needed_until_s else 0
