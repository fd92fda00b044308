"""Probe of the folder of images: what of it fails, and how much space is left. It blocks."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from imagegen.images.files import sync
from imagegen.images.store_health import describe

FREE_BYTES = 64 * 1024 * 1024
FREE_PART = 20
"""At least FREE_BYTES stay free, on a small disk a twentieth of it, so that images under way still fit."""

_CONTENT = b"imagegen probe\n" * 64
_NOT_SUPPORTED = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV}


class ProbeFailed(Exception):
    """The folder can't be used; the text names the step and the errno."""


def check_space(folder: Path, largest_bytes: int, needed_bytes: int) -> None:
    """Raise ProbeFailed if too little space is free.

    Args:
        largest_bytes: of an image that was saved recently; twice as much is to be free.
        needed_bytes: of an image that waits for space.
    """
    try:
        space = shutil.disk_usage(folder)
    except OSError as error:
        raise ProbeFailed(f"{describe(error)} (reading the free space)") from error
    mark_bytes = min(max(FREE_BYTES, 2 * largest_bytes), space.total // FREE_PART)
    if space.free < max(mark_bytes, needed_bytes):
        raise ProbeFailed(
            f"ENOSPC {os.strerror(errno.ENOSPC)}: {_megabytes(space.free)} of {_megabytes(space.total)} are free, "
            f"{_megabytes(max(mark_bytes, needed_bytes))} are needed"
        )


def check_access(folder: Path, needed_bytes: int) -> None:
    """Write a file, read it back, rename and delete it, and make a folder. Raises ProbeFailed.

    needed_bytes: this much is allocated too, since a quota or a limit of the process is not shown as free space.
    """
    path = folder / f".probe-{secrets.token_hex(4)}"
    renamed = path.with_name(f"{path.name}.renamed")
    try:
        with step("writing a file"), path.open("xb") as file:
            file.write(_CONTENT)
            file.flush()
            if needed_bytes:
                _allocate(file.fileno(), needed_bytes)
            sync(file.fileno())
        with step("reading it back"):
            with path.open("rb") as file:
                content = file.read(len(_CONTENT))
            if content != _CONTENT:
                raise ProbeFailed("a file that was written reads back differently")
        with step("renaming it"):
            path.replace(renamed)
        with step("deleting it"):
            renamed.unlink()
        with step("making a folder"):
            path.mkdir()
            path.rmdir()
    finally:
        with suppress(OSError):
            path.rmdir()
        for left in (path, renamed):
            with suppress(OSError):
                left.unlink()


def _allocate(descriptor: int, size_bytes: int) -> None:
    try:
        os.posix_fallocate(descriptor, 0, size_bytes)
    except (AttributeError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in _NOT_SUPPORTED:
            raise


@contextmanager
def step(name: str) -> Iterator[None]:
    """Raise an OSError within it as ProbeFailed that names the step."""
    try:
        yield
    except OSError as error:
        raise ProbeFailed(f"{describe(error)} ({name})") from error


def _megabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.1f} MB"
