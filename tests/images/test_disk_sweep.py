"""Tests of the sweep of the disk store: what it removes, what it counts, and what happens during it."""

from __future__ import annotations

import asyncio
import errno
import os
import time
from pathlib import Path
from typing import Any

import pytest
from loguru import logger

from imagegen.errors import StoreUnavailable
from imagegen.images import disk
from imagegen.images.disk import ORPHAN_S, DiskStore
from imagegen.images.disk_index import EXPIRED_AT_ONCE
from imagegen.images.disk_sweep import SweptFolder, sweep_folder
from imagegen.images.file_names import task_of
from imagegen.images.store import VerifiedImage
from imagegen.tasks.image import StoredImage
from tests.images.backings import load
from tests.images.conftest import ImageFile, MakeImage
from tests.support import Clock

TASK = "0123456789abcdef0123456789abcdef"


def stored(image: VerifiedImage, index: int = 0) -> StoredImage:
    return image.stored_at(index)


def files(tmp_path: Path) -> list[Path]:
    return sorted(path for path in (tmp_path / "data" / "images").rglob("*") if path.is_file())


async def test_a_sweep_removes_what_has_expired_and_its_empty_folder(
    store: DiskStore, tmp_path: Path, image_file: ImageFile, clock: Clock, make_image: MakeImage
) -> None:
    short, long = make_image("red"), make_image("blue")
    await store.save(TASK, 0, short, clock.now + 10)
    await store.save("f" * 32, 0, long, clock.now + 60)
    clock.now += 10
    assert await load(store, TASK, stored(short)) is None
    await store.sweep_once()
    assert [task_of(str(path)) for path in files(tmp_path)] == ["f" * 32]
    assert not image_file(TASK, short).parent.exists()


async def test_expired_images_free_space_without_a_sweep(
    store: DiskStore, tmp_path: Path, clock: Clock, make_image: MakeImage
) -> None:
    image = make_image()
    for number in range(EXPIRED_AT_ONCE + 5):
        await store.save(f"{number:032x}", 0, image, clock.now + 10)
    await store.extend_expiry(f"{0:032x}", [stored(image)], clock.now + 60)
    clock.now += 10
    await store.save(TASK, 0, image, clock.now + 60)
    left = [f"{0:032x}", *(f"{number:032x}" for number in range(EXPIRED_AT_ONCE + 1, EXPIRED_AT_ONCE + 5)), TASK]
    assert sorted(task_of(str(path)) for path in files(tmp_path)) == sorted(left)


async def test_a_sweep_deletes_orphans_and_leaves_foreign_files(
    store: DiskStore, tmp_path: Path, clock: Clock, make_image: MakeImage
) -> None:
    await store.save(TASK, 0, make_image(), clock.now + ORPHAN_S + 60)
    folder = tmp_path / "data" / "images"
    ours = files(tmp_path)[0]
    stranger, orphan, fresh = folder / "README", ours.with_name(".0-a.png.1.part"), ours.with_name(".0-a.png.2.part")
    for path in (stranger, orphan):
        path.write_bytes(b"x")
        os.utime(path, (0, 0))
    await store.sweep_once()
    assert files(tmp_path) == sorted([stranger, ours, orphan])
    clock.now += ORPHAN_S
    fresh.write_bytes(b"x")
    os.utime(fresh, (0, 0))
    await store.sweep_once()
    assert files(tmp_path) == sorted([stranger, ours, fresh])


async def test_files_of_an_earlier_run_count_after_the_first_sweep(
    store: DiskStore, tmp_path: Path, clock: Clock, make_image: MakeImage
) -> None:
    images = [make_image(colour, pad_bytes=6_000) for colour in ("red", "green", "blue")]
    for index, image in enumerate(images):
        await store.save(TASK, index, image, clock.now + 60 - index)
    again = DiskStore(tmp_path / "data" / "images", 13_500, clock=clock)
    await again.start()
    await again.sweep_once()
    loaded = [await load(again, TASK, stored(image, index)) for index, image in enumerate(images)]
    assert loaded == [images[0].data, images[1].data, None]
    await again.save(TASK, 3, make_image("gold", pad_bytes=6_000), clock.now + 70)
    assert await load(again, TASK, stored(images[1], 1)) is None
    assert await load(again, TASK, stored(images[0])) == images[0].data


@pytest.mark.parametrize("is_extended", [True, False])
async def test_a_sweep_keeps_an_expired_image_that_another_process_needs_meanwhile(
    store: DiskStore,
    tmp_path: Path,
    clock: Clock,
    make_image: MakeImage,
    monkeypatch: pytest.MonkeyPatch,
    is_extended: bool,
) -> None:
    image, loop = make_image(), asyncio.get_running_loop()
    await store.save(TASK, 0, image, clock.now + 60)
    other = DiskStore(tmp_path / "data" / "images", 1_000_000, clock=clock)
    await other.start()
    await other.sweep_once()
    clock.now += 61
    expires_at_s = clock.now + 600

    def sweep_and_wait(*args: Any, **kwargs: Any) -> SweptFolder:
        swept = sweep_folder(*args, **kwargs)
        asyncio.run_coroutine_threadsafe(meanwhile, loop).result(20)
        return swept

    if is_extended:
        meanwhile = other.extend_expiry(TASK, [stored(image)], expires_at_s)
    else:
        meanwhile = other.save(TASK, 0, image, expires_at_s)
    monkeypatch.setattr(disk, "sweep_folder", sweep_and_wait)
    await store.sweep_once()
    assert len(files(tmp_path)) == 1
    assert await store.contains(TASK, stored(image))
    await other.close()


async def test_two_processes_hold_one_cap_between_them(
    store: DiskStore, tmp_path: Path, clock: Clock, make_image: MakeImage
) -> None:
    pair = [DiskStore(tmp_path / "data" / "images", 20_000, clock=clock) for _ in range(2)]
    for index in range(6):
        image = make_image(f"#0000{index:02x}", pad_bytes=6_000)
        await pair[index % 2].save(TASK, index, image, clock.now + 60 + index)
    for each in pair:
        await each.sweep_once()
    assert [path.name.removeprefix(f"{TASK}-")[0] for path in files(tmp_path)] == ["3", "4", "5"]


async def test_the_loop_sweeps_at_once_and_ends_when_cancelled(
    store: DiskStore, tmp_path: Path, clock: Clock, make_image: MakeImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    await store.save(TASK, 0, make_image(), clock.now - 1)
    swept, sweep_once = asyncio.Event(), store.sweep_once

    async def fail_sweep() -> None:
        await sweep_once()
        swept.set()

    monkeypatch.setattr(store, "sweep_once", fail_sweep)
    loop = asyncio.create_task(store.sweep())
    await asyncio.wait_for(swept.wait(), 20)
    assert files(tmp_path) == []
    loop.cancel()
    with pytest.raises(asyncio.CancelledError):
        await loop


async def test_a_failing_sweep_is_logged_once_and_continues(store: DiskStore, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds, seen = 0, asyncio.Event()
    lines: list[str] = []

    async def fails() -> None:
        nonlocal rounds
        rounds += 1
        if rounds == 3:
            seen.set()
        raise StoreUnavailable from OSError(errno.EIO, "broken")

    monkeypatch.setattr(store, "sweep_once", fails)
    monkeypatch.setattr(disk, "SWEEP_INTERVAL_S", 0.0)
    sink = logger.add(lines.append, format="{message}")
    loop = asyncio.create_task(store.sweep())
    await asyncio.wait_for(seen.wait(), 20)
    loop.cancel()
    await asyncio.gather(loop, return_exceptions=True)
    logger.remove(sink)
    assert len(lines) == 1
    assert "broken" in lines[0]


async def test_a_folder_swept_during_a_write_is_created_again(
    store: DiskStore, clock: Clock, make_image: MakeImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = os.open
    swept: list[str] = []

    def swept_then_opened(path: str, *options: int) -> int:
        if len(swept) < 2 and Path(path).suffix == ".part":
            swept.append(path)
            Path(path).parent.rmdir()
        return opened(path, *options)

    monkeypatch.setattr(os, "open", swept_then_opened)
    image = make_image()
    await store.save(TASK, 0, image, clock.now + 60)
    assert len(swept) == 2
    assert await load(store, TASK, stored(image)) == image.data


async def test_a_sweep_works_outside_of_the_event_loop(store: DiskStore, tmp_path: Path) -> None:
    for number in range(2_000):
        folder = tmp_path / "data" / "images" / f"{number % 100:02}" / f"{number % 100:02}{number:030}"
        folder.mkdir(parents=True)
        (folder / "0-0123456789ab.png").write_bytes(b"x")
    shares = []
    for _ in range(5):  # the collector of garbage may run in either thread
        began_s, loop_began_s = time.process_time(), time.thread_time()
        await store.sweep_once()
        shares.append((time.thread_time() - loop_began_s) / (time.process_time() - began_s))
    assert min(shares) < 0.1


async def test_an_image_saved_during_a_sweep_still_counts(
    store: DiskStore, tmp_path: Path, clock: Clock, make_image: MakeImage
) -> None:
    small = DiskStore(tmp_path / "data" / "images", 20_000, clock=clock)
    for index in range(12):
        image = make_image(f"#0000{index:02x}", pad_bytes=6_000)
        await asyncio.gather(small.sweep_once(), small.save(TASK, index, image, clock.now + 60 + index))
    await small.save(TASK, 12, make_image("gold", pad_bytes=6_000), clock.now + 90)
    assert sum(path.stat().st_size for path in files(tmp_path)) <= 20_000
