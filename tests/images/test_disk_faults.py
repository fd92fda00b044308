"""Tests of disk faults: full, read-only, failing, slow, copied, without file times, deleted under the process."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import hashlib
import os
import shutil
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from imagegen.byte_budget import ByteBudget
from imagegen.errors import StoreUnavailable
from imagegen.images import disk, disk_watch, files
from imagegen.images.checked_files import MAX_IMAGE_BYTES
from imagegen.images.disk import DiskStore
from imagegen.images.files import SMALL_BYTES
from imagegen.images.spool import Spool
from imagegen.images.spool_folder import SpoolFolder
from imagegen.images.store import SpooledImageLost, VerifiedImage
from tests.images.backings import is_writable, load
from tests.images.conftest import MakeImage
from tests.support import Clock, eventually, logged

OpenDisk = Callable[..., Awaitable[DiskStore]]

TASK = "0123456789abcdef0123456789abcdef"
LIFE_S = 1_000.0


@pytest.fixture
def clock() -> Clock:
    return Clock(float(int(time.time())))


@pytest.fixture
def lines() -> Iterator[list[str]]:
    """Collect log lines at INFO and above."""
    with logged("INFO") as lines:
        yield lines


@pytest.fixture
async def open_disk(tmp_path: Path, clock: Clock) -> AsyncIterator[OpenDisk]:
    """Open started stores: `await open_disk(folder)` uses `folder/images`."""
    stores: list[DiskStore] = []

    async def make(folder: Path = tmp_path / "data") -> DiskStore:
        store = DiskStore(folder / "images", 10**8, life_s=LIFE_S, clock=clock)
        stores.append(store)
        await store.start()
        return store

    yield make
    for store in stores:
        await store.close()


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


def fill(path: Path) -> None:
    """Fill the remaining space."""
    with suppress(OSError), path.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass


def remount(folder: Path, option: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{option}", str(folder)], check=True)


def spooled(store: DiskStore, image: VerifiedImage) -> VerifiedImage:
    """Return the same image in a file of the spool folder."""
    assert image.data is not None
    path = store.spool_folder / "image"
    path.write_bytes(image.data)
    return VerifiedImage(image.content_type, image.size_bytes, image.width, image.height, image.sha256, path=path)


def fails_with(code: int) -> Callable[..., object]:
    def fail(*_: object, **__: object) -> object:
        raise OSError(code, os.strerror(code))

    return fail


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
    open_disk: OpenDisk, tmp_path: Path, clock: Clock, make_image: MakeImage
) -> None:
    image = make_image()
    assert image.data is not None
    path = tmp_path / "data" / "images" / TASK[:2] / TASK / f"0-{image.sha256[:12]}.png"
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
    open_disk: OpenDisk, tmp_path: Path, clock: Clock, make_image: MakeImage
) -> None:
    store, image = await open_disk(), make_image()
    await store.save(TASK, 0, spooled(store, image), clock.now + 600)
    path = tmp_path / "data" / "images" / TASK[:2] / TASK / f"0-{image.sha256[:12]}.png"
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


async def test_images_are_flushed_together_soon_after_they_were_saved(
    open_disk: OpenDisk, tmp_path: Path, clock: Clock, make_image: MakeImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[str] = []
    monkeypatch.setattr(files, "flush", flushed.append)
    monkeypatch.setattr(disk, "FLUSH_S", 0.2)
    store, image, index = await open_disk(), make_image(), tmp_path / "data" / "images.expiry"
    for number in range(5):
        await store.save(f"{number}{TASK[1:]}", 0, image, clock.now + 600)
    assert (flushed, index.exists()) == ([], False)
    await eventually(lambda: bool(flushed))
    assert flushed == [str(tmp_path / "data" / "images")]
    assert len(index.read_text().splitlines()) == 5
    await store.save(TASK, 0, image, clock.now + 600)
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
    shutil.rmtree(tmp_path / "data")
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
    (tmp_path / "data").mkdir()
    await store.check()
    assert is_writable(store)
    await store.save(TASK, 1, spooled(store, image), clock.now + 600)
    assert await load(store, TASK, image.stored_at(0)) is None


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
    monkeypatch.setattr(disk_watch, "check_space", lambda *_: hangs.wait(10))
    checking = asyncio.create_task(store.check())
    await eventually(lambda: not store.health.writable)
    assert "ETIMEDOUT" in store.health.cause
    hangs.set()
    await checking
    assert is_writable(store)


async def test_a_disk_that_fails_again_is_retried_less_often(
    open_disk: OpenDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await open_disk()
    monkeypatch.setattr(disk_watch, "CHECK_INTERVAL_S", 0.01)
    watching = asyncio.create_task(store.watch())
    delays = []
    for _ in range(4):
        store.health.mark_failed(OSError(errno.EIO, "broken"))
        began = time.monotonic()
        await eventually(lambda: store.health.writable)
        delays.append(time.monotonic() - began)
    watching.cancel()
    assert delays[3] > 0.03


@pytest.mark.parametrize("pad_bytes", [0, SMALL_BYTES])
async def test_a_file_changed_to_other_bytes_is_never_served(
    open_disk: OpenDisk, tmp_path: Path, clock: Clock, pad_bytes: int
) -> None:
    data = os.urandom(100 + pad_bytes)
    image = VerifiedImage("image/png", len(data), 8, 8, _sha256(data), data)
    store = await open_disk()
    await store.save(TASK, 0, image, clock.now + 600)
    assert await load(store, TASK, image.stored_at(0)) == data
    (path,) = (tmp_path / "data" / "images").rglob("*.png")
    before = path.stat()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert await load(store, TASK, image.stored_at(0)) is None
    assert not path.exists()


async def test_a_large_image_is_opened_and_not_read(open_disk: OpenDisk, clock: Clock) -> None:
    data = os.urandom(MAX_IMAGE_BYTES + 1)
    image = VerifiedImage("image/png", len(data), 8, 8, _sha256(data), data)
    store = await open_disk()
    await store.save(TASK, 0, image, clock.now + 600)
    opened = await store.open(TASK, image.stored_at(0))
    assert opened is not None
    assert opened.data is None
    assert b"".join([piece async for piece in opened.read(1, 3)]) == data[1:4]
    opened.close()
    assert opened.file is not None
    assert opened.file.closed


async def test_a_spooled_image_is_moved_or_copied_across_file_systems(
    open_disk: OpenDisk, tmp_path: Path, clock: Clock, make_image: MakeImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, image = await open_disk(), make_image()
    moved = spooled(store, image)
    assert moved.path is not None
    inode = moved.path.stat().st_ino
    await store.save(TASK, 0, moved, clock.now + 600)
    assert [path.stat().st_ino for path in (tmp_path / "data" / "images").rglob("0-*")] == [inode]
    replace = Path.replace

    def across(path: Path, target: Path) -> Path:
        if path.name == "image":
            raise OSError(errno.EXDEV, "other file system")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", across)
    copied = spooled(store, image)
    await store.save(TASK, 1, copied, clock.now + 600)
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


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
