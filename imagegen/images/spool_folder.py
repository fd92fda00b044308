"""Folder of a process for image files that are not saved yet; the folders of processes that ended are removed."""

from __future__ import annotations

import fcntl
import os
import secrets
from contextlib import suppress
from io import FileIO
from pathlib import Path

from imagegen.images.files import remove_tree

LOCK_NAME = "lock"


class SpoolFolder:
    """A folder under `parent`, locked as long as this process lives. Methods block and raise OSError."""

    def __init__(self, parent: Path) -> None:
        self.path = parent / secrets.token_hex(6)
        self._lock: int | None = None

    def make(self) -> None:
        """Make the folder, again if it was deleted. The folder above `parent` must be there."""
        if self._lock is not None and (self.path / LOCK_NAME).exists():
            return
        self.close()
        self.path.parent.mkdir(exist_ok=True)
        self.path.mkdir(exist_ok=True)
        # A file that is open for writing would keep an operator from remounting the disk read-only.
        self._lock = os.open(self.path / LOCK_NAME, os.O_CREAT | os.O_RDONLY)
        with suppress(OSError):
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def remove_abandoned(self) -> None:
        """Remove the folders of ended processes; none on a file system without locks."""
        for folder in self.path.parent.iterdir():
            if folder != self.path and _is_abandoned(folder):
                remove_tree(folder)

    def remove(self) -> None:
        """Remove the folder with its files.

        NFS and FUSE keep an open file that is removed under another name, and with it the folder.
        """
        self.close()
        remove_tree(self.path)

    def close(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _is_abandoned(folder: Path) -> bool:
    try:
        with FileIO(folder / LOCK_NAME) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return os.path.samestat(os.fstat(lock.fileno()), (folder / LOCK_NAME).stat())
    except OSError:
        return False
