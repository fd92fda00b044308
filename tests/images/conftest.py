"""Images, buckets and stores for the image tests."""

from __future__ import annotations

import io
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from yarl import URL

from imagegen.images import fetch
from imagegen.images.disk import DiskLookups, DiskStore
from imagegen.images.fetch import ImageFetcher
from imagegen.images.needed_uploads import FindNeeded, nothing_needed
from imagegen.images.s3_client import Bucket
from imagegen.images.sniff import sniff
from imagegen.images.store import ImageStore, VerifiedImage
from tests.images.backings import BACKINGS, Backing
from tests.images.link_server import Upstream, make_fetcher, open_session, serve
from tests.s3_server import Objects, S3Server
from tests.support import Clock

MakeImage = Callable[..., VerifiedImage]
OpenStore = Callable[..., Awaitable[ImageStore]]
ImageFile = Callable[..., Path]
OpenDisk = Callable[..., Awaitable[DiskStore]]

LIFE_S = 1_000.0

_numbers = itertools.count()


@cache
def shared_session() -> Any:
    """Return a session for all stores: each session reads the descriptions of the service again."""
    from aiobotocore.session import AioSession

    return AioSession()


@pytest.fixture
def bucket(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """Create an empty bucket."""
    monkeypatch.setattr("aiobotocore.session.get_session", shared_session)
    bucket = Bucket(f"pictures{next(_numbers)}", "a-key", "a-secret", endpoint=s3.url)
    s3.buckets[bucket.name] = {}
    return bucket


@pytest.fixture
def objects(s3: S3Server, bucket: Bucket) -> Objects:
    """Return the objects of the bucket."""
    return s3.buckets[bucket.name]


@pytest.fixture
def make_image() -> MakeImage:
    """Return a small checked image for each colour: `make_image("teal", kind="WEBP", pad_bytes=1_000)`."""

    def make(colour: str = "teal", *, kind: str = "PNG", pad_bytes: int = 0) -> VerifiedImage:
        file = io.BytesIO()
        options = {"exif": b"Exif\0\0" + bytes(pad_bytes)} if pad_bytes else {}
        Image.new("RGB", (24, 16), colour).save(file, kind, **options)
        return sniff(file.getvalue())

    return make


@pytest.fixture(params=BACKINGS)
def backing(request: pytest.FixtureRequest) -> Backing:
    return BACKINGS[request.param](request)


@pytest.fixture
async def open_store(backing: Backing) -> AsyncIterator[OpenStore]:
    """Open one more started store: `await open_store(max_bytes=1_000)`."""
    async with AsyncExitStack() as stack:

        async def open_one(max_bytes: int = 10_000_000, find_needed: FindNeeded = nothing_needed) -> ImageStore:
            store = backing.open(max_bytes, stack, find_needed)
            await store.start()
            stack.push_async_callback(store.close)
            return store

        yield open_one


upstream = pytest.fixture(serve)


@pytest.fixture
def no_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "BACKOFF_S", 0.0)


@pytest.fixture
async def fetcher(upstream: Upstream) -> AsyncIterator[ImageFetcher]:
    own = frozenset({upstream.host})
    async with open_session(own) as session:
        yield make_fetcher(session, own, base_url=URL(f"http://{upstream.host}/v1"), max_bytes=1_000_000)


@pytest.fixture
def clock() -> Clock:
    """Return a Unix clock that only a test moves; near the real time because new files have real times."""
    return Clock(float(int(time.time())))


@pytest.fixture(params=["flat", "nested"])
def is_flat(request: pytest.FixtureRequest) -> bool:
    """Return whether the files of images have flat names."""
    return bool(request.param == "flat")


@pytest.fixture
def image_file(tmp_path: Path, *, is_flat: bool) -> ImageFile:
    """Return the path of an image's file in `data/images`."""

    def path_of(task_id: str, image: VerifiedImage, index: int = 0, extension: str = "png") -> Path:
        folder, file = tmp_path / "data" / "images" / task_id[:2], f"{index}-{image.sha256[:12]}.{extension}"
        return folder / f"{task_id}-{file}" if is_flat else folder / task_id / file

    return path_of


@pytest.fixture
async def store(tmp_path: Path, clock: Clock, *, is_flat: bool) -> AsyncIterator[DiskStore]:
    lookups = DiskLookups(may_be_flat=lambda: is_flat)
    store = DiskStore(tmp_path / "data" / "images", 1_000_000, clock=clock, lookups=lookups)
    await store.start()
    yield store
    await store.close()


@pytest.fixture
async def open_disk(tmp_path: Path, clock: Clock, *, is_flat: bool) -> AsyncIterator[OpenDisk]:
    """Open started stores: `await open_disk(folder)` uses `folder/images`."""
    stores: list[DiskStore] = []

    async def make(folder: Path = tmp_path / "data") -> DiskStore:
        lookups = DiskLookups(may_be_flat=lambda: is_flat)
        store = DiskStore(folder / "images", 10**8, life_s=LIFE_S, clock=clock, lookups=lookups)
        stores.append(store)
        await store.start()
        return store

    yield make
    for store in stores:
        await store.close()
