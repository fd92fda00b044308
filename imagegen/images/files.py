"""Owns what is done to the files of pictures: whole or not there, and what lies in a folder. It blocks.

A file's mtime is the time when it expires. Functions raise OSError where nothing else is said.
"""

from __future__ import annotations

import hashlib
import io
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from os import stat as stat_of
from pathlib import Path

from imagegen.tasks.image import StoredImage

ORPHAN_S = 600.0
"""An unfinished file older than this was left by a process that died while it wrote."""

_WRITE_TRIES = 5
_MISSING = (FileNotFoundError, NotADirectoryError)


@dataclass(frozen=True, slots=True)
class Kept:
    """One picture's file."""

    size_bytes: int
    expires_at_s: float


@dataclass(frozen=True, slots=True)
class Scan:
    """What lies in the folder: pictures, and files that nobody needs any more."""

    kept: dict[Path, Kept]
    useless: list[Path]


def write(path: Path, data: bytes, expires_at_s: float) -> None:
    """The name appears only once the bytes are on the disk: a power cut can't turn a paid picture into an empty one."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with _create(part) as file:
            file.write(data)
            file.flush()
            os.utime(file.fileno(), (expires_at_s, expires_at_s))
            os.fsync(file.fileno())
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def _create(path: Path) -> io.BufferedWriter:
    """Opens a new file. A sweep, here or in another process, may remove the empty folder under our hands."""
    for _ in range(_WRITE_TRIES):
        with suppress(FileNotFoundError, FileExistsError):
            path.parent.mkdir(parents=True, exist_ok=True)
            return path.open("xb")
    raise FileNotFoundError(str(path))


def read(path: Path, image: StoredImage, now: float) -> bytes | None:
    """The bytes, compared with their SHA-256; a damaged file is removed. None where there is no whole one."""
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_mtime <= now:
                return None
            data = file.read()
    except _MISSING:
        return None
    if not hashlib.sha256(data).hexdigest().startswith(image.sha256):
        with suppress(OSError):
            path.unlink()
        return None
    return data if len(data) == image.size_bytes else None


def is_there(name: str, image: StoredImage, now: float) -> bool:
    """Whether the file is whole and not expired, by its size and time."""
    try:
        found = stat_of(name)  # noqa: PTH116 - a Path costs more than the call
    except _MISSING:
        return False
    return found.st_size == image.size_bytes and found.st_mtime > now


def marked(path: Path) -> str:
    """The mark of the folder, made at its first use; all who share the folder share it."""
    with suppress(FileExistsError), path.open("x", encoding="ascii") as file:
        file.write(secrets.token_hex(8))
    return path.read_text(encoding="ascii").strip()


def set_end(paths: Iterable[Path], expires_at_s: float) -> None:
    """Sets when files expire; those that are gone stay gone."""
    for path in paths:
        with suppress(*_MISSING):
            os.utime(path, (expires_at_s, expires_at_s))


def remove(paths: Iterable[Path], expired_at_s: float | None = None) -> None:
    """Removes files and the folders that this empties; with a time, only files that are still expired then."""
    folders = set()
    for path in paths:
        with suppress(*_MISSING):
            if expired_at_s is None or path.stat().st_mtime <= expired_at_s:
                path.unlink()
        folders.add(path.parent)
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def scan(folder: Path, now: float) -> Scan:
    """What lies two folders down."""
    found = Scan({}, [])
    for path, stat in _files(folder, depth=2):
        if path.suffix == ".part":
            if stat.st_mtime < now - ORPHAN_S:
                found.useless.append(path)
        elif stat.st_mtime <= now:
            found.useless.append(path)
        else:
            found.kept[path] = Kept(stat.st_size, stat.st_mtime)
    return found


def _files(folder: Path, depth: int) -> Iterator[tuple[Path, os.stat_result]]:
    """The files exactly `depth` folders down; others are not ours. What vanishes meanwhile is left out."""
    with suppress(*_MISSING), os.scandir(folder) as entries:
        for entry in entries:
            if depth and entry.is_dir(follow_symlinks=False):
                yield from _files(Path(entry.path), depth - 1)
            elif not depth and entry.is_file(follow_symlinks=False):
                with suppress(*_MISSING):
                    yield Path(entry.path), entry.stat(follow_symlinks=False)
