"""Places in an image file where its parameters go: pure decisions from its headers; no pixel is touched or read."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from imagegen.images.exif import parameters_block
from imagegen.images.sniff import MAX_PARTS
from imagegen.images.store import PIECE_BYTES

Read = Callable[[int, int], bytes]
"""`read(offset, length)` returns these bytes of the file; fewer at its end."""

MAX_BLOCK_BYTES = 1024 * 1024
"""Of an EXIF block in a WebP file, which sets no limit."""

_PNG_START_BYTES = 8 + 25
_PNG_TEXTS = {b"tEXt", b"iTXt", b"zTXt"}
_KEYWORD = b"parameters\0"
_EXIF_MARK = b"Exif\0\0"
_APP0, _APP1, _APP15, _COM = 0xE0, 0xE1, 0xEF, 0xFE
_MAX_SEGMENT_BYTES = 65_533
_HAS_EXIF, _HAS_ALPHA = 0x08, 0x10


class Splice(NamedTuple):
    """A change of a file: `inserted` in place of the `removed` bytes at `offset`."""

    offset: int
    removed: int
    inserted: bytes


def splices(content_type: str, read: Read, text: str, description: str) -> list[Splice]:
    """Return the changes that put `text` into a checked image file; none if it has such a text or no place for it.

    PNG gets a text chunk `parameters`; JPEG and WebP get EXIF, with `text` as comment and `description` as title.
    """
    match content_type:
        case "image/png":
            return _png(read, text)
        case "image/jpeg":
            return _jpeg(read, text, description)
        case "image/webp":
            return _webp(read, text, description)
    return []


def spliced(read: Read, size_bytes: int, changes: Sequence[Splice]) -> Iterator[bytes]:
    """Yield the changed file in pieces. changes: sorted by offset."""
    at = 0
    for change in [*changes, Splice(size_bytes, 0, b"")]:
        while at < change.offset:
            piece = read(at, min(PIECE_BYTES, change.offset - at))
            if not piece:
                raise OSError("an image file ended early")
            yield piece
            at += len(piece)
        if change.inserted:
            yield change.inserted
        at += change.removed


def _png(read: Read, text: str) -> list[Splice]:
    """Return the text chunk to insert: https://www.w3.org/TR/png-3/#11textinfo"""
    at = _PNG_START_BYTES
    for _ in range(MAX_PARTS):
        length, kind = struct.unpack(">I4s", read(at, 8))
        if kind in (b"IDAT", b"IEND"):
            break
        if kind in _PNG_TEXTS and read(at + 8, len(_KEYWORD)) == _KEYWORD:
            return []
        at += length + 12
    try:
        chunk = b"tEXt" + _KEYWORD + text.encode("latin-1")
    except UnicodeEncodeError:
        chunk = b"iTXt" + _KEYWORD + b"\0\0\0\0" + text.encode()
    framed = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return [Splice(_PNG_START_BYTES, 0, framed)]


def _jpeg(read: Read, text: str, description: str) -> list[Splice]:
    """Return the Exif segment to insert behind the JFIF header, which is first: https://www.w3.org/Graphics/JPEG/jfif3.pdf"""
    at = place = 2
    existing, removed = b"", 0
    for _ in range(MAX_PARTS):
        fill, marker, length = struct.unpack(">BBH", read(at, 4))
        if marker == 0xFF:
            at += 1
            continue
        if fill != 0xFF or not (_APP0 <= marker <= _APP15 or marker == _COM):
            break
        if marker == _APP0 and at == place:
            place = at + 2 + length
        if marker == _APP1 and read(at + 4, len(_EXIF_MARK)) == _EXIF_MARK:
            place, removed = at, length + 2
            existing = read(at + 4 + len(_EXIF_MARK), length - 2 - len(_EXIF_MARK))
            break
        at += 2 + length
    block = parameters_block(existing, text, description, _MAX_SEGMENT_BYTES - len(_EXIF_MARK))
    if block is None:
        return []
    segment = struct.pack(">BBH", 0xFF, _APP1, 2 + len(_EXIF_MARK) + len(block)) + _EXIF_MARK + block
    return [Splice(place, removed, segment)]


def _webp(read: Read, text: str, description: str) -> list[Splice]:
    """Return the chunks to change: https://developers.google.com/speed/webp/docs/riff_container#extended_file_format"""
    end = int.from_bytes(read(4, 4), "little") + 8
    place, existing, removed = end, b"", 0
    at = 12
    while at + 8 <= end:
        kind, length = struct.unpack("<4sI", read(at, 8))
        padded = 8 + length + length % 2
        if kind == b"EXIF":
            place, existing, removed = at, read(at + 8, min(length, MAX_BLOCK_BYTES + 1)), min(padded, end - at)
            break
        if kind == b"XMP " and place == end:
            place = at
        at += padded
    block = None
    if len(existing) <= MAX_BLOCK_BYTES:
        block = parameters_block(existing.removeprefix(_EXIF_MARK), text, description, MAX_BLOCK_BYTES)
    if block is None:
        return []
    missing_pad = b"\0" if place == end and at > end else b""
    chunk = missing_pad + _riff_chunk(b"EXIF", block)
    changes = [_webp_header(read), Splice(place, removed, chunk)]
    size = end - 8 + sum(len(change.inserted) - change.removed for change in changes)
    return [Splice(4, 4, struct.pack("<I", size)), *changes]


def _webp_header(read: Read) -> Splice:
    """Return the change of the header: a flag in an extended file; a simple file becomes an extended one."""
    kind, start = read(12, 4), read(20, 10)
    if kind == b"VP8X":
        return Splice(20, 1, bytes([start[0] | _HAS_EXIF]))
    flags = _HAS_EXIF
    if kind == b"VP8L":
        bits = int.from_bytes(start[1:5], "little")
        width, height = bits & 0x3FFF, bits >> 14 & 0x3FFF
        flags |= _HAS_ALPHA if bits >> 28 & 1 else 0
    else:
        width, height = (int.from_bytes(start[at : at + 2], "little") & 0x3FFF for at in (6, 8))
        width, height = width - 1, height - 1
    extended = struct.pack("<I", flags) + width.to_bytes(3, "little") + height.to_bytes(3, "little")
    return Splice(12, 0, _riff_chunk(b"VP8X", extended))


def _riff_chunk(kind: bytes, data: bytes) -> bytes:
    return kind + struct.pack("<I", len(data)) + data + bytes(len(data) % 2)
