"""Tests of the names of image files: flat in new folders, those of former versions in theirs."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from imagegen.images.disk import DiskStore
from imagegen.images.folder_mark import has_flat_names, mark_flat_names, mark_of, read_mark
from imagegen.images.store import VerifiedImage
from tests.images.backings import load, mark_as_former
from tests.images.conftest import MakeImage
from tests.support import Clock

NameOf = Callable[..., Path]

TASK, OTHER = "0123456789abcdef0123456789abcdef", "f" * 32


async def open_store(tmp_path: Path, clock: Clock) -> DiskStore:
    store = DiskStore(tmp_path / "images", 1_000_000, clock=clock)
    await store.start()
    return store


def flat(tmp_path: Path, image: VerifiedImage, task_id: str = TASK) -> Path:
    return tmp_path / "images" / task_id[:2] / f"{task_id}-0-{image.sha256[:12]}.png"


def nested(tmp_path: Path, image: VerifiedImage, task_id: str = TASK) -> Path:
    return tmp_path / "images" / task_id[:2] / task_id / f"0-{image.sha256[:12]}.png"


def write(path: Path, image: VerifiedImage) -> None:
    assert image.data is not None
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(image.data)


async def test_a_new_folder_has_one_file_and_no_folder_for_a_task(
    tmp_path: Path, clock: Clock, make_image: MakeImage
) -> None:
    store, image = await open_store(tmp_path, clock), make_image()
    await store.save(TASK, 0, image, clock.now + 60)
    assert [path.name for path in (tmp_path / "images").rglob("*")] == ["01", flat(tmp_path, image).name]


async def test_a_folder_of_a_former_version_keeps_the_names_that_it_reads(
    tmp_path: Path, clock: Clock, make_image: MakeImage
) -> None:
    mark_as_former(tmp_path / "images")
    image = make_image()
    for _ in range(2):
        store = await open_store(tmp_path, clock)
        await store.save(TASK, 0, image, clock.now + 60)
        assert nested(tmp_path, image).exists()
        await store.close()
    assert not flat(tmp_path, image).exists()


@pytest.mark.parametrize("name", [flat, nested], ids=["flat", "nested"])
async def test_images_that_were_copied_without_the_marks_of_their_folder_are_found(
    tmp_path: Path, clock: Clock, make_image: MakeImage, name: NameOf
) -> None:
    image = make_image()
    write(name(tmp_path, image), image)
    write(tmp_path / "images" / "lost+found" / "#12", image)
    store = await open_store(tmp_path, clock)
    assert await load(store, TASK, image.stored_at(0)) == image.data
    await store.save(OTHER, 0, image, clock.now + 60)
    assert name(tmp_path, image, OTHER).exists()


@pytest.mark.parametrize("name", [flat, nested], ids=["flat", "nested"])
async def test_copied_images_are_served_from_a_disk_that_is_full(
    tmp_path: Path, clock: Clock, make_image: MakeImage, monkeypatch: pytest.MonkeyPatch, name: NameOf
) -> None:
    image, usage = make_image(), shutil.disk_usage(tmp_path)
    write(name(tmp_path, image), image)
    monkeypatch.setattr(shutil, "disk_usage", lambda _folder: usage._replace(free=0))
    store = await open_store(tmp_path, clock)
    assert await load(store, TASK, image.stored_at(0)) == image.data


async def test_what_a_former_version_wrote_into_a_new_folder_is_served_reused_and_removed(
    tmp_path: Path, clock: Clock, make_image: MakeImage
) -> None:
    store, ours, theirs = await open_store(tmp_path, clock), make_image("teal"), make_image("red")
    await store.save(TASK, 0, ours, clock.now + 60)
    write(nested(tmp_path, theirs), theirs)
    await store.sweep_once()
    assert await load(store, TASK, ours.stored_at(0)) == ours.data
    assert await load(store, TASK, theirs.stored_at(0)) == theirs.data
    assert await store.reuse(TASK, theirs.stored_at(0), OTHER, 0, clock.now + 60)
    assert flat(tmp_path, theirs, OTHER).exists()
    clock.now += 10_000_000
    await store.sweep_once()
    assert [path for path in (tmp_path / "images").rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("step", ["touch", "write_text"])
def test_two_instances_that_make_a_folder_at_once_name_its_files_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    folder, take_step, names = tmp_path / "images", getattr(Path, step), list[bool]()

    def take_step_later(path: Path, *args: str, **options: str) -> None:
        monkeypatch.setattr(Path, step, take_step)
        names.append(mark_flat_names(folder))
        read_mark(mark_of(folder))
        (folder / TASK[:2] / TASK).mkdir(parents=True)  # as a former version does
        take_step(path, *args, **options)

    monkeypatch.setattr(Path, step, take_step_later)
    names.append(mark_flat_names(folder))
    read_mark(mark_of(folder))
    assert [*names, mark_flat_names(folder), has_flat_names(folder)] == [True] * 4
