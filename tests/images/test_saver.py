"""Tests of which images are stored here and which stay at their links."""

from __future__ import annotations

from collections.abc import Iterable

from imagegen.images.saver import LinkOnlySaver, StoringSaver
from imagegen.images.store import VerifiedImage
from imagegen.images.store_health import StoreHealth
from imagegen.tasks.image import GivenImage, ImageBytes, ImageLink, StoredImage

LINK, BYTES = ImageLink("https://example.com/a.png"), ImageBytes(b"picture")
IMAGE = VerifiedImage("image/png", 7, 8, 8, "a" * 64, b"picture")


class Fetcher:
    async def fetch(self, _image: GivenImage, *, age_s: float = 0.0) -> VerifiedImage:
        assert age_s == 0.0
        return IMAGE

    def resolve(self, link: ImageLink) -> ImageLink:
        return link if "://" in link.url else ImageLink(f"http://upstream{link.url}")


class Spool:
    def discard(self, _image: VerifiedImage) -> None:
        """Do nothing."""


class Store:
    store_id = "here"

    def __init__(self) -> None:
        self.health = StoreHealth("here")
        self.saved: list[tuple[str, int, float]] = []
        self.extended: list[tuple[StoredImage, ...]] = []

    async def save(self, task_id: str, index: int, _image: VerifiedImage, expires_at_s: float) -> None:
        self.saved.append((task_id, index, expires_at_s))

    async def extend_expiry(self, _task_id: str, images: Iterable[StoredImage], _expires_at_s: float) -> None:
        self.extended.append(tuple(images))


def describe(_image: VerifiedImage, _seed: int | None) -> tuple[str, str]:
    raise AssertionError("not set")


def make_saver(store: Store) -> StoringSaver:
    return StoringSaver(Fetcher(), Spool(), store, 60.0, clock=lambda: 1_000.0)  # type: ignore[arg-type]


async def test_every_image_is_fetched_and_saved_if_bytes_are_stored() -> None:
    store = Store()
    assert [make_saver(store).passthrough(0, image, 7) for image in (LINK, BYTES)] == [None, None]
    saved = await make_saver(store).save("t", 1, await make_saver(store).fetch(LINK), 7, describe)
    assert saved == StoredImage(1, "image/png", 7, 8, 8, "a" * 64, 7, store_id="here")
    assert store.saved == [("t", 1, 1_060.0)]


async def test_only_bytes_are_saved_if_links_are_passed_on() -> None:
    store = Store()
    links = LinkOnlySaver(make_saver(store))
    assert links.passthrough(1, LINK, 7) == StoredImage(1, seed=7, url=LINK.url)
    assert links.passthrough(1, BYTES, 7) is None
    assert (await links.save("t", 1, await links.fetch(BYTES), 7, describe)).sha256 == "a" * 64
    assert store.saved == [("t", 1, 1_060.0)]


async def test_a_relative_link_is_returned_as_an_absolute_one() -> None:
    given = LinkOnlySaver(make_saver(Store())).passthrough(0, ImageLink("/a.png"), None)
    assert given == StoredImage(0, url="http://upstream/a.png")


async def test_links_need_no_store_that_works_until_bytes_came() -> None:
    store = Store()
    links = LinkOnlySaver(make_saver(store))
    store.health.mark_failed("full")
    assert links.writable
    assert not make_saver(store).writable
    links.passthrough(0, BYTES, None)
    assert not links.writable


async def test_a_wait_for_the_store_ends_when_it_works_or_the_time_is_over() -> None:
    store = Store()
    store.health.mark_failed("full")
    await make_saver(store).wait_writable(0.01)
    store.health.mark_ok()
    await make_saver(store).wait_writable(60.0)


async def test_only_images_stored_here_are_extended() -> None:
    store, saved = Store(), StoredImage(0, sha256="a" * 64)
    await LinkOnlySaver(make_saver(store)).extend_expiry("t", (saved, StoredImage(1, url=LINK.url)))
    assert store.extended == [(saved,)]
