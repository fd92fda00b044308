"""The settings file `.env`: lines of the form NAME=value."""

from __future__ import annotations

import io
import re
import stat
from pathlib import Path

MAX_BYTES = 1024 * 1024


def read_settings_file(path: Path | None, faults: dict[str, str], notes: list[str]) -> dict[str, str]:
    """Return the values of the settings file. A name alone has none, as for Docker.

    Args:
        path: None for no file.
        faults: receives the faults, by the path and the line.
        notes: receives warnings.
    """
    try:
        if path is None or not (text := _text_of(path)):
            return {}
    except ValueError as error:
        faults[str(path)] = str(error)
        return {}
    from dotenv.parser import parse_stream  # noqa: PLC0415 - it takes 20 ms, and most starts have no file

    lines = list(parse_stream(io.StringIO(text)))
    for line in lines:
        is_name = line.key and (line.value is not None or line.key.isidentifier())
        place = f"{path}, line {line.original.line}"
        if line.key and line.value is None and re.fullmatch(r"\[[^\[\]{}\"',:]*\]", line.key):
            notes.append(f"{place}, is a header, which has no effect: the settings below it count too")
        elif line.error or (line.key and not is_name):
            faults[place] = "is not of the form NAME=value"
    return {line.key: line.value or "" for line in lines if line.key}


def _text_of(path: Path) -> str:
    """Return the text of the settings file, nothing if there is none. Raises ValueError if it can't be read."""
    try:
        mode = _mode_of(path)
        if stat.S_ISDIR(mode):
            why = "Docker makes one where a file that is to be mounted does not exist"
            raise ValueError(f"is a folder, and must be a file of NAME=value lines; {why}")
        if not stat.S_ISREG(mode) and not stat.S_ISCHR(mode):
            raise ValueError("is no regular file, and must be one of NAME=value lines")
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        return ""
    except OSError as error:
        remedy = "let this user read it, or move it away"
        raise ValueError(f"can't be read: {error.strerror or type(error).__name__}; {remedy}") from error
    if len(raw) > MAX_BYTES:
        raise ValueError(f"can't be read: it is over {MAX_BYTES} bytes")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError("can't be read: it is not UTF-8") from error
    if "\0" in text:
        raise ValueError("can't be read: it is no text")
    return text


def _mode_of(path: Path) -> int:
    try:
        return path.stat().st_mode
    except PermissionError as error:
        why = f"{path.parent} can't be entered ({error.strerror})"
        raise ValueError(
            f"can't be looked for, since {why}; let this user enter that folder, or start in another"
        ) from error
