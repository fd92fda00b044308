"""Every image store for contract tests: all stores of one test share what is beneath them (folder, Redis, bucket)."""

from __future__ import annotations

import itertools
from contextlib import AsyncExitStack

import pytest

from imagegen.images.cached import BlobStore, CachedStore
from imagegen.images.disk import DiskStore
from imagegen.images.redis_blobs import RedisBlobStore
from imagegen.images.s3 import S3BlobStore
from imagegen.images.store import ImageStore
from imagegen.redis_client.connection import Connection
from imagegen.redis_client.keys import Keys


class Disk:
    """Folder shared by all instances."""

    def __init__(self, request: pytest.FixtureRequest) -> None:
        self.folder = request.getfixturevalue("tmp_path") / "images"

    def open(self, max_bytes: int, _: AsyncExitStack) -> ImageStore:
        return DiskStore(self.folder, max_bytes)


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

    def open(self, max_bytes: int, stack: AsyncExitStack) -> ImageStore:
        connection = Connection(self.url)
        stack.push_async_callback(connection.close)
        return self.cached(RedisBlobStore(connection, self.keys, max_bytes))


class InBucket(Remote):
    def __init__(self, request: pytest.FixtureRequest) -> None:
        super().__init__(request)
        self.bucket = request.getfixturevalue("bucket")

    def open(self, max_bytes: int, _: AsyncExitStack) -> ImageStore:
        return self.cached(S3BlobStore(self.bucket, max_bytes=max_bytes, life_s=600.0))


BACKINGS = {"disk": Disk, "redis": InRedis, "s3": InBucket}
