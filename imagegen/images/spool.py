"""Spool of images that are on their way: checked, hashed and held while their bytes come, in a file or in memory."""

from __future__ import annotations

import os
import secrets
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock
from typing import ParamSpec, TypeVar

from loguru import logger

from imagegen.byte_budget import ByteBudget
from imagegen.errors import StoreUnavailable
from imagegen.images.files import NEW_FILE, write_all
from imagegen.images.metadata import Read, spliced, splices
from imagegen.images.sniff import ImageChecker, NotAnImage, sniff
from imagegen.images.store import ImageStore, VerifiedImage, check_threads, file_threads

P = ParamSpec("P")
T = TypeVar("T")

SMALL_BYTES = 256 * 1024
"""An image up to this size stays in memory, and is checked without a thread: that takes a fraction of a millisecond."""

FILL_S = 20.0
"""Time for the check of some pieces and for writing them: a thread may have others to check before."""

_WRITE_BYTES = 1024 * 1024
"""Bytes that are written at once: each call costs a thread as much as the work on some kilobytes."""


class Spool:
    """Spool of one store. memory: bounds the bytes that are held in memory without a file."""

    def __init__(self, store: ImageStore, memory: ByteBudget) -> None:
        self._store = store
        self._memory = memory

    def sink(self, *, must_hold: bool = False) -> ImageSink:
        """Return a sink for one image. must_hold: it stays in memory without a file, also over the budget."""
        return ImageSink(self._store.spool_folder, self._memory, must_hold=must_hold)

    async def fill(self, sink: ImageSink, method: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a method that fills a sink, in a thread. Raises StoreUnavailable also if the disk does not answer.

        The sink is of no use after that.
        """
        try:
            return await check_threads.run_within(FILL_S, method, *args, **kwargs)
        except TimeoutError as error:
            if sink.has_file:
                self._store.spool_health.mark_failed(error)
            raise StoreUnavailable from error

    def embed(self, image: VerifiedImage, text: str, description: str) -> VerifiedImage:
        """Return the image with a text in its metadata, as another file or other bytes; both are to be discarded.

        The image itself is returned if it has no place for the text or can't be changed: it is paid for. Blocks.
        """
        try:
            with _reader(image) as read:
                changes = splices(image.content_type, read, text, description)
                if not changes:
                    return image
                pieces = spliced(read, image.size_bytes, changes)
                if image.data is not None and image.size_bytes <= SMALL_BYTES:
                    return self._in_memory(sniff(b"".join(pieces)))
                return self._finish(self.sink(must_hold=True), pieces)
        except (OSError, StoreUnavailable, NotAnImage, ValueError, IndexError, struct.error) as error:
            logger.debug("An image is saved without its parameters: {}", error)
            return image

    def _in_memory(self, image: VerifiedImage) -> VerifiedImage:
        if image.size_bytes > SMALL_BYTES:
            self._memory.try_take(image.size_bytes, force=True)
        return image

    @staticmethod
    def _finish(sink: ImageSink, pieces: Iterator[bytes]) -> VerifiedImage:
        try:
            return sink.finish(pieces)
        finally:
            sink.discard()

    def discard(self, image: VerifiedImage) -> None:
        """Forget an image that was saved or is not needed. Its file, if it has one, is removed by a thread."""
        if image.path is not None:
            file_threads.put(image.path.unlink, missing_ok=True)
        elif image.size_bytes > SMALL_BYTES:
            self._memory.give(image.size_bytes)


class ImageSink:
    """One image that comes in pieces. Its methods block and may run in different threads.

    closed: whether it was finished or discarded.
    """

    def __init__(self, folder: Path | None, memory: ByteBudget, *, must_hold: bool) -> None:
        self._memory = memory
        self._must_hold = must_hold
        self._checker = ImageChecker()
        self._path = folder / f"{secrets.token_hex(12)}.part" if folder else None
        self._file: int | None = None
        self._bytes: bytearray | None = None
        self._taken = 0
        self.closed = False
        self._is_discarded = False
        self._lock = Lock()

    @property
    def has_file(self) -> bool:
        """Whether the bytes go into a file, and are not held in memory."""
        return self._path is not None and self._bytes is None

    def write(self, pieces: Iterable[bytes | memoryview]) -> None:
        """Check and hold the next bytes. Raises NotAnImage; StoreUnavailable if neither disk nor memory has space."""
        with self._held():
            checked: list[bytes | memoryview] = []
            pending = 0
            for piece in pieces:
                used = self._checker.feed(piece)
                if used:
                    checked.append(piece if used == len(piece) else memoryview(piece)[:used])
                    pending += used
                if pending >= _WRITE_BYTES:
                    self._hold(checked, pending)
                    checked, pending = [], 0
            if checked:
                self._hold(checked, pending)

    def finish(self, pieces: Iterable[bytes | memoryview] = ()) -> VerifiedImage:
        """Return the whole image, after the last bytes. Raises as `write` does."""
        self.write(pieces)
        with self._held():
            checker = self._checker
            checker.check_ended()
            self._close_file()  # it may take long, and the caller may leave meanwhile
            if self._is_discarded:
                raise StoreUnavailable
            self.closed = True
            facts = (checker.content_type, checker.size_bytes, checker.width, checker.height, checker.digest)
            if self._bytes is None:
                return VerifiedImage(*facts, path=self._path)
            data, self._bytes = bytes(self._bytes), None
            if checker.size_bytes > SMALL_BYTES:
                self._take(checker.size_bytes)
            elif self._taken:
                self._memory.give(self._taken)
            self._taken = 0
            return VerifiedImage(*facts, data=data)

    def discard(self) -> None:
        """Forget what came, after `finish` nothing. While another thread is in a method, that thread does it."""
        self._is_discarded = True
        if not self._lock.acquire(blocking=False):
            return
        try:
            if not self.closed:
                self.closed = True
                self._close_file()
                self._remove_file()
                self._bytes = None
                self._memory.give(self._taken)
                self._taken = 0
        finally:
            self._lock.release()

    @contextmanager
    def _held(self) -> Iterator[None]:
        try:
            with self._lock:
                yield
        finally:
            if self._is_discarded:
                self.discard()

    def _hold(self, pieces: list[bytes | memoryview], size_bytes: int) -> None:
        if self.closed:
            return
        if self._bytes is None and self._path is not None:
            try:
                if self._file is None:
                    self._file = _create(self._path)
                write_all(self._file, pieces)
            except OSError as error:
                self._move_to_memory(error, size_bytes)
            else:
                return
        elif self._bytes is None:
            self._bytes = bytearray()
        self._take(len(self._bytes or b"") + size_bytes)
        self._bytes = self._bytes or bytearray()
        for piece in pieces:
            self._bytes += piece

    def _move_to_memory(self, error: OSError, unwritten_bytes: int) -> None:
        """Continue in memory: the disk is full or broken, and the image is paid for."""
        before = self._checker.size_bytes - unwritten_bytes
        data = bytearray()
        if self._file is not None:
            try:
                self._take(before)
                while len(data) < before and (read := os.pread(self._file, before - len(data), len(data))):
                    data += read
            except OSError as unreadable:
                raise StoreUnavailable from unreadable
            finally:
                self._close_file()
                self._remove_file()
        if len(data) != before:
            raise StoreUnavailable from error
        self._bytes = data

    def _take(self, total: int) -> None:
        """Reserve memory for `total` bytes in all."""
        missing = total - self._taken
        if missing > 0 and not self._memory.try_take(missing, force=self._must_hold):
            raise StoreUnavailable
        self._taken = max(self._taken, total)

    def _close_file(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _remove_file(self) -> None:
        if self._path is not None:
            with suppress(OSError):
                self._path.unlink(missing_ok=True)


@contextmanager
def _reader(image: VerifiedImage) -> Iterator[Read]:
    """Open an image for reading at any offset."""
    if image.data is not None:
        data = image.data
        yield lambda offset, length: data[offset : offset + length]
    else:
        file = os.open(image.source, os.O_RDONLY)
        try:
            yield lambda offset, length: os.pread(file, length, offset)
        finally:
            os.close(file)


def _create(path: Path) -> int:
    try:
        return os.open(path, NEW_FILE, 0o644)
    except FileNotFoundError:
        path.parent.mkdir()  # without the folder above, the volume is gone
        return os.open(path, NEW_FILE, 0o644)
