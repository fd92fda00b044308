"""Tests of the names of image files: flat in new folders, nested in those that former versions have or share."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import orjson
import pytest

from imagegen.chosen_parts import create_disk_store
from imagegen.images.disk import DiskLookups, DiskStore
from imagegen.images.needed_uploads import NeededUploads
from imagegen.images.store import VerifiedImage
from imagegen.queue.notifier import FLAT_FILE_NAMES
from imagegen.settings import Settings
from tests.conftest import MakeInstance
from tests.images.backings import fails_with, load
from tests.images.conftest import MakeImage
from tests.support import Clock, eventually

NameOf = Callable[..., Path]

OPERATIONS = Path(__file__).resolve().parents[2] / "docs" / "operations.md"

TASK, OTHER = "0123456789abcdef0123456789abcdef", "f" * 32


async def open_store(tmp_path: Path, clock: Clock, *, may_be_flat: bool = True) -> DiskStore:
    lookups = DiskLookups(may_be_flat=lambda: may_be_flat)
    store = DiskStore(tmp_path / "images", 1_000_000, clock=clock, lookups=lookups)
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


async def test_names_are_nested_while_an_instance_of_a_former_version_is_there(
    tmp_path: Path, make_instance: MakeInstance, make_image: MakeImage
) -> None:
    one, _two, image = make_instance(), make_instance(), make_image()
    needed = NeededUploads(one.connection, one.keys)
    await eventually(lambda: one.notifier.all_can(FLAT_FILE_NAMES))
    forms = []
    for kind in ("", "hello", "bye"):
        if kind:
            greeting = orjson.dumps({"from": "former", "kind": kind})
            await one.connection.commands.publish(one.keys.notifications, greeting)
        await eventually(lambda: ("former" in one.notifier.peers) is (kind == "hello"))  # noqa: B023 - called at once
        folder = tmp_path / f"after {kind}"
        store = create_disk_store(Settings(data_dir=folder), one.parts, needed, is_cache=False)
        await store.start()
        await store.save(TASK, 0, image, 2e9)
        forms.append([name(folder, image).exists() for name in (flat, nested)])
        await store.close()
    assert forms == [[True, False], [False, True], [True, False]]


async def test_the_first_image_waits_for_the_greetings_of_a_start(
    tmp_path: Path, make_instance: MakeInstance, make_image: MakeImage
) -> None:
    one, image = make_instance(start=False), make_image()
    needed = NeededUploads(one.connection, one.keys)
    store = create_disk_store(Settings(data_dir=tmp_path), one.parts, needed, is_cache=False)
    await store.start()
    saving = asyncio.create_task(store.save(TASK, 0, image, 2e9))
    one.start()
    await saving
    assert flat(tmp_path, image).exists()
    await store.close()


async def test_the_documented_command_gives_images_the_names_that_former_versions_find(
    tmp_path: Path, clock: Clock, make_image: MakeImage
) -> None:
    section = OPERATIONS.read_text(encoding="utf-8").partition("### Back to a version before 0.5.7")[2]
    command = section.partition("```sh\n")[2].partition("```")[0]
    store, image, ids = await open_store(tmp_path, clock), make_image(), (TASK, "with-dashes_0-1", "f" * 64)
    for task_id in ids:
        await store.save(task_id, 0, image, clock.now + 60)
    await store.close()
    for _ in range(2):
        subprocess.run(["/bin/sh", "-c", command], env=os.environ | {"DATA_DIR": str(tmp_path)}, check=True)  # noqa: ASYNC221
        files = {path for path in (tmp_path / "images").rglob("*") if path.is_file()}
        assert files == {nested(tmp_path, image, task_id) for task_id in ids}


async def test_names_stay_nested_after_a_former_version_has_left(
    tmp_path: Path, clock: Clock, make_image: MakeImage
) -> None:
    image = make_image()
    for task_id, may_be_flat in ((TASK, False), (OTHER, True)):
        store = await open_store(tmp_path, clock, may_be_flat=may_be_flat)
        await store.save(task_id, 0, image, clock.now + 60)
        assert nested(tmp_path, image, task_id).exists()
        await store.close()


async def test_peers_still_know_what_an_instance_can_do_after_it_counts_those_that_answer(
    make_instance: MakeInstance,
) -> None:
    one, two = make_instance(), make_instance()
    await eventually(lambda: all(each.notifier.peers and each.notifier.all_can(FLAT_FILE_NAMES) for each in (one, two)))
    assert await two.notifier.attending() == frozenset({one.notifier.instance})
    assert one.notifier.all_can(FLAT_FILE_NAMES)


async def test_names_are_nested_while_an_instance_can_not_see_who_else_is_there(
    make_instance: MakeInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, joined = make_instance(), list[bool]()
    await eventually(lambda: one.notifier.all_can(FLAT_FILE_NAMES))
    one.notifier.on_join.append(lambda: joined.append(one.notifier.all_can(FLAT_FILE_NAMES)))
    one.connection.subscriptions.hang_up()
    await eventually(lambda: joined)
    assert joined == [False]
    await eventually(lambda: one.notifier.all_can(FLAT_FILE_NAMES))


async def test_images_are_nested_in_a_flat_folder_while_an_instance_of_a_former_version_is_there(
    tmp_path: Path, clock: Clock, make_image: MakeImage
) -> None:
    may_be_flat, image = [True, False, True], make_image()
    lookups = DiskLookups(may_be_flat=lambda: may_be_flat[0])
    store = DiskStore(tmp_path / "images", 1_000_000, clock=clock, lookups=lookups)
    await store.start()
    tasks = [TASK, OTHER, "e" * 32]
    for task_id, name in zip(tasks, (flat, nested, flat), strict=True):
        await store.save(task_id, 0, image, clock.now + 60)
        assert name(tmp_path, image, task_id).exists()
        may_be_flat.pop(0)
    may_be_flat.append(True)
    assert [await load(store, task_id, image.stored_at(0)) for task_id in tasks] == [image.data] * 3


async def test_instances_that_choose_different_names_find_the_images_of_each_other(
    tmp_path: Path, clock: Clock, make_image: MakeImage
) -> None:
    first = await open_store(tmp_path, clock, may_be_flat=False)
    await first.save(TASK, 0, make_image("red"), clock.now + 60)
    clock.now += 100
    await first.sweep_once()  # the folder is empty again
    second = await open_store(tmp_path, clock)
    image, stored = make_image(), make_image().stored_at(0)
    for ours, theirs, name, task_id in ((second, first, flat, TASK), (first, second, nested, OTHER)):
        await ours.save(task_id, 0, image, clock.now + 60)
        assert name(tmp_path, image, task_id).exists()
        assert await theirs.contains_all(task_id, [stored])
        assert await load(theirs, task_id, stored) == image.data
        await theirs.extend_expiry(task_id, [stored], clock.now + 600)
        copy_id = f"{task_id[:31]}-"
        assert await theirs.reuse(task_id, stored, copy_id, 0, clock.now + 600)
        assert await load(ours, copy_id, stored) == image.data
    clock.now += 300
    for store in (first, second):
        await store.sweep_once()
        assert [await load(store, task_id, stored) for task_id in (TASK, OTHER)] == [image.data] * 2


async def test_images_of_both_forms_that_were_copied_without_the_marks_of_their_folder_are_found(
    tmp_path: Path, clock: Clock, make_image: MakeImage
) -> None:
    image = make_image()
    write(nested(tmp_path, image), image)
    write(flat(tmp_path, image, OTHER), image)
    store = await open_store(tmp_path, clock)
    assert [await load(store, task_id, image.stored_at(0)) for task_id in (TASK, OTHER)] == [image.data] * 2


async def test_an_instance_of_another_user_saves_beside_the_mark_of_the_first(
    tmp_path: Path, clock: Clock, make_image: MakeImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = await open_store(tmp_path, clock)
    await ours.save(TASK, 0, make_image(), clock.now + 60)
    theirs = await open_store(tmp_path, clock)
    monkeypatch.setattr(Path, "touch", fails_with(errno.EACCES))
    await theirs.save(OTHER, 0, make_image(), clock.now + 60)
    assert flat(tmp_path, make_image(), OTHER).exists()


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES])
async def test_a_damaged_folder_keeps_no_image_of_another_one_from_being_read_or_saved(
    tmp_path: Path, clock: Clock, make_image: MakeImage, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    image, scan = make_image(), os.scandir
    damaged = tmp_path / "images" / "00"
    damaged.mkdir(parents=True)
    monkeypatch.setattr(os, "scandir", lambda path: fails_with(code)() if str(path) == str(damaged) else scan(path))
    store = await open_store(tmp_path, clock)
    assert not await store.contains_all(TASK, [image.stored_at(0)])
    await store.save(TASK, 0, image, clock.now + 60)
    assert await load(store, TASK, image.stored_at(0)) == image.data


@pytest.mark.parametrize("may_be_flat", [True, False])
async def test_an_instance_reads_the_names_that_another_one_has_chosen(
    tmp_path: Path, clock: Clock, make_image: MakeImage, *, may_be_flat: bool
) -> None:
    ours = await open_store(tmp_path, clock, may_be_flat=not may_be_flat)
    theirs = await open_store(tmp_path, clock, may_be_flat=may_be_flat)
    image = make_image()
    assert await load(ours, TASK, image.stored_at(0)) is None
    await theirs.save(TASK, 0, image, clock.now + 60)
    assert await load(ours, TASK, image.stored_at(0)) == image.data
    await ours.save(OTHER, 0, image, clock.now + 60)
    assert await load(theirs, OTHER, image.stored_at(0)) == image.data


@pytest.mark.parametrize("name", [flat, nested], ids=["flat", "nested"])
async def test_images_that_were_copied_without_the_marks_of_their_folder_are_found(
    tmp_path: Path, clock: Clock, make_image: MakeImage, name: NameOf
) -> None:
    image = make_image()
    write(name(tmp_path, image), image)
    write(tmp_path / "images" / "lost+found" / "#12" / "file", image)
    store = await open_store(tmp_path, clock)
    assert await load(store, TASK, image.stored_at(0)) == image.data
    await store.save(OTHER, 0, image, clock.now + 60)
    assert name(tmp_path, image, OTHER).exists()


async def test_what_a_former_version_wrote_among_flat_names_is_served_reused_and_removed(
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
