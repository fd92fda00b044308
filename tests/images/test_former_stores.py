"""Tests of images that an earlier `IMAGE_STORE` saved."""

from __future__ import annotations

import shutil
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from msgspec.structs import replace

from imagegen.errors import StoreUnavailable
from imagegen.images.cached import CachedStore
from imagegen.images.disk import DiskStore
from imagegen.images.former_stores import StoreWithFormer
from imagegen.images.redis_blobs import RedisBlobStore
from imagegen.images.store import ImageStore, VerifiedImage
from imagegen.redis_client.connection import Connection
from imagegen.redis_client.keys import Keys
from imagegen.tasks.image import StoredImage
from tests.images.backings import load
from tests.images.conftest import MakeImage

TASK, OTHER = "0123456789abcdef0123456789abcdef", "f" * 32
LATER_S = 600.0


@asynccontextmanager
async def changed(new: str, folder: Path, redis_url: str, prefix: str) -> AsyncIterator[tuple[ImageStore, ImageStore]]:
    """Yield the store of `IMAGE_STORE=new`, beside the other one of disk and redis, and that other one alone."""
    disk, connection = DiskStore(folder / "images", 1 << 30), Connection(redis_url)
    cache = disk if new == "disk" else DiskStore(folder / "cache", 1 << 30)
    redis = CachedStore(RedisBlobStore(connection, Keys(prefix), 1 << 30), cache)
    await disk.start()
    await cache.start()
    store, former = (disk, redis) if new == "disk" else (redis, disk)
    try:
        yield StoreWithFormer(store, [former], lambda: True), former
    finally:
        await connection.close()


async def saved(store: ImageStore, image: VerifiedImage, index: int = 0) -> StoredImage:
    """Save an image, and return its record."""
    await store.save(TASK, index, image, time.time() + LATER_S)
    return image.stored_at(index, store_id=store.store_id)


@pytest.mark.parametrize("new", ["disk", "redis"])
async def test_images_that_another_store_saved_are_found_next_to_those_of_the_current_store(
    new: str, tmp_path: Path, redis_url: str, prefix: str, make_image: MakeImage
) -> None:
    async with changed(new, tmp_path, redis_url, prefix) as (store, former):
        images = [make_image("red"), make_image("blue", pad_bytes=400_000)]
        records = [await saved(former, images[0]), await saved(store, images[1], index=1)]
        assert [await load(store, TASK, record) for record in records] == [image.data for image in images]
        assert [await store.contains(TASK, record) for record in records] == [True, True]
        assert await store.contains_all(TASK, records)
        missing = [replace(record, index=2) for record in records]
        assert [await load(store, TASK, record) for record in missing] == [None, None]
        assert not any([await store.contains_all(TASK, [*records, record]) for record in missing])


@pytest.mark.parametrize("new", ["disk", "redis"])
async def test_the_images_of_a_former_store_keep_their_end(
    new: str, tmp_path: Path, redis_url: str, prefix: str, make_image: MakeImage
) -> None:
    async with changed(new, tmp_path, redis_url, prefix) as (store, former):
        record = await saved(former, make_image())
        await store.extend_expiry(TASK, [record], time.time() - 1)
        assert not await store.contains_all(TASK, [record])
        assert not await former.contains_all(TASK, [record])


@pytest.mark.parametrize("new", ["disk", "redis"])
async def test_an_image_of_a_former_store_is_reused_in_the_current_store(
    new: str, tmp_path: Path, redis_url: str, prefix: str, make_image: MakeImage
) -> None:
    async with changed(new, tmp_path, redis_url, prefix) as (store, former):
        image = make_image()
        record = await saved(former, image)
        assert await store.reuse(TASK, record, OTHER, 3, time.time() + LATER_S)
        assert await load(store, OTHER, image.stored_at(3, store_id=store.store_id)) == image.data
        assert not await store.reuse(TASK, replace(record, index=1), OTHER, 4, time.time() + LATER_S)


@pytest.mark.parametrize("new", ["disk", "redis"])
async def test_an_image_in_the_folder_of_another_instance_is_not_gone(
    new: str, tmp_path: Path, redis_url: str, prefix: str, make_image: MakeImage
) -> None:
    async with changed(new, tmp_path, redis_url, prefix) as (store, _):
        record = make_image().stored_at(0, store_id="another-folder")
        assert await store.contains_all(TASK, [record])
        with pytest.raises(StoreUnavailable):
            await store.contains(TASK, record)
        with pytest.raises(StoreUnavailable):
            await store.open(TASK, record)
        with pytest.raises(StoreUnavailable):
            await store.reuse(TASK, record, OTHER, 0, time.time() + LATER_S)


async def test_the_images_of_a_former_folder_are_found_on_a_disk_that_is_full_from_the_start(
    tmp_path: Path, redis_url: str, prefix: str, make_image: MakeImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, image = DiskStore(tmp_path / "images", 1 << 30), make_image()
    await before.start()
    record = await saved(before, image)
    await before.close()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _folder: usage._replace(free=0))
    async with changed("redis", tmp_path, redis_url, prefix) as (store, former):
        assert not former.health.writable
        assert await load(store, TASK, record) == image.data
        assert await store.contains_all(TASK, [record])
        assert await store.reuse(TASK, record, OTHER, 0, time.time() + LATER_S)


async def test_what_the_current_store_has_is_found_by_one_command_and_reused_without_being_read(
    tmp_path: Path, redis_url: str, prefix: str, make_image: MakeImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    connection, cache = Connection(redis_url), DiskStore(tmp_path / "cache", 1 << 30)
    await cache.start()
    bucket, redis = (CachedStore(RedisBlobStore(connection, Keys(f"{prefix}{name}"), 1 << 30), cache) for name in "ab")
    store = StoreWithFormer(bucket, [redis])
    records = [await saved(bucket, make_image(pad_bytes=1_000 * index), index) for index in range(3)]
    before = connection.meter.commands["pictures"]
    assert await store.contains_all(TASK, records)
    assert connection.meter.commands["pictures"] == before + 1
    monkeypatch.setattr(CachedStore, "open", None)
    assert await store.reuse(TASK, records[0], OTHER, 0, time.time() + LATER_S)
    await connection.close()


@pytest.mark.parametrize("new", ["disk", "redis"])
async def test_an_image_that_an_instance_with_another_store_may_have_is_not_gone(
    new: str, tmp_path: Path, redis_url: str, prefix: str, make_image: MakeImage
) -> None:
    async with changed(new, tmp_path, redis_url, prefix) as (store, former):
        in_bucket, differ = make_image().stored_at(0), [True]
        mixed = StoreWithFormer(store, [former], others_differ=lambda: differ[0])
        record = await saved(mixed, make_image("red"), index=1)
        assert await mixed.contains_all(TASK, [in_bucket, record])
        for call in (mixed.contains, mixed.open):
            with pytest.raises(StoreUnavailable):
                await call(TASK, in_bucket)
        with pytest.raises(StoreUnavailable):
            await mixed.reuse(TASK, in_bucket, OTHER, 0, time.time() + LATER_S)
        differ[0] = False
        assert not await mixed.contains_all(TASK, [in_bucket])
        assert await load(mixed, TASK, in_bucket) is None
        assert not await mixed.reuse(TASK, in_bucket, OTHER, 0, time.time() + LATER_S)
