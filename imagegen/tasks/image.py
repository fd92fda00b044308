"""Descriptions of an image: as returned by an upstream, and as stored."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct

EXTENSIONS: Mapping[str, str] = {"image/png": "png", "image/jpeg": "jpg", "image/webp": "webp"}
"""File extensions of the content types that an image may have."""

CONTENT_TYPES = tuple(EXTENSIONS)


class ImageLink(Struct, frozen=True, gc=False):
    """An image at a URL that soon expires."""

    url: str


class ImageBytes(Struct, frozen=True, gc=False):
    """An image with its bytes from the response; not checked yet."""

    data: bytes


class ImageBase64(Struct, frozen=True, gc=False):
    """An image with its bytes from the response as base64; neither decoded nor checked yet.

    text: a part of the answer's body, without whitespace; it keeps the whole body in memory.
    """

    text: memoryview


GivenImage = ImageLink | ImageBytes | ImageBase64
"""An image as an upstream gives it."""


class PaidImage(Struct, frozen=True, gc=False):
    """A paid image that is not downloaded yet, as a checkpoint carries it.

    index: its place in the task, from 0; seed: that was sent for it; received_at: when its link came, Unix time.
    """

    index: int
    url: str
    received_at: float
    seed: int | None = None


class StoredImage(Struct, frozen=True, gc=False, rename={"store_id": "keeper"}):
    """One stored image of a task.

    index: its place in the task, from 0.
    sha256: of the bytes, 64 hex digits; empty where the bytes stay upstream (`url` is set then).
    seed: the seed that was sent for it, None if none was sent.
    store_id: id of the only store with the bytes, if not every instance can read them.
    url: only where the bytes are not kept here: the provider's own link.
    reused: whether another task made it, which differs only in `n`.
    """

    index: int
    content_type: str = ""
    size_bytes: int = 0
    width: int = 0
    height: int = 0
    sha256: str = ""
    seed: int | None = None
    url: str | None = None
    store_id: str = ""
    reused: bool = False

    @property
    def extension(self) -> str:
        """Extension of its file's name."""
        return extension_of(self.content_type)


def extension_of(content_type: str) -> str:
    """Return the extension of a file's name, `bin` for an unknown type."""
    return EXTENSIONS.get(content_type, "bin")
