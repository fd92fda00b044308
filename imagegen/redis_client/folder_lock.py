"""Lock of the data folder of an embedded Redis. Its holder, or a child that inherits it, runs the server."""

from __future__ import annotations

import errno
import fcntl
import os
from contextlib import ExitStack
from pathlib import Path

FolderLock = tuple[int, int]
"""Descriptors of the lock file and of the folder itself."""

_NO_FOLDER_LOCKS = frozenset({errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.EOPNOTSUPP})
"""Errors of network file systems, which lock files only."""


def try_lock(folder: Path) -> FolderLock | None:
    """Return the lock; None if another process, or a server that outlives it, holds it. Raises OSError.

    The folder is locked too: a user may delete the file as a stale one.
    """
    with ExitStack() as stack:
        file = _open(_file_of(folder), os.O_RDWR | os.O_CREAT, stack)
        whole = _open(folder, os.O_RDONLY, stack)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _lock_whole(whole)
        except BlockingIOError:
            return None
        os.ftruncate(file, 0)
        os.pwrite(file, str(os.getpid()).encode(), 0)
        stack.pop_all()
    return file, whole


def is_owner_gone(folder: Path) -> bool:
    """Return whether the process that took the lock last has ended; also if it is out of sight, in a container."""
    try:
        os.kill(int(_file_of(folder).read_text()), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError):
        return False
    return False


def _file_of(folder: Path) -> Path:
    return folder / "lock"


def _open(path: Path, flags: int, stack: ExitStack) -> int:
    """Open a file until the stack ends."""
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o600)
    stack.callback(os.close, descriptor)
    return descriptor


def _lock_whole(folder: int) -> None:
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno not in _NO_FOLDER_LOCKS:
            raise
