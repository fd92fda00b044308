"""EXIF blocks with the parameters of an image, new or merged into a block that the file has.

A block is a TIFF header and directories (IFD) of 12-byte entries; values over 4 bytes lie elsewhere in the block, at
offsets from its start. Exif 3.0, https://www.cipa.jp/std/documents/download_e.html?DC-008-Translation-2023-E
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Literal

from msgspec import Struct

_ASCII, _LONG, _UNDEFINED = 2, 4, 7
_DESCRIPTION, _EXIF_POINTER, _VERSION, _USER_COMMENT = 0x010E, 0x8769, 0x9000, 0x9286
_UNICODE, _PLAIN = b"UNICODE\0", b"ASCII\0\0\0"
_MAX_ENTRIES = 1_000

_MIN_COMMENT_BYTES = 2_000
"""With less space than this, the parameters of most images would be cut."""

_FRAME_BYTES = 128
"""Upper bound of what a block needs around its texts, of a block without other entries."""


def parameters_block(existing: bytes, text: str, description: str, max_bytes: int) -> bytes | None:
    """Return a block with `text` as UserComment and `description` as ImageDescription; None to leave the file alone.

    The description is left out if the block has one, or no space for it. A prompt that does not fit is cut; the last
    line of the text stays.

    Args:
        existing: the block of the file, empty if it has none. It is left alone if it has a comment, or is broken.
        max_bytes: of the block.
    """
    try:
        block = _Block.parse(existing) if existing else _Block()
    except (struct.error, ValueError):
        return None
    if block.has_comment:
        return None
    space = max_bytes - block.size_bytes - _FRAME_BYTES
    comment = _comment(text, space)
    if comment is None:
        return None
    block.exif.setdefault(_VERSION, _Value(_UNDEFINED, 4, b"0232"))
    block.exif[_USER_COMMENT] = _Value(_UNDEFINED, len(comment), comment)
    title = description.encode() + b"\0"
    if _DESCRIPTION not in block.main and len(title) <= space - len(comment):
        block.main[_DESCRIPTION] = _Value(_ASCII, len(title), title)
    return block.encode()


class _Value(Struct, frozen=True):
    """A value of an entry. data: its bytes, or in an existing entry the four bytes of value or offset."""

    kind: int
    count: int
    data: bytes
    raw: bool = False


@dataclass(slots=True)
class _Block:
    """A block and its directories. New directories are written behind what the block has: its offsets stay valid."""

    order: Literal["<", ">"] = ">"
    start: bytes = b""
    main: dict[int, _Value] = field(default_factory=dict)
    exif: dict[int, _Value] = field(default_factory=dict)
    next_directory: int = 0
    has_comment: bool = False

    @classmethod
    def parse(cls, block: bytes) -> _Block:
        """Read the main and the Exif directory. Raises ValueError, struct.error."""
        order: Literal["<", ">"] = "<" if block[:4] == b"II*\0" else ">"
        if block[:4] not in (b"II*\0", b"MM\0*"):
            raise ValueError("no TIFF header")
        (first,) = struct.unpack_from(f"{order}I", block, 4)
        main, next_directory = _directory(block, order, first)
        exif: dict[int, _Value] = {}
        if _EXIF_POINTER in main:
            (offset,) = struct.unpack(f"{order}I", main[_EXIF_POINTER].data)
            exif, _ = _directory(block, order, offset)
        comment = exif.get(_USER_COMMENT)
        has_comment = comment is not None and bool(_content(block, order, comment)[8:].strip(b"\0 "))
        return cls(order, block, main, exif, next_directory, has_comment)

    @property
    def size_bytes(self) -> int:
        """Upper bound of the block with its directories written once more."""
        return len(self.start) + 12 * (len(self.main) + len(self.exif))

    def encode(self) -> bytes:
        """Return the block."""
        mark = b"II*\0" if self.order == "<" else b"MM\0*"
        block = bytearray(self.start or mark + bytes(4))
        exif_offset = self._append(block, self.exif, 0)
        self.main[_EXIF_POINTER] = _Value(_LONG, 1, struct.pack(f"{self.order}I", exif_offset), raw=True)
        struct.pack_into(f"{self.order}I", block, 4, self._append(block, self.main, self.next_directory))
        return bytes(block)

    def _append(self, block: bytearray, directory: dict[int, _Value], next_directory: int) -> int:
        """Write a directory behind the block, and its values behind it; return its offset."""
        block += bytes(len(block) % 2)
        offset = len(block)
        values_at = offset + 2 + 12 * len(directory) + 4
        values = bytearray()
        block += struct.pack(f"{self.order}H", len(directory))
        for tag, value in sorted(directory.items()):
            data = value.data
            if not value.raw and len(data) > 4:
                data = struct.pack(f"{self.order}I", values_at + len(values))
                values += value.data + bytes(len(value.data) % 2)
            block += struct.pack(f"{self.order}HHI", tag, value.kind, value.count) + data.ljust(4, b"\0")
        block += struct.pack(f"{self.order}I", next_directory) + values
        return offset


def _directory(block: bytes, order: str, offset: int) -> tuple[dict[int, _Value], int]:
    """Return the entries of a directory by tag, and the offset of the next one."""
    (count,) = struct.unpack_from(f"{order}H", block, offset)
    if offset < 8 or count > _MAX_ENTRIES:
        raise ValueError("no directory")
    entries = {}
    for number in range(count):
        tag, kind, length, data = struct.unpack_from(f"{order}HHI4s", block, offset + 2 + 12 * number)
        entries[tag] = _Value(kind, length, data, raw=True)
    (following,) = struct.unpack_from(f"{order}I", block, offset + 2 + 12 * count)
    return entries, int(following)


def _content(block: bytes, order: str, value: _Value) -> bytes:
    """Return the bytes of a value of one byte per item."""
    if value.count <= 4:
        return value.data[: value.count]
    (offset,) = struct.unpack(f"{order}I", value.data)
    return block[offset : offset + value.count]


def _comment(text: str, max_bytes: int) -> bytes | None:
    """Return the text with the name of its encoding: UTF-16, big-endian in every block, as web UIs write and read it.

    ASCII takes half the space. Returns None if there is no space for a useful part.
    """
    comment = _UNICODE + text.encode("utf-16-be")
    if len(comment) <= max_bytes:
        return comment
    if text.isascii() and len(_PLAIN) + len(text) <= max_bytes:
        return _PLAIN + text.encode("ascii")
    if max_bytes < _MIN_COMMENT_BYTES:
        return None
    prompt, _, parameters = text.rpartition("\n")
    last_line = f"\n{parameters}".encode("utf-16-be")
    space = (max_bytes - len(_UNICODE) - len(last_line)) // 2 * 2
    if space < 0:
        return None
    shortened = prompt.encode("utf-16-be")[:space].decode("utf-16-be", "ignore")
    return _UNICODE + shortened.encode("utf-16-be") + last_line
