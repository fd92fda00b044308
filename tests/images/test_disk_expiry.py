"""Tests of when an image on disk expires, although the disk keeps no file times or other versions wrote to it."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from imagegen.images import disk
from tests.images.backings import fails_with, is_writable, load, spooled
from tests.images.conftest import LIFE_S, ImageFile, MakeImage, OpenDisk
from tests.support import Clock, eventually

TASK = "0123456789abcdef0123456789abcdef"


@pytest.mark.parametrize("code", [errno.EPERM, errno.EINVAL, errno.ENOTSUP])
async def test_neither_times_of_files_nor_fsync_are_needed(
    open_disk: OpenDisk, clock: Clock, make_image: MakeImage, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr(os, "utime", fails_with(code))
    monkeypatch.setattr(os, "fsync", fails_with(code))
    store, image, moved = await open_disk(), make_image(), make_image("red")
    assert is_writable(store)
    await store.save(TASK, 0, image, clock.now + 600)
    await store.save(TASK, 1, spooled(store, moved), clock.now + 600)
    await store.extend_expiry(TASK, [image.stored_at(0)], clock.now + 700)
    again = await open_disk()
    for each in (store, again):
        await each.sweep_once()
        assert await load(each, TASK, image.stored_at(0)) == image.data
        assert await load(each, TASK, moved.stored_at(1)) == moved.data


async def test_a_copy_without_file_times_has_all_unexpired_images(
    open_disk: OpenDisk, tmp_path: Path, clock: Clock, make_image: MakeImage
) -> None:
    store, image = await open_disk(), make_image()
    await store.save(TASK, 0, image, clock.now + 600)
    await store.close()
    shutil.copytree(tmp_path / "data", tmp_path / "copy", copy_function=shutil.copyfile)
    for path in (tmp_path / "copy").rglob("*.png"):
        os.utime(path, (1, 1))
    copied = await open_disk(tmp_path / "copy")
    await copied.sweep_once()
    assert await load(copied, TASK, image.stored_at(0)) == image.data
    assert await copied.contains_all(TASK, [image.stored_at(0)])
    clock.now += 700
    await copied.sweep_once()
    assert list((tmp_path / "copy" / "images").rglob("*.png")) == []


async def test_an_image_of_unknown_expiry_lives_as_long_as_a_new_one(
    open_disk: OpenDisk, tmp_path: Path, clock: Clock, make_image: MakeImage
) -> None:
    store, image = await open_disk(), make_image()
    await store.save(TASK, 0, image, clock.now + 600)
    await store.close()
    (tmp_path / "data" / "images.expiry").unlink()
    (path,) = (tmp_path / "data" / "images").rglob("*.png")
    os.utime(path, (clock.now - 5_000,) * 2)
    await (await open_disk()).sweep_once()
    clock.now += LIFE_S - 100
    again = await open_disk()
    await again.sweep_once()
    assert await load(again, TASK, image.stored_at(0)) == image.data
    clock.now += 200
    await (await open_disk()).sweep_once()
    assert not path.exists()


async def test_a_file_of_the_previous_version_expires_at_its_mtime(
    open_disk: OpenDisk, image_file: ImageFile, clock: Clock, make_image: MakeImage
) -> None:
    image = make_image()
    assert image.data is not None
    path = image_file(TASK, image)
    path.parent.mkdir(parents=True)
    path.write_bytes(image.data)
    os.utime(path, (clock.now + 300,) * 2)
    store = await open_disk()
    await store.sweep_once()
    assert await load(store, TASK, image.stored_at(0)) == image.data
    clock.now += 400
    await store.sweep_once()
    assert not path.exists()


async def test_a_file_stays_readable_for_the_previous_version(
    open_disk: OpenDisk, image_file: ImageFile, clock: Clock, make_image: MakeImage
) -> None:
    store, image = await open_disk(), make_image()
    await store.save(TASK, 0, spooled(store, image), clock.now + 600)
    path = image_file(TASK, image)
    assert path.stat().st_mtime == clock.now + 600
    await store.extend_expiry(TASK, [image.stored_at(0)], clock.now + 900)
    assert path.stat().st_mtime == clock.now + 900


async def test_an_image_saved_again_elsewhere_is_not_removed_as_expired(
    open_disk: OpenDisk, clock: Clock, make_image: MakeImage
) -> None:
    ours, theirs, image = await open_disk(), await open_disk(), make_image()
    await ours.save(TASK, 0, image, clock.now + 10)
    clock.now += 300
    await theirs.save(TASK, 0, image, clock.now + 600)
    assert await ours.contains_all(TASK, [image.stored_at(0)])
    await ours.sweep_once()
    assert await load(ours, TASK, image.stored_at(0)) == image.data


async def test_a_new_file_elsewhere_is_not_expired_before_its_index_line(
    open_disk: OpenDisk, tmp_path: Path, clock: Clock, make_image: MakeImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs, image, index = await open_disk(), await open_disk(), make_image(), tmp_path / "data/images.expiry"
    monkeypatch.setattr(disk, "FLUSH_S", 0.0)
    await ours.save(TASK, 0, image, clock.now + 10)
    await eventually(index.exists)
    monkeypatch.setattr(disk, "FLUSH_S", 600.0)
    clock.now += 300
    await theirs.sweep_once()
    assert list((tmp_path / "data" / "images").rglob("*.png")) == []
    await theirs.save(TASK, 0, image, clock.now + 600)
    assert len(index.read_text().splitlines()) == 1
    assert await ours.contains_all(TASK, [image.stored_at(0)])
    assert await load(ours, TASK, image.stored_at(0)) == image.data


async def test_a_file_saved_over_an_expired_one_is_found_without_times(
    open_disk: OpenDisk, clock: Clock, make_image: MakeImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "utime", fails_with(errno.EPERM))
    monkeypatch.setattr(disk, "FLUSH_S", 600.0)
    ours, theirs, image = await open_disk(), await open_disk(), make_image()
    await ours.save(TASK, 0, image, clock.now + 10)
    clock.now += 300
    await theirs.save(TASK, 0, image, clock.now + 600)
    assert await ours.contains_all(TASK, [image.stored_at(0)])


async def test_malformed_lines_in_the_expiry_index_are_skipped(
    open_disk: OpenDisk, tmp_path: Path, clock: Clock, make_image: MakeImage
) -> None:
    store, image = await open_disk(), make_image()
    await store.save(TASK, 0, image, clock.now + 600)
    with (tmp_path / "data" / "images.expiry").open("ab") as file:
        file.write(b"\0\0\0\n" + TASK.encode() + b" soon\n\xff\xfe 12\nhalf a li")
    again = await open_disk()
    await again.sweep_once()
    assert await load(again, TASK, image.stored_at(0)) == image.data
