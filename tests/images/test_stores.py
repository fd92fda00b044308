"""Contract tests of every image store. A new store needs one entry in `backings.BACKINGS`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from msgspec.structs import replace

from imagegen.images.store import ImageStore, VerifiedImage
from imagegen.tasks.image import StoredImage
from tests.images.backings import load
from tests.images.conftest import MakeImage
from tests.support import eventually

Open = Callable[..., Awaitable[ImageStore]]
"""`await open_store(max_bytes=…)`: a started store; all of one test share what lies beneath (folder, Redis, bucket)."""

TASK = "0123456789abcdef0123456789abcdef"
OTHER = "f" * 32


def stored(image: VerifiedImage, index: int = 0) -> StoredImage:
    """Return the record of an image in its task."""
    return image.stored_at(index)


def later() -> float:
    return time.time() + 600


async def test_a_saved_image_is_loaded_byte_for_byte(open_store: Open, make_image: MakeImage) -> None:
    store = await open_store()
    for image in (make_image(kind="PNG"), make_image(kind="JPEG"), make_image(kind="WEBP")):
        await store.save(TASK, 0, image, later())
        assert await load(store, TASK, stored(image)) == image.data
        assert await store.contains_all(TASK, [stored(image)])


async def test_an_unsaved_image_is_missing(open_store: Open, make_image: MakeImage) -> None:
    store, image = await open_store(), make_image()
    await store.save(TASK, 0, image, later())
    for task, missing in ((OTHER, stored(image)), (TASK, stored(image, index=1)), (TASK, stored(make_image("red")))):
        assert await load(store, task, missing) is None
        assert not await store.contains_all(task, [missing])
    assert not await store.contains_all(TASK, [stored(image), stored(image, index=1)])


async def test_every_store_contains_the_empty_set(open_store: Open) -> None:
    assert await (await open_store()).contains_all(TASK, [])


async def test_an_image_left_upstream_is_not_missing(open_store: Open, make_image: MakeImage) -> None:
    store, image = await open_store(), make_image()
    link = StoredImage(1, url="https://pics.example.org/1")
    await store.save(TASK, 0, image, later())
    assert await load(store, TASK, link) is None
    assert await store.contains_all(TASK, [stored(image), link])
    await store.extend_expiry(TASK, [link], later())


async def test_saving_the_same_image_again_succeeds(open_store: Open, make_image: MakeImage) -> None:
    store, image = await open_store(max_bytes=10_000), make_image(pad_bytes=4_000)
    for _ in range(5):
        await store.save(TASK, 0, image, later())
    assert await load(store, TASK, stored(image)) == image.data


async def test_two_images_of_one_index_coexist(open_store: Open, make_image: MakeImage) -> None:
    store, old, new = await open_store(), make_image("red"), make_image("blue")
    await store.save(TASK, 0, old, later())
    await store.save(TASK, 0, new, later())
    assert await load(store, TASK, stored(old)) == old.data
    assert await load(store, TASK, stored(new)) == new.data


async def test_an_expired_image_is_missing(open_store: Open, make_image: MakeImage) -> None:
    store, image = await open_store(), make_image()
    await store.save(TASK, 0, image, time.time() - 1)
    assert await load(store, TASK, stored(image)) is None
    assert not await store.contains_all(TASK, [stored(image)])


async def test_extending_moves_the_end_of_each(open_store: Open, make_image: MakeImage) -> None:
    store, images = await open_store(), [make_image("red"), make_image("blue")]
    for index, image in enumerate(images):
        await store.save(TASK, index, image, time.time() + 30)
    records = [stored(image, index) for index, image in enumerate(images)]
    await store.extend_expiry(TASK, records, later())
    assert await store.contains_all(TASK, records)
    await store.extend_expiry(TASK, records, time.time() - 1)
    assert not await store.contains_all(TASK, records[:1])
    assert not await store.contains_all(TASK, records[1:])


async def test_extending_a_missing_image_does_not_fail(open_store: Open, make_image: MakeImage) -> None:
    store, image = await open_store(), make_image()
    await store.extend_expiry(TASK, [stored(image)], later())
    assert await load(store, TASK, stored(image)) is None


async def test_over_the_cap_the_oldest_go_first(open_store: Open, make_image: MakeImage) -> None:
    store = await open_store(max_bytes=20_000)
    images = [make_image(colour, pad_bytes=6_000) for colour in ("red", "green", "blue", "teal", "gold")]
    expires_at = later()
    for index, image in enumerate(images):
        await store.save(TASK, index, image, expires_at)
    records = [await load(store, TASK, stored(image, index)) for index, image in enumerate(images)]
    assert records == [None, None, *(image.data for image in images[2:])]


async def test_a_single_image_over_the_cap_is_stored(open_store: Open, make_image: MakeImage) -> None:
    store, small, large = await open_store(max_bytes=3_000), make_image("red"), make_image(pad_bytes=9_000)
    await store.save(TASK, 0, small, later())
    await store.save(TASK, 1, large, later())
    assert await load(store, TASK, stored(small)) is None
    assert await load(store, TASK, stored(large, index=1)) == large.data


async def test_another_process_finds_what_was_saved_before_and_after_its_start(
    open_store: Open, make_image: MakeImage
) -> None:
    first, before, after = await open_store(), make_image("red"), make_image("blue")
    await first.save(TASK, 0, before, later())
    second = await open_store()
    await first.save(TASK, 1, after, later())
    assert await load(second, TASK, stored(before)) == before.data
    assert await load(second, TASK, stored(after, index=1)) == after.data
    assert await second.contains_all(TASK, [stored(before), stored(after, index=1)])


async def test_bytes_that_differ_from_the_record_are_not_served(open_store: Open, make_image: MakeImage) -> None:
    store, image = await open_store(), make_image()
    await store.save(TASK, 0, image, later())
    same_start = image.sha256[:12] + "0" * 52
    assert await load(store, TASK, replace(stored(image), sha256=same_start)) is None
    await store.save(TASK, 0, image, later())
    assert await load(store, TASK, replace(stored(image), size_bytes=1)) is None


async def test_concurrent_saves_are_all_stored(open_store: Open, make_image: MakeImage) -> None:
    store = await open_store()
    images = [make_image(f"#0000{index:02x}") for index in range(30)]
    await asyncio.gather(*(store.save(TASK, index, image, later()) for index, image in enumerate(images)))
    loaded = await asyncio.gather(*(load(store, TASK, stored(image, index)) for index, image in enumerate(images)))
    assert loaded == [image.data for image in images]


async def test_an_image_is_stored_for_another_task_too(open_store: Open, make_image: MakeImage) -> None:
    store, image = await open_store(), make_image()
    await store.save(TASK, 3, image, later())
    assert await store.reuse(TASK, stored(image, 3), OTHER, 0, later())
    assert await load(store, OTHER, stored(image)) == image.data
    assert await load(await open_store(), OTHER, stored(image)) == image.data
    assert await store.contains_all(OTHER, [stored(image)])
    assert await store.contains_all(TASK, [stored(image, 3)])


async def test_a_reused_image_outlives_the_task_that_made_it(open_store: Open, make_image: MakeImage) -> None:
    store, image, is_reused = await open_store(), make_image(), False
    for life_s in (1.0, 4.0, 16.0):  # the first one that this machine is fast enough for
        expires_at_s = time.time() + life_s
        await store.save(TASK, 0, image, expires_at_s)
        is_reused = await store.reuse(TASK, stored(image), OTHER, 0, later())
        if time.time() < expires_at_s:
            break
    assert is_reused
    await eventually(lambda: time.time() > expires_at_s)
    assert await load(store, OTHER, stored(image)) == image.data
    assert await load(await open_store(), OTHER, stored(image)) == image.data


async def is_gone(store: ImageStore, task_id: str, image: StoredImage) -> bool:
    return not await store.contains_all(task_id, [image])


async def test_an_image_that_is_gone_is_not_reused(open_store: Open, make_image: MakeImage) -> None:
    store, image = await open_store(), make_image()
    assert not await store.reuse(TASK, stored(image), OTHER, 0, later())
    assert not await store.contains_all(OTHER, [stored(image)])


async def test_reusing_an_image_again_extends_its_life(open_store: Open, make_image: MakeImage) -> None:
    store, image = await open_store(), make_image()
    await store.save(TASK, 0, image, later())
    expires_at_s = time.time() + 1.0
    assert await store.reuse(TASK, stored(image), OTHER, 0, expires_at_s)
    assert await store.reuse(TASK, stored(image), OTHER, 0, later())
    await eventually(lambda: time.time() > expires_at_s)
    assert await load(store, OTHER, stored(image)) == image.data


async def test_reused_images_count_under_the_cap(open_store: Open, make_image: MakeImage) -> None:
    image = make_image(pad_bytes=40_000, kind="JPEG")
    store = await open_store(max_bytes=image.size_bytes * 2)
    await store.save(TASK, 0, image, later())
    assert await store.reuse(TASK, stored(image), OTHER, 0, later())
    for number in range(2):
        await store.save(f"{number}" * 32, 0, make_image("red", pad_bytes=40_000, kind="JPEG"), later())
    assert await is_gone(store, TASK, stored(image))
    assert await is_gone(store, OTHER, stored(image))
