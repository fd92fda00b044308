"""Tests of the choice of finished images for a request that differs only in `n`, over a real folder."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from imagegen.images.disk import DiskStore
from imagegen.images.reuse import ImageReuse
from imagegen.tasks.family import RequestFamily
from imagegen.tasks.image import StoredImage
from imagegen.tasks.request import GenerationRequest, fingerprint, request_digest
from imagegen.tasks.task import State, Task
from tests.images.conftest import MakeImage

REQUEST = GenerationRequest(prompt="a cat", model="m", width=512, height=512, n=2)
NEW_TASK = "f" * 32


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[DiskStore]:
    store = DiskStore(tmp_path / "images", 1_000_000)
    await store.start()
    yield store
    await store.close()


def family(n: int) -> RequestFamily:
    return RequestFamily(replace(REQUEST, n=n), "together", None, None)


async def finished(
    store: DiskStore, make_image: MakeImage, n: int, *gone: int, warnings: tuple[str, ...] = (), colour: str = "teal"
) -> Task:
    """Store a task with `n` images, but not those that are gone."""
    canonical = family(n).request.canonical("together", None)
    task_id, images = fingerprint(canonical, None), []
    for index in range(n):
        image = make_image(colour, kind="JPEG", pad_bytes=index)
        if index not in gone:
            await store.save(task_id, index, image, time.time() + 600)
        images.append(image.stored_at(index))
    request_json = family(n).request.to_json()
    task = Task(task_id, 1, 1, request_digest(canonical), "m", request_json, 0.0, State.COMPLETED)
    return replace(task, images=tuple(images), warnings=warnings)


def shas(images: tuple[StoredImage, ...]) -> list[str]:
    return [image.sha256 for image in images]


async def test_images_keep_their_places(store: DiskStore, make_image: MakeImage) -> None:
    four = await finished(store, make_image, 4, 1)
    reused = await ImageReuse(store, 600.0).reuse(NEW_TASK, family(6), [four])
    assert [image.index for image in reused.images] == [0, 2, 3]
    assert all(image.reused and image.store_id == store.store_id for image in reused.images)
    assert await store.contains_all(NEW_TASK, reused.images)


async def test_an_image_beyond_n_takes_the_place_of_one_that_is_gone(store: DiskStore, make_image: MakeImage) -> None:
    four = await finished(store, make_image, 4, 0, 2)
    reused = await ImageReuse(store, 600.0).reuse(NEW_TASK, family(2), [four])
    assert shas(reused.images) == [four.images[3].sha256, four.images[1].sha256]
    assert [image.index for image in reused.images] == [0, 1]
    assert await store.contains_all(NEW_TASK, reused.images)


async def test_the_task_with_most_images_is_used(store: DiskStore, make_image: MakeImage) -> None:
    two = await finished(store, make_image, 2, colour="red")
    five = await finished(store, make_image, 5, 0, 1, 2, 3)
    three = await finished(store, make_image, 3, colour="blue")
    reused = await ImageReuse(store, 600.0).reuse(NEW_TASK, family(4), [two, five, three])
    assert shas(reused.images) == shas(three.images)


async def test_the_record_of_another_request_is_not_used(store: DiskStore, make_image: MakeImage) -> None:
    four = await finished(store, make_image, 4)
    reuse = ImageReuse(store, 600.0)
    for other in (replace(four, digest="0" * 32), replace(four, request_json=b"{"), replace(four, request_json=b"")):
        assert not (await reuse.reuse(NEW_TASK, family(2), [other])).images


async def test_warnings_about_the_images_stay(store: DiskStore, make_image: MakeImage) -> None:
    warnings = ("steps was left out", "only 4 of 5 images came: late")
    five = await finished(store, make_image, 5, warnings=warnings)
    reused = await ImageReuse(store, 600.0).reuse(NEW_TASK, family(2), [replace(five, images=five.images[:4])])
    assert reused.warnings == ("steps was left out",)


async def test_links_of_the_provider_need_no_store(store: DiskStore, make_image: MakeImage) -> None:
    links = tuple(StoredImage(index, url=f"https://images.example.org/{index}") for index in range(2))
    two = replace(await finished(store, make_image, 2), images=links)
    reused = await ImageReuse(store, 600.0).reuse(NEW_TASK, family(3), [two])
    assert [image.url for image in reused.images] == [link.url for link in links]
