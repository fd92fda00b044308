"""Tests of flushing images to the disk, together or one by one."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

import pytest

from imagegen.images import disk, files
from tests.images.backings import fails_with, is_writable, spooled
from tests.images.conftest import MakeImage, OpenDisk
from tests.support import Clock, LoopTime, eventually

TASK = "0123456789abcdef0123456789abcdef"


async def test_images_are_flushed_together_soon_after_they_were_saved(
    open_disk: OpenDisk, tmp_path: Path, clock: Clock, make_image: MakeImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[str] = []
    monkeypatch.setattr(files, "flush", flushed.append)
    monkeypatch.setattr(disk, "FLUSH_S", 600.0)
    time = LoopTime()
    store, image, index = await open_disk(), make_image(), tmp_path / "data" / "images.expiry"
    for number in range(5):
        await store.save(f"{number}{TASK[1:]}", 0, image, clock.now + 600)
    assert (flushed, index.exists()) == ([], False)
    await time.move(600)
    await eventually(lambda: bool(flushed))
    assert flushed == [str(tmp_path / "data" / "images")]
    assert len(index.read_text().splitlines()) == 5
    await store.save(TASK, 0, image, clock.now + 600)
    await time.move(600)
    await eventually(lambda: len(flushed) == 2)


async def test_a_disk_that_can_not_be_flushed_is_not_healthy(
    open_disk: OpenDisk, clock: Clock, make_image: MakeImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "flush", fails_with(errno.EIO))
    monkeypatch.setattr(disk, "FLUSH_S", 0.0)
    store = await open_disk()
    await store.save(TASK, 0, make_image(), clock.now + 600)
    await eventually(lambda: not store.health.writable)
    assert "EIO" in store.health.cause
    await store.check()
    assert is_writable(store)


async def test_each_file_is_synced_without_file_system_flush(
    open_disk: OpenDisk, clock: Clock, make_image: MakeImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await open_disk()
    synced: list[int] = []
    monkeypatch.setattr(files, "CAN_FLUSH", False)
    monkeypatch.setattr(os, "fsync", synced.append)
    await store.save(TASK, 0, make_image(), clock.now + 600)
    assert len(synced) == 1
    await store.save(TASK, 1, spooled(store, make_image("red")), clock.now + 600)
    assert len(synced) == 2


@pytest.mark.skipif(not files.CAN_FLUSH, reason="this system has no syncfs")
def test_a_flush_reports_what_the_system_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files.flush(str(tmp_path))
    codes = iter([errno.ENOSYS, errno.EIO])

    def fails(_: int) -> int:
        ctypes.set_errno(next(codes))
        return -1

    monkeypatch.setattr(files, "_syncfs", fails)
    files.flush(str(tmp_path))
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        files.flush(str(tmp_path))
