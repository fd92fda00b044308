"""Tests of the disk cache in front of a remote store: saved fetches, visible failures, and no lost paid image."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import pytest

from imagegen.errors import QueueUnavailable, StoreUnavailable
from imagegen.images import cached
from imagegen.images.cached import CACHED_S, CachedStore
from imagegen.images.disk import DiskLookups, DiskStore
from imagegen.images.files import SMALL_BYTES
from imagegen.images.store import PIECE_BYTES, OpenedImage, VerifiedImage
from imagegen.tasks.image import StoredImage
from imagegen.turn_queue import PER_TURN
from tests.images.backings import in_memory, is_writable, load
from tests.images.conftest import MakeImage
from tests.support import Turns, eventually

TASK = "0123456789abcdef0123456789abcdef"


class RemoteStore:
    """Remote store in memory: unavailable for the next `failing_puts`, or for all calls."""

    loops: Mapping[str, Callable[[], Coroutine[None, None, None]]] = MappingProxyType({})

    def __init__(self) -> None:
        self.data_by_key: dict[tuple[str, int, str], bytes] = {}
        self.away: Exception | None = None
        self.failing_puts = 0
        self.gets = 0
        self.room_bytes = 10**9

    async def start(self) -> None:
        pass

    async def close(self) -> None:
        pass

    async def put(self, task_id: str, image: StoredImage, source: bytes | Path, expires_at_s: float) -> None:
        if self.failing_puts:
            self.failing_puts -= 1
            raise QueueUnavailable
        self._answers()
        if image.size_bytes > self.room_bytes:
            raise StoreUnavailable
        data = source if isinstance(source, bytes) else source.read_bytes()  # noqa: ASYNC240
        self.data_by_key[task_id, image.index, image.sha256] = data

    async def reuse(self, source_id: str, image: StoredImage, task_id: str, index: int, expires_at_s: float) -> bool:
        raise NotImplementedError

    async def get(self, task_id: str, image: StoredImage, offset: int, length: int) -> AsyncGenerator[bytes, None]:
        self._answers()
        self.gets += 1
        data = self.data_by_key.get((task_id, image.index, image.sha256), b"")
        for start in range(offset, min(offset + length, len(data)), PIECE_BYTES):
            yield data[start : min(start + PIECE_BYTES, offset + length)]
            await asyncio.sleep(0)

    async def contains_all(self, task_id: str, images: Sequence[StoredImage]) -> bool:
        self._answers()
        return all((task_id, image.index, image.sha256) in self.data_by_key for image in images)

    async def extend_expiry(self, task_id: str, images: Sequence[StoredImage], expires_at_s: float) -> None:
        self._answers()

    async def probe(self, size_bytes: int) -> None:
        self._answers()
        if size_bytes > self.room_bytes:
            raise StoreUnavailable

    def _answers(self) -> None:
        if self.away:
            raise self.away


@pytest.fixture
def port() -> RemoteStore:
    return RemoteStore()


@pytest.fixture
async def store(port: RemoteStore, tmp_path: Path) -> AsyncIterator[CachedStore]:
    store = CachedStore(port, DiskStore(tmp_path / "cache", 1_000_000, lookups=DiskLookups(is_cache=True)))
    await store.start()
    yield store
    await store.close()


def stored(image: VerifiedImage, index: int = 0) -> StoredImage:
    return image.stored_at(index)


def later() -> float:
    return time.time() + 600


async def test_a_saved_image_is_served_from_the_disk(
    store: CachedStore, port: RemoteStore, make_image: MakeImage
) -> None:
    image = make_image()
    await store.save(TASK, 0, image, later())
    port.away = QueueUnavailable()
    assert await load(store, TASK, stored(image)) == image.data
    assert port.gets == 0


async def test_an_image_survives_an_empty_disk_and_is_fetched_once(
    store: CachedStore, port: RemoteStore, tmp_path: Path, make_image: MakeImage
) -> None:
    image = make_image()
    await store.save(TASK, 0, image, later())
    shutil.rmtree(tmp_path / "cache")
    assert [await load(store, TASK, stored(image)) for _ in range(3)] == [image.data] * 3
    assert port.gets == 1


async def test_clients_that_wait_for_one_fetch_resume_in_turn(
    store: CachedStore, port: RemoteStore, make_image: MakeImage
) -> None:
    image, opened = make_image(), list[bytes | None]()
    port.data_by_key[TASK, 0, image.sha256] = in_memory(image)

    async def load_one() -> None:
        opened.append(await load(store, TASK, stored(image)))

    turns = Turns(lambda: len(opened))
    await asyncio.gather(*(load_one() for _ in range(5 * PER_TURN)))
    assert turns.most() <= PER_TURN
    assert (opened, port.gets) == ([image.data] * 5 * PER_TURN, 1)


async def test_a_client_whose_look_at_the_disk_was_slow_uses_the_fetch_that_ended_meanwhile(
    store: CachedStore, port: RemoteStore, make_image: MakeImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, has_looked, may_end, look = make_image(), asyncio.Event(), asyncio.Event(), DiskStore.open
    port.data_by_key[TASK, 0, image.sha256] = in_memory(image)

    async def look_slowly(cache: DiskStore, task_id: str, image: StoredImage) -> OpenedImage | None:
        found = await look(cache, task_id, image)
        has_looked.set()
        await may_end.wait()
        return found

    with monkeypatch.context() as patched:
        patched.setattr(DiskStore, "open", look_slowly)
        slow = asyncio.create_task(load(store, TASK, stored(image)))
        await has_looked.wait()
    assert await load(store, TASK, stored(image)) == image.data
    may_end.set()
    assert await slow == image.data
    assert port.gets == 1


async def test_fetched_images_are_revalidated(port: RemoteStore, tmp_path: Path, make_image: MakeImage) -> None:
    image, now = make_image(), [time.time()]
    port.data_by_key[TASK, 0, image.sha256] = in_memory(image)
    cache = DiskStore(tmp_path / "cache", 1_000_000, clock=lambda: now[0])
    store = CachedStore(port, cache, clock=lambda: now[0])
    for passed_s in (0.0, CACHED_S - 1, 2.0):
        now[0] += passed_s
        assert await load(store, TASK, stored(image)) == image.data
    assert port.gets == 2


async def test_the_cache_does_not_decide_what_the_store_contains(
    store: CachedStore, port: RemoteStore, make_image: MakeImage
) -> None:
    image = make_image()
    await store.save(TASK, 0, image, later())
    port.data_by_key.clear()
    assert not await store.contains_all(TASK, [stored(image)])


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data[:-1] + b"?", lambda _: b""])
async def test_damaged_bytes_are_missing_and_never_served_or_cached(
    store: CachedStore, port: RemoteStore, make_image: MakeImage, damage: Callable[[bytes], bytes]
) -> None:
    image = make_image()
    port.data_by_key[TASK, 0, image.sha256] = damage(in_memory(image))
    assert await load(store, TASK, stored(image)) is None
    port.data_by_key[TASK, 0, image.sha256] = in_memory(image)
    assert await load(store, TASK, stored(image)) == image.data


async def test_a_failed_save_is_reported_until_the_next_probe(
    store: CachedStore, port: RemoteStore, make_image: MakeImage
) -> None:
    image = make_image()
    port.away = QueueUnavailable()
    with pytest.raises(StoreUnavailable):
        await store.save(TASK, 0, image, later())
    await store.check()
    assert not is_writable(store)
    port.away = None
    assert await load(store, TASK, stored(image)) is None
    await store.check()
    assert is_writable(store)
    await store.save(TASK, 0, image, later())
    assert await store.contains_all(TASK, [stored(image)])


async def test_a_store_without_space_for_a_large_image_is_unhealthy(
    store: CachedStore, port: RemoteStore, make_image: MakeImage
) -> None:
    image = make_image()
    port.room_bytes = image.size_bytes - 1
    with pytest.raises(StoreUnavailable):
        await store.save(TASK, 0, image, later())
    await store.check()
    assert not is_writable(store)
    port.room_bytes = image.size_bytes
    await store.check()
    assert is_writable(store)
    await store.save(TASK, 0, image, later())


async def test_a_store_that_fails_again_is_probed_less_often(
    store: CachedStore, port: RemoteStore, make_image: MakeImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cached, "PROBE_INTERVAL_S", 0.02)
    watching = asyncio.create_task(store.watch())
    loop, took_s = asyncio.get_running_loop(), []
    for _ in range(4):
        port.failing_puts, began = 1, loop.time()
        with pytest.raises(StoreUnavailable):
            await store.save(TASK, 0, make_image(), later())
        await asyncio.wait_for(store.health.wait_writable(), 20)
        took_s.append(loop.time() - began)
    watching.cancel()
    assert took_s[3] >= 0.15  # 0.02 doubled three times


def large_image() -> VerifiedImage:
    data = os.urandom(SMALL_BYTES * 3)
    return VerifiedImage("image/png", len(data), 8, 8, hashlib.sha256(data).hexdigest(), data)


async def test_a_large_image_is_saved_from_its_file_and_fetched_once(
    store: CachedStore, port: RemoteStore, tmp_path: Path
) -> None:
    image = large_image()
    assert store.spool_folder is not None
    path = store.spool_folder / "large"
    path.write_bytes(image.source if isinstance(image.source, bytes) else b"")
    spooled = VerifiedImage("image/png", image.size_bytes, 8, 8, image.sha256, path=path)
    await store.save(TASK, 0, spooled, later())
    assert not path.exists()
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").mkdir()
    loaded = await asyncio.gather(*(load(store, TASK, stored(image)) for _ in range(20)))
    assert loaded == [image.data] * 20
    assert port.gets == 1
    spool = store.spool_folder
    await eventually(lambda: [path.name for path in spool.iterdir()] == ["lock"])


async def test_a_large_image_is_read_in_pieces_if_the_cache_is_full(
    store: CachedStore, port: RemoteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = large_image()
    await store.save(TASK, 0, image, later())
    folder, cache = store.spool_folder, store._cache
    assert folder is not None
    await cache.close()
    assert isinstance(cache, DiskStore)
    shutil.rmtree(Path(cache._root))
    cache.health.mark_failed("ENOSPC")
    assert store.spool_folder is None
    assert await load(store, TASK, stored(image)) == image.data
    opened = await store.open(TASK, stored(image))
    assert opened is not None
    data = in_memory(image)
    assert b"".join([piece async for piece in opened.read(7, 300_000)]) == data[7:300_007]
    port.data_by_key[TASK, 0, image.sha256] = data[:-1] + bytes([data[-1] ^ 1])
    with pytest.raises(StoreUnavailable):
        await load(store, TASK, stored(image))
    port.data_by_key.clear()
    assert await load(store, TASK, stored(image)) is None


@pytest.mark.parametrize("away", [QueueUnavailable(), StoreUnavailable()])
async def test_an_unavailable_port_is_an_unavailable_store(
    store: CachedStore, port: RemoteStore, make_image: MakeImage, away: Exception
) -> None:
    record = stored(make_image())
    port.away = away
    calls: list[Awaitable[object]] = [
        load(store, TASK, record),
        store.contains_all(TASK, [record]),
        store.extend_expiry(TASK, [record], later()),
    ]
    for call in calls:
        with pytest.raises(StoreUnavailable):
            await call
    assert await store.contains_all(TASK, [StoredImage(0, url="https://pics.example.org/1")])


async def test_a_failing_disk_costs_a_fetch_and_no_image(
    port: RemoteStore, tmp_path: Path, make_image: MakeImage
) -> None:
    (tmp_path / "cache").write_text("a file in the way")
    store, image = CachedStore(port, DiskStore(tmp_path / "cache", 1_000_000)), make_image()
    await store.start()
    await store.save(TASK, 0, image, later())
    assert [await load(store, TASK, stored(image)) for _ in range(2)] == [image.data] * 2
    await store.extend_expiry(TASK, [stored(image)], later())
    assert port.gets == 2


async def test_an_expired_image_is_not_saved(store: CachedStore, port: RemoteStore, make_image: MakeImage) -> None:
    await store.save(TASK, 0, make_image(), time.time() - 1)
    assert port.data_by_key == {}


async def test_an_image_that_only_the_cache_has_is_not_found_by_its_task(
    store: CachedStore, port: RemoteStore, make_image: MakeImage
) -> None:
    await store.save(TASK, 0, make_image(), time.time() + 60)
    assert len(await store.find(TASK, 0.0)) == 1
    port.data_by_key.clear()
    assert await store.find(TASK, 0.0) == []
