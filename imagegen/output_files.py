"""Files of generated images, named by prompt and index. No file with other bytes is overwritten."""

from __future__ import annotations

import os
import secrets
import unicodedata
from itertools import count
from pathlib import Path

MAX_NAME_BYTES = 80
"""Of the part that comes from the prompt: file systems take 255 bytes in all."""

_EXTENSIONS = {"image/png": "png", "image/jpeg": "jpg", "image/webp": "webp"}
_MAGIC = ((b"\x89PNG", "png"), (b"\xff\xd8\xff", "jpg"), (b"RIFF", "webp"))
_RESERVED = {"con", "prn", "aux", "nul", *(f"{name}{number}" for name in ("com", "lpt") for number in range(10))}
"""Names of devices on Windows, with any extension."""


def file_stem(prompt: str) -> str:
    """Return a prompt as the start of a file name: letters and digits of all scripts, hyphens between words."""
    text = unicodedata.normalize("NFC", prompt).lower()
    words = "".join(char if char.isalnum() else " " for char in text).split()
    stem = "-".join(words).encode()[:MAX_NAME_BYTES].decode(errors="ignore").rstrip("-") or "image"
    return f"image-{stem}" if stem in _RESERVED else stem


def extension(content_type: str | None, data: bytes) -> str:
    """Return the extension of an image, without its dot."""
    by_type = _EXTENSIONS.get(content_type or "")
    return by_type or next((name for magic, name in _MAGIC if data.startswith(magic)), "img")


def check_folder(folder: Path) -> None:
    """Make the folder, and a file in it, before anything is paid. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".imagegen-{secrets.token_hex(4)}.part"
    try:
        probe.write_bytes(b"imagegen")
    finally:
        probe.unlink(missing_ok=True)


def write_image(folder: Path, stem: str, index: int, suffix: str, data: bytes) -> Path:
    """Write an image; return its path. A file with the same bytes is kept, another one gets a longer name.

    Raises OSError.
    """
    for number in count(1):
        path = folder / (f"{stem}-{index}.{suffix}" if number == 1 else f"{stem}-{index}-{number}.{suffix}")
        try:
            claimed = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            if _has(path, data):
                return path
            continue
        try:
            with os.fdopen(claimed, "wb") as file:
                file.write(data)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return path
    raise AssertionError("unreachable")


def _has(path: Path, data: bytes) -> bool:
    return path.is_file() and path.stat().st_size == len(data) and path.read_bytes() == data
