"""Which pictures are kept here, and which stay where their links lead."""

from __future__ import annotations

from imagegen.images.keeper import Keeper, LinkKeeper
from imagegen.images.store import VerifiedImage
from imagegen.tasks.image import ImageBytes, ImageLink, StoredImage

LINK, BYTES = ImageLink("https://example.com/a.png"), ImageBytes(b"picture")


class Fetcher:
    async def fetch(self, _image: ImageLink | ImageBytes) -> VerifiedImage:
        return VerifiedImage("image/png", 7, 8, 8, "a" * 64, b"picture")


class Store:
    store_id = "here"

    def __init__(self) -> None:
        self.saved: list[tuple[str, int, float]] = []
        self.extended: list[tuple[StoredImage, ...]] = []

    async def save(self, task_id: str, index: int, _image: VerifiedImage, expires_at_s: float) -> None:
        self.saved.append((task_id, index, expires_at_s))

    async def extend_expiry(self, _task_id: str, images, _expires_at_s: float) -> None:
        self.extended.append(tuple(images))


def keeper(store: Store) -> Keeper:
    return Keeper(Fetcher(), store, 60.0, clock=lambda: 1_000.0)  # type: ignore[arg-type]


async def test_every_picture_is_kept_where_bytes_are_kept() -> None:
    store = Store()
    assert [keeper(store).as_it_is(0, picture, 7) for picture in (LINK, BYTES)] == [None, None]
    kept = await keeper(store).keep("t", 1, LINK, 7)
    assert kept == StoredImage(1, "image/png", 7, 8, 8, "a" * 64, 7, keeper="here")
    assert store.saved == [("t", 1, 1_060.0)]


async def test_a_link_needs_no_keeping_where_links_are_handed_out_but_bytes_do() -> None:
    store = Store()
    links = LinkKeeper(keeper(store))
    assert links.as_it_is(1, LINK, 7) == StoredImage(1, seed=7, url=LINK.url)
    assert links.as_it_is(1, BYTES, 7) is None
    assert (await links.keep("t", 1, BYTES, 7)).sha256 == "a" * 64
    assert store.saved == [("t", 1, 1_060.0)]


async def test_only_what_is_kept_here_lives_longer() -> None:
    store, kept = Store(), StoredImage(0, sha256="a" * 64)
    await LinkKeeper(keeper(store)).extend("t", (kept, StoredImage(1, url=LINK.url)))
    assert store.extended == [(kept,)]
