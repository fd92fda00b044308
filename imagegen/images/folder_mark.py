"""Marks next to an image folder, which all instances on it read: its id, and how its files are named."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from contextlib import suppress
from pathlib import Path

from imagegen.images import file_names, files

_FOLDER_ID = re.compile(rb"[0-9a-f]{16}")
_MARK_TRIES = 5
_MAX_MARK_BYTES = 1_024


def mark_of(folder: Path) -> Path:
    """Return the path of the mark of an image folder."""
    return folder.with_name(f"{folder.name}.mark")


def read_id(path: Path) -> str:
    """Return the id in a mark, which is neither made nor replaced; empty without one."""
    with suppress(OSError), path.open("rb") as file:
        if folder_id := _FOLDER_ID.fullmatch(file.read(_MAX_MARK_BYTES).strip()):
            return folder_id[0].decode()
    return ""


def read_mark(path: Path) -> str:
    """Return the id of a folder from its mark, a file, which is made at the first use and shared by all users.

    A mark without an id, as after a crash or on a full disk, is replaced.
    """
    for _ in range(_MARK_TRIES):
        broken: bytes | None = None
        with suppress(FileNotFoundError), path.open("rb") as file:
            if folder_id := _FOLDER_ID.fullmatch((content := file.read(_MAX_MARK_BYTES)).strip()):
                return folder_id[0].decode()
            status = os.fstat(file.fileno())
            broken = b"%d %d %b" % (status.st_ino, status.st_mtime_ns, content)
        part = path.with_name(f".{path.name}.{secrets.token_hex(4)}{files.PART_SUFFIX}")
        if broken is None:
            part.write_text(secrets.token_hex(8), encoding="ascii")
            _rename_new(part, path)
        else:  # all users of the same file give it the same id, and no copy of it gets that id
            part.write_text(hashlib.sha256(broken).hexdigest()[:16], encoding="ascii")
            part.replace(path)
    return ""


def _rename_new(part: Path, path: Path) -> None:
    """Rename a file unless another process has made one of that name meanwhile."""
    try:
        path.hardlink_to(part)
    except FileExistsError:
        part.unlink()
    except OSError:  # a file system without links
        part.replace(path)
    else:
        part.unlink()


def has_flat_names(folder: Path) -> bool:
    """Return whether the files of a folder have flat names (`imagegen.images.file_names`). Raises OSError.

    A folder with a mark of its id and none of flat names is of a version up to 0.5.6, which may still run, or run
    again: it keeps the names that these read. Without both marks, its content decides.
    """
    return _flat_mark_of(folder).exists() or (not mark_of(folder).exists() and file_names.may_be_flat(folder))


def mark_flat_names(folder: Path) -> bool:
    """Return whether a folder has flat names, and mark it then. This comes before the mark of its id."""
    if has_flat_names(folder):
        _flat_mark_of(folder).touch()
        return True
    return False


def _flat_mark_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.flat")
