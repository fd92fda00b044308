"""Tests of spooled images that are moved to the disk store."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from imagegen.images.spool_folder import SpoolFolder
from imagegen.images.store import SpooledImageLost
from tests.images.backings import is_writable, load, spooled
from tests.images.conftest import ImageFile, MakeImage, OpenDisk
from tests.support import Clock

TASK = "0123456789abcdef0123456789abcdef"


async def test_a_spooled_image_is_moved_or_copied_across_file_systems(
    open_disk: OpenDisk, image_file: ImageFile, clock: Clock, make_image: MakeImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, image = await open_disk(), make_image()
    moved = spooled(store, image)
    assert moved.path is not None
    inode = moved.path.stat().st_ino
    await store.save(TASK, 0, moved, clock.now + 600)
    assert image_file(TASK, image).stat().st_ino == inode
    replace, copied = os.replace, spooled(store, image)

    def across(source: str, target: str) -> None:
        if source == str(copied.path):
            raise OSError(errno.EXDEV, "other file system")
        replace(source, target)

    monkeypatch.setattr(os, "replace", across)
    await store.save(TASK, 1, copied, clock.now + 600)
    assert image_file(TASK, image, 1).exists()
    assert await load(store, TASK, image.stored_at(1)) == image.data
    assert copied.path is not None
    assert not copied.path.exists()


async def test_a_lost_spooled_image_is_not_a_disk_fault(
    open_disk: OpenDisk, clock: Clock, make_image: MakeImage
) -> None:
    store = await open_disk()
    image = spooled(store, make_image())
    assert image.path is not None
    image.path.unlink()
    with pytest.raises(SpooledImageLost):
        await store.save(TASK, 0, image, clock.now + 600)
    assert is_writable(store)


def test_only_spool_folders_of_dead_processes_are_removed(tmp_path: Path) -> None:
    dead, alive, ours = (SpoolFolder(tmp_path / "spool") for _ in range(3))
    for folder in (dead, alive, ours):
        folder.make()
        (folder.path / "image").write_bytes(b"x")
    dead.close()
    ours.remove_abandoned()
    assert sorted(path.name for path in (tmp_path / "spool").iterdir()) == sorted([alive.path.name, ours.path.name])
    alive.remove()
    ours.remove()


def open_files() -> set[Path]:
    """Return the paths of the files that this process has open."""
    paths = set()
    for number in Path("/dev/fd").iterdir():
        with suppress(OSError):
            paths.add(number.readlink())
    return paths


def test_the_folder_of_a_stopped_process_is_removed_where_open_files_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS and FUSE rename an open file that is removed to `.nfs…` or `.fuse_hidden…`."""
    unlink = os.unlink

    def unlink_or_rename(path: Any, *, dir_fd: int | None = None) -> None:
        folder = tmp_path if dir_fd is None else Path(f"/dev/fd/{dir_fd}").readlink()
        if folder / path in open_files():
            os.replace(path, f".nfs{path}", src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
        else:
            unlink(path, dir_fd=dir_fd)

    folder = SpoolFolder(tmp_path / "spool")
    folder.make()
    monkeypatch.setattr(os, "unlink", unlink_or_rename)
    folder.remove()
    assert list((tmp_path / "spool").iterdir()) == []
