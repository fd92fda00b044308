"""Tests that a thumbnail is made once for all instances and kept in every kind of store."""

from __future__ import annotations

import asyncio
import errno
import io
import threading
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import BinaryIO

import pytest
from PIL import Image

from imagegen.errors import QueueUnavailable, StoreUnavailable, UnsupportedImage
from imagegen.images import shrink as shrink_module
from imagegen.images import thumbnails as module
from imagegen.images.disk import DiskStore
from imagegen.images.sniff import sniff
from imagegen.images.store import ImageStore, VerifiedImage
from imagegen.images.thumbnails import OLDEST_EACH, SIZES, ThumbnailLine, Thumbnails, ThumbnailSpec
from imagegen.redis_client.connection import Connection
from imagegen.redis_client.keys import Keys
from imagegen.tasks.image import StoredImage
from imagegen.turn_queue import PER_TURN
from tests.image_bytes import image_file
from tests.images.backings import BACKINGS, Backing
from tests.images.conftest import OpenStore
from tests.support import Turns, eventually

TASK = "0123456789abcdef0123456789abcdef"


class Instance:
    """One instance with its own connection."""

    def __init__(self, store: ImageStore, redis_url: str, prefix: str) -> None:
        self.store = store
        self.connection = Connection(redis_url)
        self.thumbnails = Thumbnails(store, self.connection, Keys(prefix), life_s=600.0)

    @property
    def made(self) -> int:
        return self.connection.meter.thumbnails

    @property
    def commands(self) -> int:
        return self.connection.meter.commands["pictures"]

    async def bytes_of(self, image: StoredImage, size: int = 256) -> bytes | None:
        found = await self.thumbnails.open(ThumbnailSpec(TASK, image, size, self.connection.clock() + 500))
        if found is None:
            return None
        record, opened = found
        data = await opened.read_all()
        opened.close()
        assert (record.size_bytes, record.content_type) == (len(data), "image/webp")
        with Image.open(io.BytesIO(data)) as opened_image:
            assert (opened_image.format, opened_image.size) == ("WEBP", (record.width, record.height))
            assert max(opened_image.size) <= size
        return data


def picture(colour: str = "teal") -> VerifiedImage:
    return sniff(image_file(colour, size=(640, 40)))


def undecodable() -> VerifiedImage:
    """Return a PNG that is whole by its headers and check sums; its pixels are no deflate stream."""
    data = picture().data
    assert data is not None
    pixels = b"IDATx"
    return sniff(data[:33] + b"\0\0\0\1" + pixels + zlib.crc32(pixels).to_bytes(4, "big") + data[-12:])


Start = Callable[..., Awaitable[Instance]]


@pytest.fixture(params=["disk", "redis"])
def backing(request: pytest.FixtureRequest) -> Backing:
    """Return a folder, or a store of another kind behind a folder: to `Thumbnails`, all others are like it."""
    return BACKINGS[request.param](request)


in_every_store = pytest.mark.parametrize("backing", BACKINGS, indirect=True)


@pytest.fixture
async def start(open_store: OpenStore, redis_url: str, prefix: str) -> AsyncIterator[Start]:
    async with AsyncExitStack() as stack:

        async def start_one(store: ImageStore | None = None) -> Instance:
            instance = Instance(store or await open_store(), redis_url, prefix)
            stack.push_async_callback(instance.connection.close)
            return instance

        yield start_one


async def save(instance: Instance, image: VerifiedImage, index: int = 0) -> StoredImage:
    await instance.store.save(TASK, index, image, instance.connection.clock() + 600)
    return image.stored_at(index, store_id=instance.store.store_id)


async def test_a_hundred_requests_on_two_instances_make_one_thumbnail(start: Start) -> None:
    first, second = await start(), await start()
    image = await save(first, picture())
    both = [instance.bytes_of(image) for _ in range(50) for instance in (first, second)]
    seen = set(await asyncio.gather(*both))
    assert len(seen) == 1
    assert first.made + second.made == 1


async def test_each_size_and_each_image_has_its_own_thumbnail(start: Start) -> None:
    instance = await start()
    images = [await save(instance, picture("teal")), await save(instance, picture("red"), 1)]
    seen = {await instance.bytes_of(image, size) for image in images for size in SIZES}
    assert len(seen) == instance.made == 8


@in_every_store
async def test_another_instance_serves_what_was_made_for_one_more_command(start: Start) -> None:
    first, second = await start(), await start()
    image = await save(first, picture())
    before = first.commands
    made = await first.bytes_of(image)
    assert await second.bytes_of(image) == made
    assert await first.bytes_of(image) == made
    assert (first.made, second.made) == (1, 0)
    if isinstance(first.store, DiskStore):
        assert (first.commands - before, second.commands) == (2, 1)


@in_every_store
async def test_the_thumbnail_of_a_replaced_image_is_another_one(start: Start) -> None:
    instance = await start()
    before = await instance.bytes_of(await save(instance, picture("teal")))
    assert await instance.bytes_of(await save(instance, picture("red"))) != before


async def test_an_image_that_is_gone_has_no_thumbnail(start: Start) -> None:
    instance = await start()
    await save(instance, picture())
    gone = picture("red").stored_at(0, store_id=instance.store.store_id)
    assert await instance.bytes_of(gone) is None
    assert await instance.bytes_of(await save(instance, picture("red"))) is not None


@in_every_store
async def test_an_evicted_thumbnail_is_made_again(start: Start, open_store: OpenStore) -> None:
    image = picture()
    store = await open_store(max_bytes=image.size_bytes)
    first, second = await start(store), await start(store)
    stored = await save(first, image)
    made = await first.bytes_of(stored)
    stored = await save(first, image)  # evicts the thumbnail, which is the oldest now
    assert await second.bytes_of(stored) == made
    assert second.made == 1
    stored = await save(first, image)
    assert await first.bytes_of(stored) == made
    assert first.made == 2


async def test_a_claim_of_an_instance_that_died_ends(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CLAIM_S", 0.3)
    monkeypatch.setattr(module, "POLL_S", 0.02)
    dead, live = await start(), await start()
    image = await save(live, picture())
    assert await dead.thumbnails._claim(ThumbnailSpec(TASK, image, 256, None).name, None) is None
    assert await live.bytes_of(image) is not None
    assert live.made == 1


async def test_an_instance_that_stops_leaves_no_claim_and_no_work_behind(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = await start(), await start()
    image = await save(first, picture())
    is_open, never = asyncio.Event(), asyncio.Event()

    async def opens_slowly(*_: object) -> None:
        is_open.set()
        await never.wait()

    with monkeypatch.context() as patch:
        patch.setattr(first.store, "open", opens_slowly)
        requesting = asyncio.create_task(first.bytes_of(image))
        await is_open.wait()
        requesting.cancel()  # its client has left; the thumbnail would be made nevertheless
        await first.thumbnails.close()
    sent = first.commands
    monkeypatch.setattr(module, "CLAIM_S", 3600.0)
    monkeypatch.setattr(module, "POLL_S", 3600.0)  # a claim that is left would be waited for
    assert await second.bytes_of(image) is not None
    assert (first.made, first.commands) == (0, sent)


async def test_a_foreign_record_is_replaced(start: Start) -> None:
    instance = await start()
    image = await save(instance, picture())
    key = instance.thumbnails._keys.thumbnail(ThumbnailSpec(TASK, image, 256, None).name)
    await instance.connection.commands.set(key, b"what is this?")
    assert await instance.bytes_of(image) is not None


async def test_a_record_of_another_type_is_replaced(start: Start) -> None:
    instance = await start()
    image = await save(instance, picture())
    key = instance.thumbnails._keys.thumbnail(ThumbnailSpec(TASK, image, 256, None).name)
    await instance.connection.commands.rpush(key, b"of another program")
    assert await instance.bytes_of(image) is not None
    assert isinstance(await instance.connection.commands.get(key), bytes)


async def test_an_image_that_cannot_be_decoded_is_tried_once(start: Start) -> None:
    instance = await start()
    image = await save(instance, undecodable())
    before = instance.commands
    for _ in range(3):
        with pytest.raises(UnsupportedImage):
            await instance.bytes_of(image)
    assert instance.made == 0
    if isinstance(instance.store, DiskStore):
        assert instance.commands - before == 2
    other = await start(instance.store)
    with pytest.raises(UnsupportedImage):
        await other.bytes_of(image)


@pytest.fixture
async def on_disk(redis_url: str, prefix: str, tmp_path: Path) -> AsyncIterator[Instance]:
    """Return an instance with the images in a folder."""
    store = DiskStore(tmp_path / "images", 10_000_000)
    await store.start()
    instance = Instance(store, redis_url, prefix)
    yield instance
    await instance.connection.close()
    await store.close()


async def test_thumbnails_are_made_while_redis_is_away(on_disk: Instance, monkeypatch: pytest.MonkeyPatch) -> None:
    image = await save(on_disk, picture())

    async def away(*_: object, **__: object) -> None:
        raise QueueUnavailable

    monkeypatch.setattr(on_disk.connection.commands, "set", away)
    made = await on_disk.bytes_of(image)
    assert made is not None
    assert await on_disk.bytes_of(image) == made
    assert on_disk.made == 1


class HeldThread:
    """The making of thumbnails, which stops at its first one until `go`. made: their images' widths."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[int] = []
        self.go = threading.Event()
        self._shrink = shrink_module.shrink
        monkeypatch.setattr(module, "shrink", self._held)

    def _held(self, source: bytes | BinaryIO, size: int) -> shrink_module.Thumbnail:
        data = source if isinstance(source, bytes) else source.read()
        self.made.append(sniff(data).width)
        assert self.go.wait(30)
        return self._shrink(data, size)


def is_long(instance: Instance, count: int) -> bool:
    return len(instance.thumbnails.line) == count


async def test_a_small_image_has_its_thumbnail_before_large_ones_that_wait_longer(
    on_disk: Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    thread = HeldThread(monkeypatch)
    images = [await save(on_disk, sniff(image_file(size=(600 + number, 400))), number) for number in range(6)]
    small = await save(on_disk, sniff(image_file(size=(64, 64))), 7)
    large = [asyncio.create_task(on_disk.bytes_of(image)) for image in images]
    await eventually(lambda: len(thread.made) == 1)
    last = asyncio.create_task(on_disk.bytes_of(small))
    await eventually(lambda: len(on_disk.thumbnails.line) == 6)
    thread.go.set()
    assert all(await asyncio.gather(*large, last))
    assert thread.made.index(64) == 1


async def test_a_large_image_waits_for_few_small_ones(on_disk: Instance, monkeypatch: pytest.MonkeyPatch) -> None:
    thread = HeldThread(monkeypatch)
    sizes = [(64, 64), (900, 900), *[(65 + number, 64) for number in range(8)]]
    images = [await save(on_disk, sniff(image_file(size=size)), number) for number, size in enumerate(sizes)]
    waiting = [asyncio.create_task(on_disk.bytes_of(images[0]))]
    await eventually(lambda: len(thread.made) == 1)
    for count, image in enumerate(images[1:], 1):
        waiting.append(asyncio.create_task(on_disk.bytes_of(image)))
        await eventually(partial(is_long, on_disk, count))
    thread.go.set()
    assert all(await asyncio.gather(*waiting))
    assert thread.made.index(900) <= OLDEST_EACH


async def test_a_thumbnail_that_is_given_up_gives_its_turn_to_the_next() -> None:
    line, held = ThumbnailLine(), asyncio.Event()

    async def hold(pixels: int) -> int:
        async with line.turn(pixels):
            await held.wait()
        return pixels

    first, second, third = (asyncio.create_task(hold(pixels)) for pixels in (3, 1, 2))
    await asyncio.sleep(0)
    second.cancel()
    first.cancel()
    await asyncio.wait([first, second])
    held.set()
    assert await asyncio.wait_for(third, 10) == 2
    assert await asyncio.wait_for(hold(4), 10) == 4


async def test_a_thumbnail_that_is_given_up_as_the_one_before_ends_gives_no_second_turn() -> None:
    line, held, in_turn = ThumbnailLine(), [asyncio.Event(), asyncio.Event()], list[int]()

    async def hold(pixels: int, until: asyncio.Event) -> None:
        async with line.turn(pixels):
            in_turn.append(pixels)
            await until.wait()
            in_turn.remove(pixels)

    first = asyncio.create_task(hold(1, held[0]))
    given_up, *others = (asyncio.create_task(hold(pixels, held[1])) for pixels in (2, 3, 4))
    await eventually(lambda: len(line) == 3)
    held[0].set()
    given_up.cancel()
    await asyncio.wait([first, given_up])
    await eventually(lambda: bool(in_turn))
    assert in_turn == [3]
    held[1].set()
    await asyncio.wait_for(asyncio.gather(*others), 10)


async def test_clients_that_wait_for_one_thumbnail_resume_in_turn(on_disk: Instance) -> None:
    image, opened = await save(on_disk, picture()), list[object]()

    async def open_one() -> None:
        opened.append(await on_disk.thumbnails.open(ThumbnailSpec(TASK, image, 256, on_disk.connection.clock() + 500)))

    turns = Turns(lambda: len(opened))
    await asyncio.gather(*(open_one() for _ in range(5 * PER_TURN)))
    assert turns.most() <= PER_TURN
    assert (len(opened), on_disk.made) == (5 * PER_TURN, 1)


async def test_a_store_that_cannot_save_still_has_thumbnails(on_disk: Instance, tmp_path: Path) -> None:
    image = await save(on_disk, picture())
    files = len(list((tmp_path / "images").rglob("*.*")))
    on_disk.store.health.mark_failed("ENOSPC")
    assert await on_disk.bytes_of(image) == await on_disk.bytes_of(image)
    assert on_disk.made == 2
    assert len(list((tmp_path / "images").rglob("*.*"))) == files


@pytest.mark.parametrize("error", [MemoryError(), ImportError("no memory"), OSError(errno.EMFILE, "Too many files")])
async def test_a_machine_without_memory_or_descriptors_is_an_error_that_passes(
    on_disk: Instance, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    image = await save(on_disk, picture())

    def fail() -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(shrink_module, "_load_pillow", fail)
        with pytest.raises(StoreUnavailable):
            await on_disk.bytes_of(image)
    assert await on_disk.bytes_of(image) is not None


async def test_a_store_that_cannot_be_read_is_an_error_and_leaves_no_claim(
    on_disk: Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = await save(on_disk, picture())

    async def unreadable(*_: object) -> None:
        raise StoreUnavailable

    with monkeypatch.context() as patch:
        patch.setattr(on_disk.store, "open", unreadable)
        with pytest.raises(StoreUnavailable):
            await on_disk.bytes_of(image)
    assert await on_disk.bytes_of(image) is not None
