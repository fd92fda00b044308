"""Record of which image files were checked, and a cache of the bytes that were read last."""

from __future__ import annotations

from msgspec import Struct

from imagegen.images.files import Signature

MAX_FILES = 10_000
MAX_DATA_BYTES = 16 * 1024 * 1024
"""Of all images that are cached or being sent: a stalled client holds one for long."""

MAX_IMAGE_BYTES = 4 * 1024 * 1024
"""A larger image is sent from its file, so that a few can't fill the cache."""


class Reservation:
    """Reservation of cache space for one image, until nothing refers to this object."""

    __slots__ = ("_cache", "_size_bytes")

    def __init__(self, cache: CheckedFiles, size_bytes: int) -> None:
        self._cache = cache
        self._size_bytes = size_bytes
        cache.held_bytes += size_bytes

    def __del__(self) -> None:
        self._cache.held_bytes -= self._size_bytes


class CachedImage(Struct, frozen=True):
    """Bytes of an image. Their user holds the reservation too."""

    data: bytes | memoryview
    reservation: Reservation


class _Checked(Struct, frozen=True):
    sha256: str
    signature: Signature


class CheckedFiles:
    """Signatures of files with hashed content, and bytes of some; the least recently used go first.

    held_bytes: of all reservations.
    """

    def __init__(self) -> None:
        self._files: dict[str, _Checked] = {}
        self._cached: dict[str, CachedImage] = {}
        self.held_bytes = 0

    def signature(self, name: str, sha256: str) -> Signature | None:
        """Return the file's signature when its content had this hash."""
        checked = self._files.get(name)
        return checked.signature if checked is not None and checked.sha256 == sha256 else None

    def cached(self, name: str, sha256: str) -> CachedImage | None:
        """Return the file's bytes, if they are in the cache."""
        if (cached := self._cached.pop(name, None)) is None:
            return None
        self._cached[name] = cached
        return cached if self._files[name].sha256 == sha256 else None

    def reserve(self, size_bytes: int) -> Reservation | None:
        """Reserve space for an image; None if it is too large, or running transfers fill the cache."""
        if size_bytes > MAX_IMAGE_BYTES:
            return None
        while self.held_bytes + size_bytes > MAX_DATA_BYTES:
            if not self._cached:
                return None
            del self._cached[next(iter(self._cached))]
        return Reservation(self, size_bytes)

    def add(self, name: str, sha256: str, signature: Signature, cached: CachedImage | None = None) -> None:
        """Record a file after its content was hashed, and cache its bytes if they are given."""
        self.forget(name)
        if len(self._files) >= MAX_FILES:
            self.forget(next(iter(self._files)))
        self._files[name] = _Checked(sha256, signature)
        if cached is not None:
            self._cached[name] = cached

    def forget(self, name: str) -> None:
        """Drop a file."""
        self._files.pop(name, None)
        self._cached.pop(name, None)
