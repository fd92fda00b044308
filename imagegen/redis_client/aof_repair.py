"""Repair of an append-only file with a damaged end, as a power cut or a full disk leaves it.

Only the last file of the manifest is written at that time. Valkey and Redis cut an incomplete last command
themselves, but refuse to start if zeros or garbage follow the last whole one.
"""

from __future__ import annotations

import mmap
import re
import shutil
import time
from pathlib import Path

from msgspec import Struct

_LAST_FILE = re.compile(rb"^file (\S+) seq \d+ type i", re.MULTILINE)
_NUMBER = re.compile(rb"[*$](\d{1,10})\r\n")
_FIRST_BASE = "appendonly.aof.1.base.rdb"
_FIRST_WORDS = 64
"""Bytes of a command's first argument that are compared with MULTI and EXEC."""


class Repair(Struct, frozen=True):
    """Result of a repair: cut bytes, bytes before, and the copy of the whole damaged file."""

    cut_bytes: int
    size_bytes: int
    backup: Path


def repair(folder: Path) -> Repair | None:
    """Cut the last append-only file in a server's data folder after its last whole command.

    Return None if there is nothing to cut. Raises OSError.
    """
    path = _last_file(folder / "appendonlydir")
    if path is None:
        return None
    size = path.stat().st_size
    whole = whole_bytes(path)
    if whole == size:
        return None
    backup = path.with_name(f"{path.name}.broken-{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}")
    shutil.copyfile(path, backup)
    with path.open("r+b") as file:
        file.truncate(whole)
    return Repair(size - whole, size, backup)


def lacks_manifest(folder: Path) -> bool:
    """Return whether a server would begin with nothing, and overwrite commands in append-only files without a manifest.

    A first start that is cut off before it writes the manifest leaves the first base, which holds none, and an empty
    file. Raises OSError.
    """
    files = [path for path in (folder / "appendonlydir").glob("appendonly.aof.*") if path.name != _FIRST_BASE]
    return any(path.stat().st_size for path in files) and not any(path.suffix == ".manifest" for path in files)


def whole_bytes(path: Path) -> int:
    """Return the length of the part that is whole commands, and whole transactions."""
    if path.stat().st_size == 0:
        return 0
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        end, position, in_transaction = 0, 0, False
        while (command := _command(data, position)) is not None:
            position, name = command
            if name == b"MULTI":
                in_transaction = True
            elif name == b"EXEC":
                in_transaction = False
            if not in_transaction:
                end = position
        return end


def _command(data: mmap.mmap, start: int) -> tuple[int, bytes] | None:
    """Return the end and the name of the command, or annotation, that begins at `start`; None if it is not whole."""
    if data[start : start + 1] == b"#":
        end = data.find(b"\r\n", start)
        return (end + 2, b"") if end >= 0 else None
    head = _NUMBER.match(data, start)
    if head is None or data[start : start + 1] != b"*" or head[1] == b"0":
        return None
    position, name = head.end(), b""
    for argument in range(int(head[1])):
        length = _NUMBER.match(data, position)
        if length is None or data[position : position + 1] != b"$":
            return None
        begin = length.end()
        position = begin + int(length[1]) + 2
        if data[position - 2 : position] != b"\r\n":
            return None
        if argument == 0:
            name = data[begin : min(position - 2, begin + _FIRST_WORDS)].upper()
    return position, name


def _last_file(folder: Path) -> Path | None:
    """Return the file that was written last: the last one in the manifest."""
    manifests = sorted(folder.glob("*.manifest"))
    names = _LAST_FILE.findall(manifests[0].read_bytes()) if manifests else []
    path = folder / names[-1].decode(errors="replace") if names else None
    return path if path is not None and path.is_file() else None
