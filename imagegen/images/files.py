"""Blocking work on the files of images: write, open, scan, remove. Functions raise OSError if not noted otherwise.

Nothing here depends on what some mounts lack (SMB, NFS, s3fs, gcsfuse): neither on times of files nor on fsync.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import itertools
import mmap
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import NamedTuple, cast

from loguru import logger
from msgspec import Struct

from imagegen.images.store import PIECE_BYTES, VerifiedImage
from imagegen.tasks.image import StoredImage

SMALL_BYTES = 256 * 1024
"""Images up to this size are always read at once; larger ones only if they fit into the cache."""

PART_SUFFIX = ".part"
_PROCESS = secrets.token_hex(4)
_part_numbers = itertools.count()
MISSING = (FileNotFoundError, NotADirectoryError)

_OBSTACLES = {errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.EEXIST, errno.ENOTEMPTY}
"""Errors of a path where something else is than a file in its folders."""

NEW_FILE = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
"""Flags for a file that must not exist before."""

_WRITE_BYTES = 64 * 1024
"""Bytes of a large piece that are written at once. For more, Linux allocates larger blocks for its cache of the file,
which a virtual machine often has to get from its host first: 5 ms more for an image of 2 MB."""

_MAX_IOV = 512
"""Pieces that are passed to the system at once; POSIX systems take 1,024."""

_WRITE_TRIES = 5
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EMLINK, errno.EXDEV}
_NO_FSYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM, errno.EROFS}


class Signature(NamedTuple):
    """Attributes of a file that change with its content, as far as the file system shows them."""

    inode: int
    size_bytes: int
    modified_ns: int
    changed_ns: int

    @classmethod
    def of(cls, stat: os.stat_result) -> Signature:
        return cls(stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


class FoundFile(Struct, frozen=True, gc=False):
    """A file that a scan found. links: how many names it has."""

    size_bytes: int
    modified_s: float
    inode: int
    links: int


class ReadFile(Struct, frozen=True):
    """A file with the content of its image: as an open file, or its bytes if it is small."""

    signature: Signature
    file: FileIO | None
    data: bytes | memoryview | None


def write_image(root: Path, path: str, image: VerifiedImage, expires_at_s: float) -> None:
    """Write an image's file under `root`.

    The file's name appears once all bytes are written; `flush` makes them durable.

    A file in the spool folder is moved; if the move is impossible, it is copied. After an error `image.path` is still
    there, and nothing else is.

    Each system call more costs a small image some per cent, since the thread waits for the interpreter after it.
    """
    try:
        _write_image(root, path, image, expires_at_s)
    except OSError as error:
        if error.errno not in _OBSTACLES or not _clear_path(root, path):
            raise
        _write_image(root, path, image, expires_at_s)


def _write_image(root: Path, path: str, image: VerifiedImage, expires_at_s: float) -> None:
    if image.path is not None:
        stamp(str(image.path), expires_at_s)
        if not CAN_FLUSH:
            _sync_path(image.path)
        if _moves(root, str(image.path), path):
            return
    _copy(root, path, image, expires_at_s)
    if image.path is not None:
        image.path.unlink(missing_ok=True)


def link_image(root: Path, source: str, target: str, image: StoredImage, expires_at_s: float) -> bool:
    """Give an image's file a second name, or copy it if the mount has no links. Return False if the file is gone."""
    try:
        return _link_image(root, source, target, image, expires_at_s)
    except OSError as error:
        if error.errno not in _OBSTACLES or not _clear_path(root, target):
            raise
    return _link_image(root, source, target, image, expires_at_s)


def _link_image(root: Path, source: str, target: str, image: StoredImage, expires_at_s: float) -> bool:
    for _ in range(_WRITE_TRIES):
        try:
            os.link(source, target)
        except FileExistsError:
            if _clear_path(root, target):
                continue
        except FileNotFoundError:
            if stat_file(str(root), source) is None:
                return False
            make_folder(root, os.path.dirname(target))  # noqa: PTH120
            continue
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            _copy(root, target, VerifiedImage.of(image, path=Path(source)), expires_at_s)
        stamp(target, expires_at_s)
        return True
    return False


def _clear_path(root: Path, path: str) -> bool:
    """Rename anything in the place of an image's file, or of a folder above it; return whether anything was.

    Other programs and repairs of a file system leave such things. They are kept, under a name that no image has.
    """
    file = Path(path)
    folders = [folder for folder in file.parents if root in folder.parents]
    for place in (*reversed(folders), file):
        if not os.path.lexists(place):
            return False
        if not (place.is_file() if place == file else place.is_dir()):
            moved = place.with_name(f".{place.name}.{secrets.token_hex(4)}.foreign")
            place.rename(moved)
            logger.warning("Moved {} to {}: it was in the place of an image", place, moved.name)
            return True
    return False


def _moves(root: Path, source: str, target: str) -> bool:
    """Move a file; return False if it is on another file system, or the folder of the target vanishes each time."""
    for _ in range(_WRITE_TRIES):
        try:
            os.replace(source, target)  # noqa: PTH105
        except FileNotFoundError:
            make_folder(root, os.path.dirname(target))  # noqa: PTH120
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            return False
        else:
            return True
    return False


def _copy(root: Path, path: str, image: VerifiedImage, expires_at_s: float) -> None:
    """Write with system calls alone: each `Path` and file object costs a small image several per cent."""
    folder, name = os.path.split(path)
    part = f"{folder}{os.sep}.{name}.{_PROCESS}{next(_part_numbers):x}{PART_SUFFIX}"
    try:
        file = _create(root, folder, part)
        try:
            for piece in pieces_of(image):
                write_all(file, [piece])
            stamp(file, expires_at_s)
            if not CAN_FLUSH:
                sync(file)
        finally:
            os.close(file)  # network mounts report here what could not be written
        os.replace(part, path)  # noqa: PTH105
    except OSError:
        with suppress(OSError):
            os.unlink(part)  # noqa: PTH108
        raise


def write_all(file: int, pieces: Sequence[bytes | memoryview]) -> None:
    """Write pieces to an open file: small ones with one system call if possible, large ones one by one."""
    if len(pieces) > 1 and sum(map(len, pieces)) <= _WRITE_BYTES * len(pieces):
        pieces = [_writev(file, pieces) if hasattr(os, "writev") and len(pieces) <= _MAX_IOV else b"".join(pieces)]
    for piece in pieces:
        done = 0
        with memoryview(piece) as view:
            while done < len(view):
                done += os.write(file, view[done : done + _WRITE_BYTES])


def _writev(file: int, pieces: Sequence[bytes | memoryview]) -> bytes:
    """Write pieces, and return what the system did not take."""
    done, size_bytes = os.writev(file, pieces), sum(map(len, pieces))
    return b"" if done == size_bytes else b"".join(pieces)[done:]


def pieces_of(image: VerifiedImage, piece_bytes: int = PIECE_BYTES) -> Iterator[bytes]:
    """Yield an image's bytes in pieces; those in memory come as one."""
    if image.data is not None:
        yield image.data
    elif image.path is not None:
        with image.path.open("rb", buffering=0) as file:
            while piece := file.read(piece_bytes):
                yield piece


def _create(root: Path, folder: str, path: str) -> int:
    """Open a new file. A sweep, here or in another process, may remove its empty folder at any time."""
    for _ in range(_WRITE_TRIES):
        try:
            return os.open(path, NEW_FILE, 0o666)
        except FileNotFoundError:
            make_folder(root, folder)
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)


def make_folder(root: Path, folder: str) -> None:
    """Make a folder under `root`, and those above it. Nothing above `root` is made: without it the volume is gone."""
    try:
        os.mkdir(folder)  # noqa: PTH102
    except FileExistsError:
        return
    except FileNotFoundError:
        above = Path(folder).parent
        if above == root.parent:
            raise
        make_folder(root, str(above))
        Path(folder).mkdir(exist_ok=True)


def sync(descriptor: int) -> None:
    """Flush a file to the disk; a mount that has no such call is as safe as it can be."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FSYNC:
            raise


def _sync_path(path: Path) -> None:
    with path.open("rb") as file:
        sync(file.fileno())


def _find_syncfs() -> Callable[[int], int] | None:
    """Return the C library's `syncfs`; None if it has none (macOS, Windows)."""
    try:
        call = ctypes.CDLL(None, use_errno=True).syncfs
    except (OSError, TypeError, AttributeError):
        return None
    call.argtypes, call.restype = [ctypes.c_int], ctypes.c_int
    return cast(Callable[[int], int], call)


_syncfs = _find_syncfs()
CAN_FLUSH = _syncfs is not None
"""Whether `flush` makes written files durable; if it can't, each file is synced while it is written."""


def flush(folder: str) -> None:
    """Flush the file system of a folder to its disk. Raises OSError also for earlier writes."""
    if _syncfs is None:
        return
    file = os.open(folder, os.O_RDONLY)
    try:
        if _syncfs(file) and (code := ctypes.get_errno()) not in _NO_FSYNC:
            raise OSError(code, os.strerror(code))
    finally:
        os.close(file)


def stamp(file: int | str, expires_at_s: float) -> None:
    """Set the modification time to the expiry for versions that read it there; a mount that refuses is fine."""
    with suppress(OSError):
        os.utime(file, (expires_at_s, expires_at_s))


def read_image(
    root: str, path: str, image: StoredImage, checked_signature: Signature | None, max_data_bytes: int = SMALL_BYTES
) -> ReadFile | None:
    """Open an image's file and check it; None if it is gone or damaged. A damaged file is removed.

    Args:
        checked_signature: at the last check of the content. While it is the same, the content is not hashed again.
        max_data_bytes: up to this size the bytes are read, of a larger image the open file is returned.
    """
    try:
        file = open(path, "rb", buffering=0, opener=_open_at_once)  # noqa: SIM115 - a Path costs more than the call; closed by owner
    except OSError as error:
        if not _is_missing(error, root):
            raise
        return None
    try:
        status = os.fstat(file.fileno())
        signature = Signature.of(status)
        if signature.size_bytes > image.size_bytes or not stat.S_ISREG(status.st_mode):
            file.close()
            return None
        data = _read_all(file, image.size_bytes) if image.size_bytes <= max_data_bytes else None
        if _is_whole(file, data, image, trusted=signature == checked_signature):
            if data is None:
                return ReadFile(signature, file, None)
            file.close()
            return ReadFile(signature, None, data)
    except BaseException:
        file.close()
        raise
    file.close()
    with suppress(OSError):
        os.unlink(path)  # noqa: PTH108
    return None


def _read_all(file: FileIO, size_bytes: int) -> bytes | memoryview:
    """Read up to `size_bytes`; a mount may return fewer at once.

    Many bytes get memory of their own, which goes back to the system with them: malloc keeps it in each thread's heap.
    """
    if size_bytes <= SMALL_BYTES:
        data = file.read(size_bytes)
        while len(data) < size_bytes and (piece := file.read(size_bytes - len(data))):
            data += piece
        return data
    memory = memoryview(mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    done = 0
    while done < size_bytes and (count := file.readinto(memory[done:])):
        done += count
    return memory[:done].toreadonly()


def _is_whole(file: FileIO, data: bytes | memoryview | None, image: StoredImage, *, trusted: bool) -> bool:
    if data is not None and len(data) != image.size_bytes:
        return False
    if trusted:
        return True
    digest = hashlib.sha256(data) if data is not None else _hash(file, image.size_bytes)
    return digest.hexdigest() == image.sha256


def _hash(file: FileIO, size_bytes: int) -> hashlib._Hash:
    digest, offset = hashlib.sha256(), 0
    while offset < size_bytes and (piece := os.pread(file.fileno(), PIECE_BYTES, offset)):
        digest.update(piece)
        offset += len(piece)
    return digest


def stat_file(root: str, path: str) -> int | None:
    """Return a file's size; None if it is gone."""
    try:
        return os.stat(path).st_size  # noqa: PTH116 - a Path costs more than the call
    except OSError as error:
        if not _is_missing(error, root):
            raise
        return None


def _is_missing(error: OSError, root: str) -> bool:
    """Return whether there is no such file, or something else in its place. Raises OSError if `root` is missing."""
    if not isinstance(error, MISSING) and error.errno not in _OBSTACLES:
        return False
    os.stat(root)  # noqa: PTH116 - without the folder itself, nothing is certain
    return True


def _open_at_once(path: str, flags: int) -> int:
    """Open a file; a named pipe in its place would wait for a writer."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def remove(paths: Iterable[str]) -> None:
    """Remove files and the folders that this empties."""
    folders = set()
    for path in map(Path, paths):
        with suppress(*MISSING):
            path.unlink()
        folders.add(path.parent)
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def scan(folder: Path) -> dict[str, FoundFile]:
    """Return the files one or two folders down; others are not ours. What vanishes meanwhile is left out."""
    return {
        path: FoundFile(stat.st_size, stat.st_mtime, stat.st_ino, stat.st_nlink)
        for path, stat in _files(folder, depth=2)
    }


def _files(folder: Path | str, depth: int, *, is_root: bool = True) -> Iterator[tuple[str, os.stat_result]]:
    with suppress(*MISSING), os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                if depth:
                    yield from _files(entry.path, depth - 1, is_root=False)
            elif not is_root and entry.is_file(follow_symlinks=False):
                with suppress(*MISSING):
                    yield entry.path, entry.stat(follow_symlinks=False)


def remove_tree(folder: Path) -> None:
    """Remove a folder and its content, as far as possible."""
    shutil.rmtree(folder, ignore_errors=True)
