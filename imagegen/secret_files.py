"""Secrets in files, as Docker and Kubernetes mount them: the name of the setting with `_FILE` behind it names one."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from imagegen import setting_parsers as values

MAX_BYTES = 64 * 1024

SUFFIX = "_FILE"


def read_secret_files(
    texts: Mapping[str, str], names: Collection[str], faults: dict[str, str], notes: list[str]
) -> dict[str, str]:
    """Return the values that files have, by the name of the setting.

    A setting that has a value needs no file: one that is named too may be another program's.

    Args:
        texts: texts of the settings, by name.
        names: settings with a secret.
        faults: receives the faults, by name. They contain no text of a file.
        notes: receives warnings.
    """
    contents = {}
    for name in names:
        try:
            given = texts.get(name + SUFFIX, "").strip()
            if given and texts.get(name, "").strip():
                notes.append(f"{name + SUFFIX} has no effect, since {name} is set too: set one of them")
            elif content := read_secret_file(given):
                contents[name] = content
        except ValueError as error:
            faults[name + SUFFIX] = str(error)
    return contents


def read_secret_file(text: str) -> str:
    """Return the secret in a file that a text names, empty for an empty text. Raises ValueError, without the secret."""
    path = values.unwrapped(text)
    values.check_replaced(path)
    return _content(values.folder(path)) if path else ""


def _content(path: Path) -> str:
    shown = str(path)[:200] if path.is_absolute() else "the file"  # else it may be the secret itself
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        why = error.strerror or type(error).__name__
        raise ValueError(f"{shown} can't be read: {why}; name a file that this user can read") from error
    if len(raw) > MAX_BYTES:
        raise ValueError(f"{shown} is over {MAX_BYTES} bytes")
    try:
        text = raw.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{shown} is not UTF-8") from error
    if not text:
        raise ValueError(f"{shown} is empty")
    return text
