"""Tests of the mark of an image folder, which names the instances that share it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from msgspec.structs import replace

from imagegen.errors import StoreUnavailable
from imagegen.images.disk import DiskLookups, DiskStore
from imagegen.images.folder_mark import read_mark
from imagegen.images.store import VerifiedImage
from imagegen.tasks.image import StoredImage
from tests.images.backings import load
from tests.images.conftest import MakeImage
from tests.support import Clock

TASK = "0123456789abcdef0123456789abcdef"


def stored(image: VerifiedImage, index: int = 0) -> StoredImage:
    return image.stored_at(index)


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


async def test_a_folder_that_can_not_be_written_keeps_its_id_and_one_without_a_mark_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = DiskStore(tmp_path / "images", 1_000_000)
    await before.start()
    await before.close()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _folder: usage._replace(free=0))
    for name, folder_id in (("images", before.store_id), ("other", "")):
        store = DiskStore(tmp_path / name, 1_000_000)
        await store.start()
        assert (store.health.writable, store.store_id) == (False, folder_id)
