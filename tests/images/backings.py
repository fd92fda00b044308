"""Every image store for contract tests: all stores of one test share what is beneath them (folder, Redis, bucket)."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from contextlib import AsyncExitStack, closing
from pathlib import Path

import pytest

from imagegen.byte_budget import ByteBudget
from imagegen.images.cached import BlobStore, CachedStore
from imagegen.images.disk import DiskLookups, DiskStore
from imagegen.images.link_store import UpstreamStore
from imagegen.images.needed_uploads import FindNeeded
from imagegen.images.redis_blobs import RedisBlobStore
from imagegen.images.s3 import S3BlobStore
from imagegen.images.spool import Spool
from imagegen.images.store import ImageStore, VerifiedImage
from imagegen.redis_client.connection import Connection
from imagegen.redis_client.keys import Keys
from imagegen.tasks.image import StoredImage


class Disk:
    """Folder shared by all instances."""

    def __init__(self, request: pytest.FixtureRequest) -> None:
        self.folder = request.getfixturevalue("tmp_path") / "images"

    def open(self, max_bytes: int, _: AsyncExitStack, find_needed: FindNeeded) -> ImageStore:
        return DiskStore(self.folder, max_bytes, lookups=DiskLookups(find_needed=find_needed))


class FormerDisk(Disk):
    """Folder that is shared with an instance of a former version."""

    def open(self, max_bytes: int, _: AsyncExitStack, find_needed: FindNeeded) -> ImageStore:
        lookups = DiskLookups(find_needed=find_needed, may_be_flat=lambda: False)
        return DiskStore(self.folder, max_bytes, lookups=lookups)


class Remote:
    """Remote store behind a small local cache that holds only the newest image."""

    def __init__(self, request: pytest.FixtureRequest) -> None:
        self.folder = request.getfixturevalue("tmp_path")
        self.numbers = itertools.count()

    def cached(self, port: BlobStore) -> ImageStore:
        return CachedStore(port, DiskStore(self.folder / f"cache{next(self.numbers)}", max_bytes=1))


class InRedis(Remote):
    def __init__(self, request: pytest.FixtureRequest) -> None:
        super().__init__(request)
        self.url, self.keys = request.getfixturevalue("redis_url"), Keys(request.getfixturevalue("prefix"))

    def open(self, max_bytes: int, stack: AsyncExitStack, find_needed: FindNeeded) -> ImageStore:
        connection = Connection(self.url)
        stack.push_async_callback(connection.close)
        return self.cached(RedisBlobStore(connection, self.keys, max_bytes, find_needed=find_needed))


class InBucket(Remote):
    def __init__(self, request: pytest.FixtureRequest) -> None:
        super().__init__(request)
        self.bucket = request.getfixturevalue("bucket")

    def open(self, max_bytes: int, _: AsyncExitStack, find_needed: FindNeeded) -> ImageStore:
        store = S3BlobStore(self.bucket, max_bytes=max_bytes, life_s=600.0, find_needed=find_needed)
        return self.cached(store)


class LinksOnly(Disk):
    """Store of links, with what comes without a link in a folder."""

    def open(self, max_bytes: int, stack: AsyncExitStack, find_needed: FindNeeded) -> ImageStore:
        return UpstreamStore(super().open(max_bytes, stack, find_needed))


class SpoolFolder:
    """The part of a store that a spool needs."""

    def __init__(self, folder: Path | None) -> None:
        self.spool_folder = folder


def spool_in(folder: Path | None, memory: ByteBudget | None = None) -> Spool:
    """Return the spool of a folder; without one, its images stay in memory."""
    return Spool(SpoolFolder(folder), memory or ByteBudget())  # type: ignore[arg-type]  # no whole store


def in_memory(image: VerifiedImage) -> bytes:
    """Return the bytes of an image without a file."""
    assert image.data is not None
    return image.data


def is_writable(store: ImageStore) -> bool:
    """Return whether images can be saved now."""
    return store.health.writable


async def load(store: ImageStore, task_id: str, image: StoredImage) -> bytes | None:
    """Return all bytes of an image, None if the store does not have it."""
    opened = await store.open(task_id, image)
    if opened is None:
        return None
    with closing(opened):
        return await opened.read_all()


Backing = Disk | InRedis | InBucket

BACKINGS: dict[str, Callable[[pytest.FixtureRequest], Backing]] = {
    "disk": Disk,
    "disk of a former version": FormerDisk,
    "redis": InRedis,
    "s3": InBucket,
    "upstream": LinksOnly,
}


def spooled(store: DiskStore, image: VerifiedImage) -> VerifiedImage:
    """Return the same image in a file of the spool folder."""
    assert image.data is not None
    assert store.spool_folder is not None
    path = store.spool_folder / "image"
    path.write_bytes(image.data)
    return VerifiedImage(image.content_type, image.size_bytes, image.width, image.height, image.sha256, path=path)


def fails_with(code: int) -> Callable[..., object]:
    def fail(*_: object, **__: object) -> object:
        raise OSError(code, os.strerror(code))

    return fail
