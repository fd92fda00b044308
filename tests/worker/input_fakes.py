"""Uploads, a fetcher of links and a spool in memory, for tests of input images."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass, field

from imagegen.images.fetch import ImageFetcher
from imagegen.images.spool import Spool
from imagegen.images.store import OpenedImage, VerifiedImage
from imagegen.images.uploads import Upload, Uploads
from imagegen.tasks.image import GivenImage, ImageLink

LINK = "https://images.example/a.png"
UPLOAD = f"upload:{'a' * 64}"
DATA = b"the bytes"


@dataclass
class FakeUploads(Uploads):
    """Uploads in memory. faults: raised by the next look-ups."""

    known: dict[str, bytes] = field(default_factory=lambda: {UPLOAD: DATA})
    faults: list[Exception] = field(default_factory=list)

    async def describe(self, upload_id: str) -> Upload | None:
        if self.faults:
            raise self.faults.pop(0)
        data = self.known.get(upload_id)
        return None if data is None else Upload(upload_id, "image/png", len(data), 8, 8, math.inf)

    async def open(self, upload_id: str) -> OpenedImage | None:
        data = self.known.get(upload_id)
        return None if data is None else OpenedImage(len(data), data)


@dataclass
class FakeFetcher(ImageFetcher):
    """Fetcher that returns the same image, or raises. fails_at: number of the fetch that raises; 0: each."""

    error: Exception | None = None
    fetched: list[str] = field(default_factory=list)
    fails_at: int = 0

    async def fetch(self, image: GivenImage, *, age_s: float = 0.0) -> VerifiedImage:
        assert isinstance(image, ImageLink)
        assert age_s == math.inf, "a client's link is not new"
        self.fetched.append(image.url)
        if self.error is not None and self.fails_at in (0, len(self.fetched)):
            raise self.error
        return VerifiedImage("image/webp", len(DATA), 8, 8, "b" * 64, DATA)


@dataclass
class FakeSpool(Spool):
    """Spool that counts the images that were discarded, in the event loop as a real one needs it."""

    discarded: int = 0

    def discard(self, image: VerifiedImage) -> None:
        asyncio.get_running_loop()
        self.discarded += 1
