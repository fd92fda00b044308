"""Tests of the memory cache in front of a disk store: bounded, and never newer than the files."""

from __future__ import annotations

import asyncio
import hashlib
import os
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import closing
from io import FileIO
from pathlib import Path
from typing import Any

import pytest

from imagegen.images import files
from imagegen.images.checked_files import MAX_DATA_BYTES, MAX_IMAGE_BYTES
from imagegen.images.disk import DiskStore
from imagegen.images.files import SMALL_BYTES
from imagegen.images.store import OpenedImage, VerifiedImage, in_file_thread
from imagegen.memory_tuning import resident_bytes
from imagegen.tasks.image import StoredImage
from tests.images.backings import load
from tests.support import Clock

TASK = "0123456789abcdef0123456789abcdef"
LARGE_BYTES = 3_000_000
FITTING = MAX_DATA_BYTES // LARGE_BYTES

Save = Callable[..., Awaitable[StoredImage]]


@pytest.fixture
def clock() -> Clock:
    return Clock(1e9)


@pytest.fixture
async def store(tmp_path: Path, clock: Clock) -> AsyncIterator[DiskStore]:
    store = DiskStore(tmp_path / "data" / "images", 10**9, clock=clock)
    await store.start()
    yield store
    await store.close()


@pytest.fixture
def save(store: DiskStore, clock: Clock) -> Save:
    """Save random images and return their records: `await save(index, size_bytes)`."""

    async def save(index: int = 0, size_bytes: int = LARGE_BYTES) -> StoredImage:
        data = os.urandom(size_bytes)
        image = VerifiedImage("image/png", size_bytes, 8, 8, hashlib.sha256(data).hexdigest(), data)
        await store.save(TASK, index, image, clock.now + 600)
        return image.stored_at(index)

    return save


async def open_image(store: DiskStore, image: StoredImage) -> OpenedImage:
    opened = await store.open(TASK, image)
    assert opened is not None
    return opened


def path_of(tmp_path: Path) -> Path:
    (path,) = (tmp_path / "data" / "images").rglob("*.png")
    return path


async def test_an_image_is_read_once_and_then_served_from_memory(
    store: DiskStore, save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = await save()
    first = await open_image(store, image)
    monkeypatch.setattr(files, "read_image", lambda *_: pytest.fail("it was read again"))
    second = await open_image(store, image)
    assert second.data is first.data is not None
    assert hashlib.sha256(await second.read_all()).hexdigest() == image.sha256


@pytest.mark.parametrize("size_bytes", [SMALL_BYTES, LARGE_BYTES])
async def test_a_deleted_image_is_not_served_from_memory(
    store: DiskStore, save: Save, tmp_path: Path, size_bytes: int
) -> None:
    image = await save(0, size_bytes)
    assert await load(store, TASK, image) is not None
    path_of(tmp_path).unlink()
    assert await load(store, TASK, image) is None


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1], lambda data: data[:-1] + bytes([data[-1] ^ 1]), lambda _: b""]
)
async def test_an_image_that_was_damaged_is_not_served_from_memory(
    store: DiskStore, save: Save, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    image = await save()
    data = await load(store, TASK, image)
    assert data is not None
    path_of(tmp_path).write_bytes(damage(data))
    assert await load(store, TASK, image) is None


async def test_an_expired_image_is_not_served_from_memory(store: DiskStore, save: Save, clock: Clock) -> None:
    image = await save()
    assert await load(store, TASK, image) is not None
    clock.now += 601
    assert await load(store, TASK, image) is None


async def test_the_bytes_in_memory_are_bounded_for_any_number_of_images(store: DiskStore, save: Save) -> None:
    images = [await save(index) for index in range(2 * FITTING)]
    before = resident_bytes()
    for image in images:
        assert await load(store, TASK, image) is not None
    assert resident_bytes() - before < MAX_DATA_BYTES + 4_000_000
    assert [(await open_image(store, image)).data is None for image in images] == [False] * len(images)


async def test_images_in_flight_count_and_the_next_is_sent_from_its_file(store: DiskStore, save: Save) -> None:
    images = [await save(index) for index in range(FITTING + 3)]
    opened = [await open_image(store, image) for image in images]
    assert [image.data is None for image in opened] == [False] * FITTING + [True] * 3
    again = await open_image(store, images[-1])
    assert again.data is None
    assert hashlib.sha256(await again.read_all()).hexdigest() == images[-1].sha256
    for image in [*opened, again]:
        image.close()
    with closing(await open_image(store, images[-1])) as last:
        assert last.data is not None


async def test_readers_of_one_image_share_its_bytes(store: DiskStore, save: Save) -> None:
    image = await save()
    assert await load(store, TASK, image) is not None
    opened = [await open_image(store, image) for _ in range(100)]
    assert len({id(reader.data) for reader in opened}) == 1


async def test_a_read_that_is_cancelled_leaves_the_cache_empty(store: DiskStore, save: Save) -> None:
    images = [await save(index) for index in range(FITTING + 3)]
    for image in images:
        is_cancelled = threading.Event()
        holding = asyncio.ensure_future(in_file_thread(is_cancelled.wait, 20))
        await asyncio.sleep(0)  # the thread is busy, so that the read is not over before it is cancelled
        reading = asyncio.ensure_future(store.open(TASK, image))
        await asyncio.sleep(0)
        reading.cancel()
        is_cancelled.set()
        with pytest.raises(asyncio.CancelledError):
            await reading
        assert await holding
        del reading
    opened = [await open_image(store, image) for image in images[:FITTING]]
    assert all(image.data is not None for image in opened)


async def test_an_image_over_the_limit_of_the_cache_is_sent_from_its_file(store: DiskStore, save: Save) -> None:
    largest, larger = await save(0, MAX_IMAGE_BYTES), await save(1, MAX_IMAGE_BYTES + 1)
    with closing(await open_image(store, largest)) as opened:
        assert opened.data is not None
    with closing(await open_image(store, larger)) as opened:
        assert opened.data is None


async def test_a_mount_that_returns_less_than_requested_is_read_to_the_end(
    save: Save, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    class ShortReads(FileIO):
        def read(self, size: int | None = -1, /) -> bytes:
            return super().read(min(size or 0, 100_000))

        def readinto(self, buffer: Any, /) -> int:
            return super().readinto(memoryview(buffer)[:100_000]) or 0

    images = [await save(0, SMALL_BYTES), await save(1, LARGE_BYTES)]
    monkeypatch.setattr(files, "open", lambda path, *_, **__: ShortReads(path), raising=False)
    fresh = DiskStore(tmp_path / "data" / "images", 10**9, clock=clock)
    await fresh.start()
    for image in images:
        data = await load(fresh, TASK, image)
        assert data is not None
        assert hashlib.sha256(data).hexdigest() == image.sha256
