"""Tests of the search for the images of a task that no record names."""

from __future__ import annotations

import time

from imagegen.images.disk import DiskStore
from tests.images.conftest import ImageFile, MakeImage, OpenStore
from tests.support import Clock, eventually

TASK, NEIGHBOUR = "0123456789abcdef0123456789abcdef", "0123456789abcdef0123456789abcdee"


async def test_an_image_that_is_here_is_found_by_its_task_alone(open_store: OpenStore, make_image: MakeImage) -> None:
    store, image, expires_at_s = await open_store(), make_image(), time.time() + 60
    await store.save(NEIGHBOUR, 0, make_image("plum"), expires_at_s)
    await store.save(TASK, 12, image, expires_at_s)
    found = await store.find(TASK, 0.0)
    assert found == [image.stored_at(12, store_id=store.store_id)]
    assert await store.contains_all(TASK, found)
    assert await store.find("f" * 32, 0.0) == []


async def test_the_images_of_a_task_are_found_in_their_order(
    store: DiskStore, clock: Clock, make_image: MakeImage
) -> None:
    images = {index: make_image(kind=kind) for index, kind in ((10, "WEBP"), (2, "PNG"), (0, "JPEG"))}
    for index, image in images.items():
        await store.save(TASK, index, image, clock.now + 60)
    expected = [images[index].stored_at(index, store_id=store.store_id) for index in (0, 2, 10)]
    assert await store.find(TASK, 0.0) == expected


async def test_of_two_images_for_one_place_the_newer_one_is_found_and_none_of_a_former_submit(
    store: DiskStore, clock: Clock, make_image: MakeImage, image_file: ImageFile
) -> None:
    older, newer = make_image(), make_image("plum")
    for image in (older, newer):
        await store.save(TASK, 0, image, clock.now + 60)
    changed_at_s = image_file(TASK, newer).stat().st_ctime

    def is_newer() -> bool:
        image_file(TASK, older).touch()
        return image_file(TASK, older).stat().st_ctime > changed_at_s

    await eventually(is_newer)
    (found,) = await store.find(TASK, 0.0)
    assert found.sha256 == older.sha256
    assert await store.find(TASK, changed_at_s + 60.0) == []


async def test_a_file_that_is_damaged_is_not_found(
    store: DiskStore, clock: Clock, make_image: MakeImage, image_file: ImageFile
) -> None:
    image = make_image()
    data = image.data or b""
    for index, damaged in enumerate((data[:-1], data + b"x", b"")):
        await store.save(TASK, index, image, clock.now + 60)
        image_file(TASK, image, index).write_bytes(damaged)
    assert await store.find(TASK, 0.0) == []
