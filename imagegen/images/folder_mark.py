"""Mark next to an image folder, with an id that all instances on it share."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from contextlib import suppress
from pathlib import Path

from imagegen.images import files

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
