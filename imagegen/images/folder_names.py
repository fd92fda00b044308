"""Form of the file names in one image folder, and the names in it.

Former versions find nested names only. They may still run, or run again, so a folder that has files keeps its form.
Two instances can choose different forms at once, or after the folder was empty: each one finds the names of both.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path

from imagegen.images.disk_calls import DiskCalls
from imagegen.images.file_names import is_image, name_of
from imagegen.tasks.image import StoredImage


class FolderNames:
    """Names in one folder. Await `choose` before `new`, and `learn` before `stored`.

    Args:
        may_be_flat: returns whether all instances that may read the folder find flat names.
        meet_peers: waits shortly until that is certain, which it is not right after a start.
    """

    def __init__(
        self,
        folder: Path,
        calls: DiskCalls,
        may_be_flat: Callable[[], bool],
        meet_peers: Callable[[], Awaitable[None]],
    ) -> None:
        self._folder = folder
        self._root = str(folder)
        self._calls = calls
        self._may_be_flat = may_be_flat
        self._meet_peers = meet_peers
        self._is_flat: bool | None = None

    async def learn(self) -> None:
        """Read the form, which another instance may have chosen for the first file. Raises StoreUnavailable."""
        if self._is_flat is None:
            self._is_flat = await self._calls.repeatable(0, _read_form, self._folder)

    async def choose(self) -> None:
        """Read the form, and choose it if the folder has no file. Raises StoreUnavailable."""
        if self._is_flat is None:
            await self._meet_peers()
            self._is_flat = await self._calls.repeatable(0, _choose_form, self._folder, self._may_be_flat())

    def new(self, task_id: str, index: int, sha256: str, content_type: str) -> str:
        """Return the path of a file to be written: nested while an instance of a former version is there.

        Raises ValueError for a task id that can't be in a path.
        """
        is_flat = bool(self._is_flat) and self._may_be_flat()
        return name_of(self._root, task_id, index, sha256, content_type, is_flat=is_flat)

    def stored(self, task_id: str, image: StoredImage) -> Iterator[str]:
        """Yield the paths that an image's file may have, first the one in the form of the folder."""
        for is_flat in (bool(self._is_flat), not self._is_flat):
            yield name_of(self._root, task_id, image.index, image.sha256, image.content_type, is_flat=is_flat)


def _read_form(folder: Path) -> bool | None:
    return True if _flat_mark_of(folder).exists() else _first_is_flat(folder)


def _choose_form(folder: Path, may_be_flat: bool) -> bool:  # noqa: FBT001 - passed through a thread
    is_flat = _read_form(folder)
    if is_flat is None:
        is_flat = may_be_flat
    if is_flat and not _flat_mark_of(folder).exists():  # another user may have made it, who alone may touch it
        _flat_mark_of(folder).touch()
    return is_flat


def _flat_mark_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.flat")


def _first_is_flat(folder: Path) -> bool | None:
    """Return whether the first image found in a folder has a flat name, None if there is none.

    Raises OSError if the folder can't be read. A damaged folder in it is left out: most images are in other ones.
    """
    with suppress(FileNotFoundError), os.scandir(folder) as places:
        for place in [place for place in places if len(place.name) == 2 and place.is_dir(follow_symlinks=False)]:
            with suppress(OSError), os.scandir(place.path) as entries:
                for entry in entries:
                    if is_image(str(folder), entry.path):
                        return True
                    if entry.name.startswith(place.name) and entry.is_dir(follow_symlinks=False):
                        return False
    return None
