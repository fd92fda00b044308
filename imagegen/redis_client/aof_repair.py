"""Repair of append-only files with a damaged end, and of their manifest, as a power cut or a full disk leaves them.

Only the last file of the manifest is written at that time. Valkey and Redis cut an incomplete last command
themselves, but refuse to start if zeros or garbage follow the last whole one. They overwrite a file that the manifest
does not list, and start with an empty base.
"""

from __future__ import annotations

import mmap
import re
import shutil
import time
from pathlib import Path

from loguru import logger
from msgspec import Struct

from imagegen.errors import SettingsError

_LAST_FILE = re.compile(rb"^file (\S+) seq \d+ type i", re.MULTILINE)
_NUMBER = re.compile(rb"[*$](\d{1,10})\r\n")
_LISTED = re.compile(r"file (\S+) seq (\d+) type ([bhi])( .*)?")
_FILE_NAME = re.compile(r"appendonly\.aof\.(\d+)\.(base|incr)\.(rdb|aof)")
_MANIFEST = "appendonly.aof.manifest"
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
    backup = _backup_of(path)
    shutil.copyfile(path, backup)
    with path.open("r+b") as file:
        file.truncate(whole)
    return Repair(size - whole, size, backup)


def ensure_manifest(folder: Path) -> None:
    """Write the manifest again if it does not list all append-only files. Raises SettingsError, OSError."""
    fault = _manifest_fault(folder)
    if fault is None:
        return
    text = f"in {folder / 'appendonlydir'}, {fault}"
    if not _rebuild_manifest(folder):
        remedy = "Put back what was there, or move that folder away to begin with nothing"
        raise SettingsError(f"DATA_DIR: {text}. {remedy}")
    logger.warning("The embedded Redis would lose data: {}; the manifest was written again by the files' names", text)


class _AofFile(Struct, frozen=True):
    """A file of the append-only log. number: that of its kind, which rises with each new file."""

    path: Path
    number: int
    kind: str

    @property
    def size(self) -> int:
        return self.path.stat().st_size


def _manifest_fault(folder: Path) -> str | None:
    """Return why a server would begin without some of its data, and overwrite it; None if it would not.

    A first start that is cut off leaves the first base, which holds nothing, or an empty file. A rewrite that is cut
    off leaves older files than those in the manifest. Raises OSError.
    """
    files, listed = _aof_files(folder), _listed_files(folder)
    if listed is None:
        if any(file.size for file in files if (file.kind, file.number) != ("base", 1)):
            return f"{_MANIFEST} is missing or damaged"
        return None
    newest = max((number for number, kind in listed.values() if kind == "i"), default=0)
    for file in files:
        if file.kind == "incr" and file.path.name not in listed and file.number > newest and file.size:
            return f"{_MANIFEST} does not list {file.path.name}"
        if file.kind == "base" and file.number > 1 and listed.get(file.path.name, (0, ""))[1] == "b" and not file.size:
            return f"{file.path.name} is empty"
    return None


def _rebuild_manifest(folder: Path) -> bool:
    """Write the manifest again by the names of the files, if there is one of each kind; return whether it was.

    The one before is kept. Raises OSError.
    """
    files = {file.kind: file for file in _aof_files(folder) if file.size}
    if len(files) != 2 or len(_aof_files(folder)) != 2:
        return False
    path = folder / "appendonlydir" / _MANIFEST
    if path.exists():
        path.rename(_backup_of(path))
    rows = [f"file {files[kind].path.name} seq {files[kind].number} type {kind[0]}\n" for kind in ("base", "incr")]
    written = path.with_name(f"{_MANIFEST}.new")
    written.write_text("".join(rows))
    written.rename(path)
    return True


def _aof_files(folder: Path) -> list[_AofFile]:
    matches = [(path, _FILE_NAME.fullmatch(path.name)) for path in (folder / "appendonlydir").glob("appendonly.aof.*")]
    return [_AofFile(path, int(match[1]), match[2]) for path, match in matches if match and path.is_file()]


def _listed_files(folder: Path) -> dict[str, tuple[int, str]] | None:
    """Return number and type of each file in the manifest; None without a manifest, or if it is damaged."""
    path = folder / "appendonlydir" / _MANIFEST
    lines = path.read_bytes().decode(errors="replace").splitlines() if path.is_file() else []
    rows = [_LISTED.fullmatch(line) for line in lines]
    return {row[1]: (int(row[2]), row[3]) for row in rows if row} if rows and all(rows) else None


def _backup_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.broken-{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}")


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
