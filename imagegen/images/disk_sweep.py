"""Sweep of an image folder: its files, with when they expire. It may take seconds, so it runs in a thread."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from msgspec import Struct

from imagegen.images import files
from imagegen.images.disk_index import IndexEntry, oldest_first
from imagegen.images.expiry import STEP_S, ExpiryIndex
from imagegen.images.file_names import is_image, task_of
from imagegen.images.files import FoundFile


class SweptFolder(Struct, frozen=True):
    """Result of a sweep.

    entries: the files by name, the oldest first. gone: files that the index had and the folder has not.
    parts: unfinished files. unknown: by task, an expiry that was recorded nowhere. tasks: those with a file.
    """

    entries: dict[str, IndexEntry]
    gone: Collection[str]
    parts: Collection[str]
    unknown: Mapping[str, float]
    tasks: set[str]


def sweep_folder(
    folder: Path, before: Mapping[str, IndexEntry], expiry: ExpiryIndex, now: float, life_s: float
) -> SweptFolder:
    """Scan a folder. Raises OSError.

    Args:
        folder: of the images.
        before: files of the index, the oldest first.
        expiry: index of expiries, which other processes may have changed.
        now: Unix time.
        life_s: how long an image of unknown expiry is kept.
    """
    expiry.refresh()
    found_files, parts = dict[str, FoundFile](), set[str]()
    for name, file in files.scan(folder).items():
        if name.endswith(files.PART_SUFFIX):
            parts.add(name)
        elif is_image(str(folder), name):
            found_files[name] = file
    unknown: dict[str, float] = {}
    expiries: dict[str, float] = {}
    for name, file in found_files.items():
        expires_at_s = _known_expiry(name, file, before.get(name), expiry, (now, life_s))
        if expires_at_s is None:
            expires_at_s = unknown[task_of(name)] = _stamp(file, now, life_s) or now + life_s
        expiries[name] = expires_at_s
    order = {name: number for number, name in enumerate(before)}
    shared = _shared_names(found_files, expiries, order)
    entries = {
        name: IndexEntry(0 if name in shared else found_files[name].size_bytes, expires_at_s)
        for name, expires_at_s in expiries.items()
    }
    tasks = set(map(task_of, found_files)) | set(map(task_of, parts))
    return SweptFolder(oldest_first(entries, order), before.keys() - found_files.keys(), parts, unknown, tasks)


def _stamp(file: FoundFile, now: float, life_s: float) -> float:
    """Return a modification time in the future, which earlier versions have as the only expiry; 0 for one in the past.

    One in the past means nothing, since copying a folder sets it.
    """
    return file.modified_s if now < file.modified_s <= now + 2 * life_s else 0.0


def _known_expiry(
    name: str, file: FoundFile, entry: IndexEntry | None, expiry: ExpiryIndex, times: tuple[float, float]
) -> float | None:
    """Return when a file that was found expires, None if that is not recorded.

    times: now, and the life of an image of unknown expiry.
    """
    stamped_s = _stamp(file, *times)
    if entry is not None:
        if abs(stamped_s - entry.expires_at_s) < 1:
            return entry.expires_at_s
        return max(expiry.later_than(task_of(name), entry.expires_at_s) or entry.expires_at_s, stamped_s)
    noted_s = expiry.expiry_of(task_of(name))
    if noted_s is None:
        return None
    return file.modified_s if noted_s - 2 * STEP_S < file.modified_s <= noted_s else max(noted_s, stamped_s)


def _shared_names(
    found_files: Mapping[str, FoundFile], expiries: Mapping[str, float], order: Mapping[str, int]
) -> set[str]:
    """Return the names of files that have another name which is removed later: their bytes count there."""
    linked = [name for name in expiries if found_files[name].links > 1]
    linked.sort(key=lambda name: (expiries[name], order.get(name, -1)))
    last = {found_files[name].inode: name for name in linked}
    return set(linked) - set(last.values())
