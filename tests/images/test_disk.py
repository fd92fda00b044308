"""Tests of the disk store: files, sweeps, and a folder that changes or fails during use."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from loguru import logger
from msgspec.structs import replace

from imagegen.errors import StoreUnavailable
from imagegen.images import disk
from imagegen.images.disk import ORPHAN_S, DiskLookups, DiskStore
from imagegen.images.disk_index import EXPIRED_AT_ONCE
from imagegen.images.disk_watch import read_mark
from imagegen.images.link_store import UpstreamStore
from imagegen.images.store import VerifiedImage
from imagegen.tasks.image import StoredImage
from tests.images.backings import in_memory, is_writable, load
from tests.images.conftest import MakeImage
from tests.support import Clock

TASK = "0123456789abcdef0123456789abcdef"


@pytest.fixture
def clock() -> Clock:
    """Return a Unix clock that only a test moves; near the real time because new files have real times."""
    return Clock(float(int(time.time())))


@pytest.fixture
async def store(tmp_path: Path, clock: Clock) -> AsyncIterator[DiskStore]:
    store = DiskStore(tmp_path / "data" / "images", 1_000_000, clock=clock)
    await store.start()
    yield store
    await store.close()


def stored(image: VerifiedImage, index: int = 0) -> StoredImage:
    return image.stored_at(index)


def files(tmp_path: Path) -> list[Path]:
    return sorted(path for path in (tmp_path / "data" / "images").rglob("*") if path.is_file())


async def test_a_file_is_named_by_task_index_and_digest(
    store: DiskStore, tmp_path: Path, clock: Clock, make_image: MakeImage
) -> None:
    for index, (kind, extension) in enumerate((("PNG", "png"), ("JPEG", "jpg"), ("WEBP", "webp"))):
        image = make_image(kind=kind)
        await store.save(TASK, index, image, clock.now + 60)
        path = tmp_path / "data" / "images" / "01" / TASK / f"{index}-{image.sha256[:12]}.{extension}"
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
    ids=[*OBSTACLES, *(f"{what} as {name}" for name in ("task", "hex") for what in ("file", "link"))],
)
async def test_a_foreign_file_in_the_place_of_an_image_costs_this_image_alone(
    store: DiskStore, tmp_path: Path, clock: Clock, make_image: MakeImage, above: int, replace: Callable[[Path], None]
) -> None:
    image, source, in_file = make_image(), "f" * 32, tmp_path / "spooled"
    await store.save(source, 1, image, clock.now + 60)
    await store.save(TASK, 0, image, clock.now + 60)
    place = tmp_path / "data" / "images" / "01" / TASK / f"0-{image.sha256[:12]}.png"
    for _ in range(above):
        place = place.parent
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


async def test_a_sweep_removes_what_has_expired_and_its_empty_folder(
    store: DiskStore, tmp_path: Path, clock: Clock, make_image: MakeImage
) -> None:
    short, long = make_image("red"), make_image("blue")
    await store.save(TASK, 0, short, clock.now + 10)
    await store.save("f" * 32, 0, long, clock.now + 60)
    clock.now += 10
    assert await load(store, TASK, stored(short)) is None
    await store.sweep_once()
    assert [path.parent.name for path in files(tmp_path)] == ["f" * 32]
    assert not (tmp_path / "data" / "images" / "01" / TASK).exists()


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
    assert sorted(path.parent.name for path in files(tmp_path)) == sorted(left)


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


async def test_two_processes_hold_one_cap_between_them(
    store: DiskStore, tmp_path: Path, clock: Clock, make_image: MakeImage
) -> None:
    pair = [DiskStore(tmp_path / "data" / "images", 20_000, clock=clock) for _ in range(2)]
    for index in range(6):
        image = make_image(f"#0000{index:02x}", pad_bytes=6_000)
        await pair[index % 2].save(TASK, index, image, clock.now + 60 + index)
    for each in pair:
        await each.sweep_once()
    assert [path.name[0] for path in files(tmp_path)] == ["3", "4", "5"]


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


async def test_the_upstream_store_keeps_only_what_came_without_a_link(store: DiskStore, make_image: MakeImage) -> None:
    upstream, image = UpstreamStore(store), make_image()
    link = StoredImage(0, url="https://pics.example.org/0")
    assert await upstream.contains_all(TASK, [link])
    assert not await upstream.contains_all(TASK, [link, stored(image, 1)])
    await upstream.save(TASK, 1, image, 1e10)
    assert await upstream.contains_all(TASK, [link, stored(image, 1)])
    assert await load(upstream, TASK, stored(image, 1)) == image.data
    await upstream.extend_expiry(TASK, [link, stored(image, 1)], 1.1e10)


async def test_an_image_in_the_folder_of_another_instance_is_unavailable(
    tmp_path: Path, clock: Clock, make_image: MakeImage
) -> None:
    others = {"live": True}
    ours = DiskStore(tmp_path / "ours", 10**6, clock=clock, lookups=DiskLookups(lambda: others["live"]))
    theirs = DiskStore(tmp_path / "theirs", 10**6, clock=clock)
    await ours.start()
    await theirs.start()
    image = replace(stored(make_image()), store_id=theirs.store_id)
    assert await ours.contains_all(TASK, [image])
    with pytest.raises(StoreUnavailable):
        await load(ours, TASK, image)
    others["live"] = False
    assert not await ours.contains_all(TASK, [image])
    assert await load(ours, TASK, image) is None


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"0123"])
async def test_a_mark_without_an_id_is_replaced(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "images.mark").write_bytes(content)
    ids = set()
    for _ in range(2):
        store = DiskStore(tmp_path / "images", 1_000_000)
        await store.start()
        ids.add(store.store_id)
        await store.close()
    assert len(ids) == 1
    assert len(ids.pop()) == 16


@pytest.mark.parametrize("broken", [None, b"", b"of another version"])
def test_two_instances_that_mark_a_folder_at_once_have_the_same_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: bytes | None
) -> None:
    if broken is not None:
        (tmp_path / "images.mark").write_bytes(broken)
    write_text, others = Path.write_text, list[str]()

    def write_later(path: Path, text: str, **options: str) -> int:
        monkeypatch.setattr(Path, "write_text", write_text)
        others.append(read_mark(tmp_path / "images.mark"))
        return write_text(path, text, **options)

    monkeypatch.setattr(Path, "write_text", write_later)
    assert [read_mark(tmp_path / "images.mark")] == others == [read_mark(tmp_path / "images.mark")]
    assert [path.name for path in tmp_path.iterdir()] == ["images.mark"]


def test_folders_with_equal_broken_marks_have_different_ids(tmp_path: Path) -> None:
    for name in ("a.mark", "b.mark"):
        (tmp_path / name).write_bytes(b"")
    assert read_mark(tmp_path / "a.mark") != read_mark(tmp_path / "b.mark")


async def test_a_folder_keeps_its_mark(tmp_path: Path) -> None:
    marks = set()
    for _ in range(2):
        store = DiskStore(tmp_path / "images", 10**6)
        await store.start()
        marks.add(store.store_id)
    assert len(marks) == 1


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
    assert {path.parent.name for path in files(tmp_path)} == {"e" * 32, "d" * 32}
    await store.close()
