"""Contract of the image stores, and the values that go in and out of them."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Protocol, Self, cast

from msgspec import Struct

from imagegen.errors import StoreUnavailable
from imagegen.images.store_health import StoreHealth
from imagegen.images.threads import PATIENCE_S, WorkThreads
from imagegen.tasks.image import StoredImage

PIECE_BYTES = 256 * 1024
"""Size of the pieces in which an image is read and sent: more would keep the loop or memory busy for longer."""

READ_S = 20.0
"""Time for the disk to return a piece of an image."""

file_threads = WorkThreads(8, "image-files", patience_s=PATIENCE_S)
in_file_thread = file_threads.run
"""Run blocking file work in separate threads, so that no slow name lookup or other work delays it."""

check_threads = WorkThreads(2, "image-checks")
in_check_thread = check_threads.run
"""Run the check of image bytes in one of two threads: more of them would wait for each other's turn only."""

in_hash_thread = WorkThreads(2, "image-hashes").run
"""Run work on bytes in memory, which no disk that hangs may delay."""

in_flush_thread = WorkThreads(1, "image-flush").run
"""Flush files to the disk in a separate thread: a slow disk may take seconds."""


Describe = Callable[["VerifiedImage", int | None], tuple[str, str]]
"""Returns the parameters of an image as one text, and its title. Arguments: the image, the seed that was sent."""


class SpooledImageLost(StoreUnavailable):
    """The file `VerifiedImage.path` is not there any more; saving it again can't help."""


class StoreFull(StoreUnavailable):
    """Uploads that unfinished tasks need fill the store, so it takes no more uploads; other images are still saved."""


class VerifiedImage(Struct, frozen=True):
    """A whole PNG, JPEG or WebP image, hashed and checked; exactly one of `data` and `path` is set.

    sha256: of the bytes, 64 hex digits.
    data: the bytes, of a small image or where the disk can't take it.
    path: a file in the store's spool folder with exactly the bytes. `ImageStore.save` may move it away.
    """

    content_type: str
    size_bytes: int
    width: int
    height: int
    sha256: str
    data: bytes | None = None
    path: Path | None = None

    def __post_init__(self) -> None:
        if (self.data is None) == (self.path is None):
            raise ValueError("an image has either data or a path")

    @property
    def source(self) -> bytes | Path:
        """The bytes, or the file with them."""
        if self.data is not None:
            return self.data
        return cast(Path, self.path)

    @classmethod
    def of(cls, record: StoredImage, *, data: bytes | None = None, path: Path | None = None) -> Self:
        """Return a stored image with its bytes, or with the file of them."""
        return cls(record.content_type, record.size_bytes, record.width, record.height, record.sha256, data, path)

    def stored_at(self, index: int, *, seed: int | None = None, store_id: str = "") -> StoredImage:
        """Return the record of this image in its task."""
        return StoredImage(
            index, self.content_type, self.size_bytes, self.width, self.height, self.sha256, seed, store_id=store_id
        )


@dataclass(slots=True)
class OpenedImage:
    """An image that is open for reading; exactly one source is set. Close it after use.

    data: the bytes, of a small image or one in the store's cache.
    file: an open file, of which the first `size_bytes` bytes are the image.
    pieces: returns the bytes from an offset, of a length, in pieces; may raise StoreUnavailable.
    reservation: keeps `data` counted in the store's cache while it is in use.
    is_slow: whether the event loop must not read or close the file itself, since that may take long.
    """

    size_bytes: int
    data: bytes | memoryview | None = None
    file: FileIO | None = None
    pieces: Callable[[int, int], AsyncGenerator[bytes, None]] | None = None
    reservation: object = None
    is_slow: bool = False

    async def read(self, offset: int = 0, length: int | None = None) -> AsyncGenerator[bytes, None]:
        """Yield the bytes from `offset`, `length` of them or all, in pieces. Raises StoreUnavailable, OSError."""
        end = self.size_bytes if length is None else min(offset + length, self.size_bytes)
        if self.data is not None:
            yield bytes(self.data[offset:end])
        elif self.pieces is not None:
            async with aclosing(self.pieces(offset, end - offset)) as pieces:
                async for piece in pieces:
                    yield piece
        elif self.file is not None:
            while offset < end:
                count = min(PIECE_BYTES, end - offset)
                try:
                    piece = await file_threads.run_within(READ_S, _read_at, self.file, offset, count)
                except TimeoutError as error:  # not the client's, which senders take for a client that does not read
                    raise StoreUnavailable from error
                if not piece:
                    raise OSError("an image file ended early")
                yield piece
                offset += len(piece)

    async def read_all(self) -> bytes:
        """Return all bytes. Raises StoreUnavailable, OSError."""
        if self.data is not None:
            return bytes(self.data)
        return b"".join([piece async for piece in self.read()])

    def close(self) -> None:
        """Close the file. May be repeated."""
        if self.file is not None and self.is_slow:
            file_threads.put(self.file.close)
        elif self.file is not None:
            self.file.close()
        self.data = self.pieces = self.reservation = None


def _read_at(file: FileIO, offset: int, length: int) -> bytes:
    return os.pread(file.fileno(), length, offset)


class ImageStore(Protocol):
    """Store of the bytes of images until they expire, or until the store is over its byte cap (oldest go first)."""

    @property
    def store_id(self) -> str:
        """`StoredImage.store_id` of saved images: the only place with the bytes; empty if all instances can read it."""
        ...

    @property
    def health(self) -> StoreHealth:
        """Whether images can be saved now. No new paid call starts while it is not `writable`."""
        ...

    @property
    def spool_health(self) -> StoreHealth:
        """Health of the disk with the spool folder: that of the store, or of its cache."""
        ...

    @property
    def spool_folder(self) -> Path | None:
        """A folder for files that are passed to `save` as `VerifiedImage.path`; None if images stay in memory."""
        ...

    async def save(self, task_id: str, index: int, image: VerifiedImage, expires_at_s: float) -> None:
        """Save the image until `expires_at_s` (Unix time). Saving it again is allowed.

        The file `image.path` may be moved away; after an error it is still there.

        Raises: StoreUnavailable, after `health` was updated; SpooledImageLost.
        """
        ...

    async def reuse(self, source_id: str, image: StoredImage, task_id: str, index: int, expires_at_s: float) -> bool:
        """Save an image of the task `source_id` for another task too, without reading it; either may expire alone.

        Return False if the image is gone. Raises StoreUnavailable.
        """
        ...

    async def open(self, task_id: str, image: StoredImage) -> OpenedImage | None:
        """Open an image for reading; None if it is gone. Raises StoreUnavailable if that is not certain."""
        ...

    async def contains_all(self, task_id: str, images: Sequence[StoredImage]) -> bool:
        """Return whether each of the images can still be opened. Raises StoreUnavailable."""
        ...

    async def contains(self, task_id: str, image: StoredImage) -> bool:
        """Return whether `open` finds the image, without reading it. Raises StoreUnavailable."""
        ...

    async def find(self, task_id: str, since_s: float) -> list[StoredImage]:
        """Return images of a task that were saved since a Unix time and can be opened, those that are quickly found.

        Raises StoreUnavailable.
        """
        ...

    async def extend_expiry(self, task_id: str, images: Sequence[StoredImage], expires_at_s: float) -> None:
        """Set when the images expire, if they are there. Raises StoreUnavailable."""
        ...

    async def start(self) -> None:
        """Prepare the store. A store that can't be used now is no error, but is not healthy. Raises SettingsError."""
        ...

    async def close(self) -> None: ...
