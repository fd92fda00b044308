"""Owns what every image store promises."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from imagegen.tasks.image import StoredImage


@dataclass(frozen=True, slots=True)
class CheckedImage:
    """Bytes that are a whole PNG, JPEG or WebP picture: what `sniff` returns."""

    data: bytes
    content_type: str
    width: int
    height: int
    sha256: str


class ImageStore(Protocol):
    """Keeps the bytes of pictures until they expire, or until the store is over its byte cap (oldest go first)."""

    @property
    def mark(self) -> str:
        """Goes into `StoredImage.keeper`: whose alone the bytes are; empty where every instance can read them."""
        ...

    async def save(self, task_id: str, index: int, image: CheckedImage, expires_at_s: float) -> None:
        """Keeps it until `expires_at_s` (Unix time). The same picture again is fine. Raises StoreUnavailable."""
        ...

    async def load(self, task_id: str, image: StoredImage) -> bytes | None:
        """The bytes, or None where they are gone. Raises StoreUnavailable where that can't be told."""
        ...

    async def holds(self, task_id: str, images: Sequence[StoredImage]) -> bool:
        """Whether every one of them can still be loaded. Raises StoreUnavailable."""
        ...

    async def extend(self, task_id: str, images: Sequence[StoredImage], expires_at_s: float) -> None:
        """Moves their end to `expires_at_s`: the task finished later than its first picture was saved."""
        ...

    async def start(self) -> None:
        """Makes it ready: folders, index of what is there, the sweeping of what has expired."""
        ...

    async def close(self) -> None: ...
