"""Search for the images of a task in a folder, by their names: what the task's record should name, if that was lost."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress

from imagegen.images.file_names import is_image, place_of, task_of
from imagegen.images.files import MISSING
from imagegen.images.sniff import ImageChecker, NotAnImage
from imagegen.images.store import PIECE_BYTES
from imagegen.tasks.image import StoredImage


def find_images(root: str, task_id: str, since_s: float, store_id: str) -> list[StoredImage]:
    """Return the whole images of a task, the newest of each place; their seeds are unknown. Raises OSError.

    since_s: Unix time; older files are of a former submit.
    """
    found: dict[int, tuple[float, StoredImage]] = {}
    for path in _paths(root, task_id):
        with suppress(*MISSING, NotAnImage):
            index, short_sha256 = place_of(path)
            image, changed_at_s = _read(path, index, store_id)
            newest_s = found[index][0] if index in found else since_s
            if image.sha256.startswith(short_sha256) and changed_at_s >= newest_s:
                found[index] = changed_at_s, image
    return [image for _, (_, image) in sorted(found.items())]


def _paths(root: str, task_id: str) -> Iterator[str]:
    folder = os.path.join(root, task_id[:2])  # noqa: PTH118
    for place in (folder, os.path.join(folder, task_id)):  # noqa: PTH118
        with suppress(*MISSING), os.scandir(place) as entries:
            names = [entry.path for entry in entries if place != folder or entry.name.startswith(f"{task_id}-")]
            yield from (name for name in names if is_image(root, name) and task_of(name) == task_id)


def _read(path: str, index: int, store_id: str) -> tuple[StoredImage, float]:
    """Check a file, and return its image and when it was last changed. Raises OSError, NotAnImage."""
    checker = ImageChecker()
    with open(path, "rb") as file:  # noqa: PTH123
        while piece := file.read(PIECE_BYTES):
            if checker.feed(piece) < len(piece):
                raise NotAnImage("more bytes follow it")
        checker.check_ended()
        facts = (checker.content_type, checker.size_bytes, checker.width, checker.height, checker.digest)
        return StoredImage(index, *facts, store_id=store_id), os.fstat(file.fileno()).st_ctime
