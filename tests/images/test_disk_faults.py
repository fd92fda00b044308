"""Tests of disk faults that make the store unhealthy: full, read-only, failing, slow and unmounted disks."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from imagegen.byte_budget import ByteBudget
from imagegen.errors import StoreUnavailable
from imagegen.images import disk, disk_watch, files
from imagegen.images.spool import Spool
from imagegen.images.store import VerifiedImage
from tests.images.backings import fails_with, is_writable, load, spooled
from tests.images.conftest import MakeImage, OpenDisk
from tests.support import Clock, eventually, logged

TASK = "0123456789abcdef0123456789abcdef"
OTHER_TASK = "1123456789abcdef0123456789abcdef"


@pytest.fixture
def lines() -> Iterator[list[str]]:
    """Collect log lines at INFO and above."""
    with logged("INFO") as lines:
        yield lines


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a real file system of 2 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@contextmanager
def mounted(volume: Path, folder: Path) -> Iterator[None]:
    """Mount a volume over a folder."""
    subprocess.run(["mount", "--bind", str(volume), str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def fill(path: Path) -> None:
    """Fill the remaining space."""
    with suppress(OSError), path.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass


def remount(folder: Path, option: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{option}", str(folder)], check=True)


async def test_a_full_disk_is_unhealthy_until_space_is_freed(
    open_disk: OpenDisk, small_disk: Path, clock: Clock, make_image: MakeImage, lines: list[str]
) -> None:
    store, image = await open_disk(small_disk), make_image(pad_bytes=60_000)
    watching = asyncio.create_task(store.watch())
    fill(small_disk / "filler")
    with pytest.raises(StoreUnavailable):
        await store.save(TASK, 0, make_image("red", pad_bytes=60_000), clock.now + 600)
    assert not is_writable(store)
    assert "ENOSPC" in store.health.cause
    with suppress(StoreUnavailable):
        await store.save(TASK, 9, image, clock.now + 600)
    (small_disk / "filler").unlink()
    await eventually(lambda: store.health.writable)
    await store.save(TASK, 9, image, clock.now + 600)
    assert await load(store, TASK, image.stored_at(9)) == image.data
    watching.cancel()
    reports = [line for line in lines if "Images can" in line]
    assert [line.split()[0] for line in reports] == ["WARNING", "INFO"]
    assert "ENOSPC" in reports[0]


async def test_a_disk_is_unhealthy_below_its_free_space_limit(open_disk: OpenDisk, small_disk: Path) -> None:
    store = await open_disk(small_disk)
    (small_disk / "filler").write_bytes(bytes(2_030_000))
    await store.check()
    assert not is_writable(store)
    (small_disk / "filler").write_bytes(bytes(1_000_000))
    await store.check()
    assert is_writable(store)


async def test_a_disk_is_unhealthy_until_the_rejected_image_fits(
    open_disk: OpenDisk, small_disk: Path, clock: Clock
) -> None:
    store = await open_disk(small_disk)
    large = VerifiedImage("image/png", 3_000_000, 8, 8, "a" * 64, bytes(3_000_000))
    with pytest.raises(StoreUnavailable):
        await store.save(TASK, 0, large, clock.now + 600)
    await store.check()
    assert not is_writable(store)
    assert [path for path in (small_disk / "images").rglob("*") if path.is_file()] == []
    remount(small_disk, "size=9m")
    await store.check()
    assert is_writable(store)
    await store.save(TASK, 0, large, clock.now + 600)


@pytest.mark.parametrize("code", [errno.EDQUOT, errno.EFBIG])
async def test_a_quota_keeps_the_disk_unhealthy(
    open_disk: OpenDisk, clock: Clock, make_image: MakeImage, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    store, image = await open_disk(), make_image()
    with monkeypatch.context() as quota:
        quota.setattr(files, "write_image", fails_with(code))
        quota.setattr(os, "posix_fallocate", fails_with(code))
        with pytest.raises(StoreUnavailable):
            await store.save(TASK, 0, image, clock.now + 600)
        await store.check()
        assert errno.errorcode[code] in store.health.cause
    await store.check()
    assert is_writable(store)


async def test_a_read_only_disk_is_not_healthy_but_serves_what_it_has(
    open_disk: OpenDisk, small_disk: Path, clock: Clock, make_image: MakeImage
) -> None:
    store, image = await open_disk(small_disk), make_image()
    await store.save(TASK, 0, image, clock.now + 600)
    remount(small_disk, "ro")
    with pytest.raises(StoreUnavailable):
        await store.save(TASK, 1, image, clock.now + 600)
    again = await open_disk(small_disk)
    for each in (store, again):
        await each.check()
        assert (each.health.writable, "EROFS" in each.health.cause) == (False, True)
        assert await load(each, TASK, image.stored_at(0)) == image.data
    remount(small_disk, "rw")
    await again.check()
    assert is_writable(again)
    await again.save(TASK, 1, spooled(again, image), clock.now + 600)


@pytest.mark.parametrize(
    ("patched", "named"),
    [
        ((Path, "replace"), "renaming"),
        ((os, "fsync"), "writing"),
        ((Path, "rmdir"), "making a folder"),
        ((shutil, "disk_usage"), "free space"),
    ],
)
async def test_a_probe_names_the_step_that_fails(
    open_disk: OpenDisk, monkeypatch: pytest.MonkeyPatch, patched: tuple[object, str], named: str
) -> None:
    monkeypatch.setattr(*patched, fails_with(errno.EIO))
    store = await open_disk()
    assert (store.health.writable, "EIO" in store.health.cause, named in store.health.cause) == (False, True, True)


async def test_a_check_that_began_before_a_failure_does_not_end_it(
    open_disk: OpenDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, measure = await open_disk(), shutil.disk_usage

    def fail_meanwhile(folder: Path) -> object:
        store.health.mark_failed(OSError(errno.EIO, "broken"))
        return measure(folder)

    monkeypatch.setattr(shutil, "disk_usage", fail_meanwhile)
    await store.check()
    assert not is_writable(store)
    monkeypatch.undo()
    await store.check()
    assert is_writable(store)


@pytest.mark.parametrize(("name", "named"), [("spool", "making a folder in spool"), ("images.mark", "images.mark")])
async def test_an_obstacle_beside_the_images_is_named(
    tmp_path: Path, open_disk: OpenDisk, name: str, named: str
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / name).symlink_to(tmp_path / "data" / name)
    store = await open_disk()
    assert named in store.health.cause
    (tmp_path / "data" / name).unlink()
    await store.check()
    assert is_writable(store)


async def test_a_probe_finds_a_disk_that_returns_other_bytes(
    open_disk: OpenDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("imagegen.images.folder_probe._CONTENT", bytearray(b"x" * 8))
    opened = Path.open

    def spoiling(path: Path, *args: object, **options: object) -> object:
        if args == ("rb",) and ".probe" in path.name:
            path.write_bytes(b"y" * 8)
        return opened(path, *args, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", spoiling)
    assert "reads back differently" in (await open_disk()).health.cause


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.EMFILE, errno.ESTALE])
async def test_an_unopenable_file_is_not_missing(
    open_disk: OpenDisk,
    clock: Clock,
    make_image: MakeImage,
    monkeypatch: pytest.MonkeyPatch,
    lines: list[str],
    code: int,
) -> None:
    store, image = await open_disk(), make_image()
    await store.save(TASK, 0, spooled(store, image), clock.now + 600)
    with monkeypatch.context() as failing:
        failing.setattr("builtins.open", fails_with(code))
        for _ in range(3):
            with pytest.raises(StoreUnavailable):
                await store.open(TASK, image.stored_at(0))
    assert [errno.errorcode[code] in line for line in lines if "can't be read" in line] == [True]
    assert await load(store, TASK, image.stored_at(0)) == image.data


async def test_a_deleted_folder_is_unhealthy_and_its_images_unavailable(
    open_disk: OpenDisk, tmp_path: Path, clock: Clock, make_image: MakeImage, lines: list[str]
) -> None:
    store, image = await open_disk(), make_image()
    await store.save(TASK, 0, image, clock.now + 600)
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    for _ in range(3):
        await store.check()
    assert (store.health.writable, "ENOENT" in store.health.cause) == (False, True)
    with pytest.raises(StoreUnavailable):
        await store.open(TASK, image.stored_at(0))
    with pytest.raises(StoreUnavailable):
        await store.contains_all(TASK, [image.stored_at(0)])
    with pytest.raises(StoreUnavailable):
        await store.save(TASK, 1, image, clock.now + 600)
    assert not (tmp_path / "data").exists()
    assert len([line for line in lines if "Images can" in line]) == 1
    (tmp_path / "elsewhere").rename(tmp_path / "data")
    await store.check()
    assert is_writable(store)
    await store.save(TASK, 1, spooled(store, image), clock.now + 600)
    assert await load(store, TASK, image.stored_at(0)) == image.data


@pytest.mark.parametrize("replaced", ["data", "data/images"])
@pytest.mark.parametrize("by", ["nothing", "an empty folder", "a file"])
async def test_a_folder_that_was_replaced_is_unhealthy_until_its_images_are_back(
    open_disk: OpenDisk, tmp_path: Path, clock: Clock, make_image: MakeImage, replaced: str, by: str
) -> None:
    store, image, folder, aside = await open_disk(), make_image(), tmp_path / replaced, tmp_path / "aside"
    await store.save(TASK, 0, image, clock.now + 600)
    folder.rename(aside)
    if by == "an empty folder":
        folder.mkdir()
    if by == "a file":
        folder.touch()
    for _ in range(2):
        await store.check()
    assert not store.health.writable
    with pytest.raises(StoreUnavailable):
        await store.open(TASK, image.stored_at(0))
    with pytest.raises(StoreUnavailable):
        await store.contains_all(TASK, [image.stored_at(0)])
    assert not folder.is_dir() or list(folder.iterdir()) == []
    if folder.is_dir():
        folder.rmdir()
    folder.unlink(missing_ok=True)
    shutil.copytree(aside, folder)
    await store.check()
    assert is_writable(store)
    assert await load(store, TASK, image.stored_at(0)) == image.data


@pytest.mark.parametrize("replaced", ["data", "data/images"])
@pytest.mark.parametrize("has_folder", [False, True])
@pytest.mark.parametrize("use", ["open", "contains", "save", "sweep"])
async def test_a_folder_that_was_replaced_is_not_used_before_the_next_check_either(
    open_disk: OpenDisk,
    tmp_path: Path,
    clock: Clock,
    make_image: MakeImage,
    lines: list[str],
    replaced: str,
    has_folder: bool,
    use: str,
) -> None:
    store, image, folder, aside = await open_disk(), make_image(), tmp_path / replaced, tmp_path / "aside"
    await store.save(TASK, 0, image, clock.now + 600)
    folder.rename(aside)
    if has_folder:
        (tmp_path / "data" / "images").mkdir(parents=True)
    with pytest.raises(StoreUnavailable):
        await {
            "open": lambda: store.open(TASK, image.stored_at(0)),
            "contains": lambda: store.contains(TASK, image.stored_at(0)),
            "save": lambda: store.save(OTHER_TASK, 0, image, clock.now + 600),
            "sweep": store.sweep_once,
        }[use]()
    await store.check()
    assert not store.health.writable
    assert any("another folder is in its place" in line for line in lines) is has_folder
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)
    await store.check()
    assert is_writable(store)
    assert await load(store, TASK, image.stored_at(0)) == image.data


async def test_a_volume_that_is_unmounted_is_not_healthy_until_it_is_back(
    open_disk: OpenDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await open_disk()
    mark, mounted = tmp_path / "data" / "images.mark", Path.stat
    monkeypatch.setattr(Path, "exists", lambda path: path != mark)
    monkeypatch.setattr(
        Path, "stat", lambda path: os.stat_result((*mounted(path)[:2], mounted(path).st_dev + 1, *mounted(path)[3:]))
    )
    await store.check()
    assert (store.health.writable, "its volume is gone" in store.health.cause) == (False, True)
    monkeypatch.undo()
    await store.check()
    assert is_writable(store)


async def test_a_volume_that_is_unmounted_from_the_images_alone_loses_none_of_them(
    open_disk: OpenDisk, tmp_path: Path, clock: Clock, make_image: MakeImage, small_disk: Path
) -> None:
    store, image, folder = await open_disk(), make_image(), tmp_path / "data" / "images"
    stored = image.stored_at(0)
    await store.save(TASK, 0, image, clock.now + 600)
    with mounted(small_disk, folder):
        with pytest.raises(StoreUnavailable):
            await store.open(TASK, stored)
        with pytest.raises(StoreUnavailable):
            await store.contains_all(TASK, [stored])
        with pytest.raises(StoreUnavailable):
            await store.reuse(TASK, stored, OTHER_TASK, 0, clock.now + 600)
        with pytest.raises(StoreUnavailable):
            await store.sweep_once()
        with pytest.raises(StoreUnavailable):
            await store.save(TASK, 1, make_image("red"), clock.now + 600)
        await store.check()
        assert (store.health.writable, "its volume is gone" in store.health.cause) == (False, True)
        assert list(folder.iterdir()) == []
    await store.check()
    assert is_writable(store)
    assert await load(store, TASK, stored) == image.data


async def test_an_image_that_comes_while_the_volume_is_gone_marks_nothing(
    open_disk: OpenDisk, tmp_path: Path, clock: Clock, make_image: MakeImage, small_disk: Path
) -> None:
    store, folder = await open_disk(), tmp_path / "data" / "images"
    with mounted(small_disk, folder):
        with pytest.raises(StoreUnavailable):
            await store.save(TASK, 0, make_image(), clock.now + 600)
        assert not (tmp_path / "data" / "images.flat").exists()


async def test_images_that_are_moved_to_another_file_system_are_found(
    open_disk: OpenDisk, tmp_path: Path, clock: Clock, make_image: MakeImage, small_disk: Path
) -> None:
    store, image, folder = await open_disk(), make_image(), tmp_path / "data" / "images"
    await store.save(TASK, 0, image, clock.now + 600)
    shutil.copytree(folder, small_disk, dirs_exist_ok=True)
    shutil.rmtree(folder)
    folder.symlink_to(small_disk)
    await store.check()
    assert is_writable(store)
    assert await load(store, TASK, image.stored_at(0)) == image.data
    await store.save(TASK, 1, make_image("red"), clock.now + 600)


async def test_a_running_save_does_not_recreate_a_deleted_data_folder(
    open_disk: OpenDisk, tmp_path: Path, make_image: MakeImage
) -> None:
    store, image = await open_disk(), make_image()
    shutil.rmtree(tmp_path / "data")
    sink = Spool(store, ByteBudget(2**20)).sink()
    assert sink.finish([image.data or b""]).path is None
    assert not (tmp_path / "data").exists()


async def test_a_disk_that_does_not_answer_is_not_healthy(open_disk: OpenDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    store, hangs = await open_disk(), threading.Event()
    monkeypatch.setattr(disk_watch, "SLOW_CHECK_S", 0.05)
    monkeypatch.setattr(disk_watch, "check_space", lambda *_: hangs.wait(60))
    checking = asyncio.create_task(store.check())
    await eventually(lambda: not store.health.writable)
    assert "ETIMEDOUT" in store.health.cause
    hangs.set()
    await checking
    assert is_writable(store)


async def test_a_search_for_images_on_a_disk_that_does_not_answer_ends(
    open_disk: OpenDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, hangs = await open_disk(), threading.Event()
    monkeypatch.setattr(disk_watch, "SLOW_CHECK_S", 0.05)
    monkeypatch.setattr(disk, "find_images", lambda *_: hangs.wait(60))
    with pytest.raises(StoreUnavailable):
        await asyncio.wait_for(store.find(TASK, 0.0), 20)
    hangs.set()


async def test_a_disk_that_fails_again_is_retried_less_often(
    open_disk: OpenDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await open_disk()
    monkeypatch.setattr(disk_watch, "CHECK_INTERVAL_S", 0.01)
    watching = asyncio.create_task(store.watch())
    delays = []
    for _ in range(4):
        began = time.monotonic()
        store.health.mark_failed(OSError(errno.EIO, "broken"))
        await eventually(lambda: store.health.writable)
        delays.append(time.monotonic() - began)
    watching.cancel()
    assert delays[3] > 0.03
