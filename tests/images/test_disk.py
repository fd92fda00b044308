"""Tests of the disk store: files, caps, and a folder that changes or fails during use."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from imagegen.errors import StoreUnavailable
from imagegen.images.checked_files import MAX_IMAGE_BYTES
from imagegen.images.disk import DiskStore
from imagegen.images.file_names import task_of
from imagegen.images.files import SMALL_BYTES
from imagegen.images.link_store import UpstreamStore
from imagegen.images.store import VerifiedImage
from imagegen.tasks.image import StoredImage
from tests.images.backings import in_memory, is_writable, load
from tests.images.conftest import ImageFile, MakeImage, OpenDisk
from tests.support import Clock

TASK = "0123456789abcdef0123456789abcdef"


def stored(image: VerifiedImage, index: int = 0) -> StoredImage:
    return image.stored_at(index)


def files(tmp_path: Path) -> list[Path]:
    return sorted(path for path in (tmp_path / "data" / "images").rglob("*") if path.is_file())


async def test_a_file_is_named_by_task_index_and_digest(
    store: DiskStore, image_file: ImageFile, clock: Clock, make_image: MakeImage
) -> None:
    for index, (kind, extension) in enumerate((("PNG", "png"), ("JPEG", "jpg"), ("WEBP", "webp"))):
        image = make_image(kind=kind)
        await store.save(TASK, index, image, clock.now + 60)
        path = image_file(TASK, image, index, extension)
        assert path.read_bytes() == image.data
        assert path.stat().st_mtime == clock.now + 60


@pytest.mark.parametrize("task", ["", "..", "../../etc", "a/b", "a" * 65, "x\0y"])
async def test_an_invalid_task_id_never_becomes_a_path(store: DiskStore, make_image: MakeImage, task: str) -> None:
    with pytest.raises(ValueError, match="not a task id"):
        await store.save(task, 0, make_image(), 1e10)


async def test_a_file_deleted_externally_is_missing(
    store: DiskStore, tmp_path: Path, clock: Clock, make_image: MakeImage
) -> None:
    image = make_image()
    await store.save(TASK, 0, image, clock.now + 60)
    shutil.rmtree(tmp_path / "data" / "images" / "01")
    assert await load(store, TASK, stored(image)) is None
    assert not await store.contains_all(TASK, [stored(image)])
    await store.sweep_once()
    await store.save(TASK, 0, image, clock.now + 60)
    assert await load(store, TASK, stored(image)) == image.data


def _replace_by_folder(path: Path) -> None:
    path.mkdir()
    (path / "content").touch()


OBSTACLES = {
    "folder": _replace_by_folder,
    "link to itself": lambda path: path.symlink_to(path),
    "link to nothing": lambda path: path.symlink_to(path.with_name("nothing")),
    "named pipe": os.mkfifo,
}


@pytest.mark.parametrize(
    ("above", "replace"),
    [*((0, replace) for replace in OBSTACLES.values())]
    + [(above, replace) for above in (1, 2) for replace in (Path.touch, OBSTACLES["link to itself"])],
    ids=[*OBSTACLES, *(f"{what} as {name}" for name in ("folder", "hex") for what in ("file", "link"))],
)
async def test_a_foreign_file_in_the_place_of_an_image_costs_this_image_alone(
    store: DiskStore,
    tmp_path: Path,
    image_file: ImageFile,
    clock: Clock,
    make_image: MakeImage,
    above: int,
    replace: Callable[[Path], None],
) -> None:
    image, source, in_file = make_image(), "f" * 32, tmp_path / "spooled"
    await store.save(source, 1, image, clock.now + 60)
    await store.save(TASK, 0, image, clock.now + 60)
    file = image_file(TASK, image)
    place = (file, file.parent, tmp_path / "data" / "images" / "01")[above]
    for save in ("memory", "file", "reuse"):
        shutil.rmtree(place) if place.is_dir() else place.unlink()
        replace(place)
        assert await load(store, TASK, stored(image)) is None
        assert not await store.contains_all(TASK, [stored(image)])
        if save == "reuse":
            assert await store.reuse(source, stored(image, 1), TASK, 0, clock.now + 60)
        else:
            in_file.write_bytes(in_memory(image))
            spooled = VerifiedImage(
                "image/png", image.size_bytes, image.width, image.height, image.sha256, path=in_file
            )
            await store.save(TASK, 0, image if save == "memory" else spooled, clock.now + 60)
        assert await load(store, TASK, stored(image)) == image.data
        assert is_writable(store)
    assert list(place.parent.glob(".*.foreign"))
    await store.sweep_once()
    assert await load(store, TASK, stored(image)) == image.data


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data[:-1] + b"?", lambda _: b""])
async def test_a_damaged_file_is_never_served_and_is_deleted(
    store: DiskStore, tmp_path: Path, clock: Clock, make_image: MakeImage, damage: Callable[[bytes], bytes]
) -> None:
    image = make_image()
    await store.save(TASK, 0, image, clock.now + 60)
    (path,) = files(tmp_path)
    path.write_bytes(damage(in_memory(image)))
    os.utime(path, (clock.now + 60,) * 2)
    assert await load(store, TASK, stored(image)) is None
    assert not await store.contains_all(TASK, [stored(image)])
    assert files(tmp_path) == []


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.ENOSPC, errno.EMFILE, errno.EROFS])
async def test_a_failing_disk_is_unavailable(
    store: DiskStore, clock: Clock, make_image: MakeImage, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    image = make_image()
    await store.save(TASK, 0, image, clock.now + 60)

    def fails(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "open", fails)
    monkeypatch.setattr(Path, "stat", fails)
    monkeypatch.setattr(os, "open", fails)
    monkeypatch.setattr(os, "stat", fails)
    monkeypatch.setattr("builtins.open", fails)
    for call in (
        store.save(TASK, 1, image, clock.now + 60),
        load(store, TASK, stored(image)),
        store.contains_all(TASK, [stored(image)]),
        store.extend_expiry(TASK, [stored(image)], clock.now + 90),
    ):
        with pytest.raises(StoreUnavailable):
            await call


async def test_a_write_that_fails_half_way_leaves_nothing_behind(
    store: DiskStore, tmp_path: Path, clock: Clock, make_image: MakeImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = os.close

    def full(file: int) -> None:
        """Raise a write error at close, as network mounts do."""
        closed(file)
        raise OSError(errno.ENOSPC, "no space")

    image = make_image()
    with monkeypatch.context() as patch:
        patch.setattr(os, "close", full)
        with pytest.raises(StoreUnavailable):
            await store.save(TASK, 0, image, clock.now + 60)
    assert files(tmp_path) == []
    assert await load(store, TASK, stored(image)) is None
    await store.save(TASK, 0, image, clock.now + 60)
    assert await load(store, TASK, stored(image)) == image.data


async def test_a_folder_that_can_not_be_created_at_start_is_retried(tmp_path: Path, make_image: MakeImage) -> None:
    (tmp_path / "file").write_text("in the way")
    store = DiskStore(tmp_path / "file" / "images", 10**6)
    await store.start()
    assert not is_writable(store)
    (tmp_path / "file").unlink()
    (tmp_path / "file").mkdir()
    await store.check()
    assert is_writable(store)
    await store.save(TASK, 0, make_image(), time.time() + 60)
    await store.close()


async def test_the_upstream_store_keeps_only_what_came_without_a_link(store: DiskStore, make_image: MakeImage) -> None:
    upstream, image = UpstreamStore(store), make_image()
    link = StoredImage(0, url="https://pics.example.org/0")
    assert await upstream.contains_all(TASK, [link])
    assert not await upstream.contains_all(TASK, [link, stored(image, 1)])
    await upstream.save(TASK, 1, image, 1e10)
    assert await upstream.contains_all(TASK, [link, stored(image, 1)])
    assert await load(upstream, TASK, stored(image, 1)) == image.data
    await upstream.extend_expiry(TASK, [link, stored(image, 1)], 1.1e10)


async def test_a_reused_image_is_a_second_name_of_the_file(
    store: DiskStore, tmp_path: Path, clock: Clock, make_image: MakeImage
) -> None:
    image = make_image()
    await store.save(TASK, 1, image, clock.now + 60)
    assert await store.reuse(TASK, stored(image, 1), "f" * 32, 0, clock.now + 90)
    assert len({path.stat().st_ino for path in files(tmp_path)}) == 1
    shutil.rmtree(tmp_path / "data" / "images" / "01")
    assert await load(store, "f" * 32, stored(image)) == image.data


async def test_an_image_is_copied_where_the_mount_has_no_links(
    store: DiskStore, tmp_path: Path, clock: Clock, make_image: MakeImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    image = make_image()
    await store.save(TASK, 0, image, clock.now + 60)
    assert await store.reuse(TASK, stored(image), "f" * 32, 0, clock.now + 60)
    assert len({path.stat().st_ino for path in files(tmp_path)}) == 2
    assert await load(store, "f" * 32, stored(image)) == image.data


@pytest.mark.parametrize("swept", [False, True])
async def test_a_reused_image_takes_its_bytes_once(
    tmp_path: Path, clock: Clock, make_image: MakeImage, *, swept: bool
) -> None:
    image, other = make_image(), make_image("red")
    store = DiskStore(tmp_path / "data" / "images", image.size_bytes + other.size_bytes, clock=clock)
    await store.start()
    await store.save(TASK, 0, image, clock.now + 60)
    assert await store.reuse(TASK, stored(image), "f" * 32, 0, clock.now + 90)
    if swept:
        await store.sweep_once()
    await store.save("e" * 32, 0, other, clock.now + 90)
    assert len(files(tmp_path)) == 3
    await store.save("d" * 32, 0, other, clock.now + 90)
    assert {task_of(str(path)) for path in files(tmp_path)} == {"e" * 32, "d" * 32}
    await store.close()


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


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
