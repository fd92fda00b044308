"""Owns what counts as a picture: whole PNG, JPEG and WebP files, told by their bytes and walked without decoding."""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from zlib import crc32

from imagegen.images.store import VerifiedImage

MAX_SIDE = 16_384
MAX_PARTS = 65_536
"""Chunks or segments in one file: keeps the walk over a hostile file short."""

_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_PNG_DEPTHS = {0: {1, 2, 4, 8, 16}, 2: {8, 16}, 3: {1, 2, 4, 8}, 4: {8, 16}, 6: {8, 16}}
_PNG_CRITICAL = {b"IHDR", b"PLTE", b"IDAT", b"IEND"}

_SOI, _EOI, _SOS = 0xD8, 0xD9, 0xDA
_JPEG_FRAMES = {0xC0, 0xC1, 0xC2, 0xC3, 0xC9, 0xCA, 0xCB}
_JPEG_MARKER = re.compile(rb"\xff+([^\xff])")
_JPEG_SCAN_END = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_LOOK_BYTES = 1_024


class NotAnImage(ValueError):
    """The bytes are no whole picture; the text says why and reads well after "the picture can't be used:"."""


@dataclass(frozen=True, slots=True)
class _Found:
    """What a walk learned; the picture ends at byte `end`."""

    content_type: str
    width: int
    height: int
    end: int


def sniff(data: bytes) -> VerifiedImage:
    """Checks that `data` is one whole picture. Raises NotAnImage.

    What follows the picture's end is cut off, so that nothing but the picture is ever served.
    """
    walk = _walk_for(data)
    try:
        found = walk(data)
    except struct.error as error:
        raise NotAnImage("it is cut off") from error
    if not (0 < found.width <= MAX_SIDE and 0 < found.height <= MAX_SIDE):
        raise NotAnImage(f"it has {found.width}x{found.height} pixels; a side may have 1 to {MAX_SIDE}")
    picture = data if found.end == len(data) else data[: found.end]
    digest = hashlib.sha256(picture).hexdigest()
    return VerifiedImage(found.content_type, len(picture), found.width, found.height, digest, picture)


def _walk_for(data: bytes) -> Callable[[bytes], _Found]:
    if data.startswith(_PNG_MAGIC):
        return _walk_png
    if data.startswith(b"\xff\xd8\xff"):
        return _walk_jpeg
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return _walk_webp
    if not data:
        raise NotAnImage("it is empty")
    raise NotAnImage(_what_else(data[:_LOOK_BYTES]))


def _what_else(start: bytes) -> str:
    text = start.removeprefix(_BYTE_ORDER_MARK).lstrip().lower()
    if text.startswith(b"<"):
        return "it is an SVG, not a PNG, JPEG or WebP" if b"<svg" in text else "it is an HTML or XML page"
    if text.startswith(b"gif8"):
        return "it is a GIF, not a PNG, JPEG or WebP"
    return "it is JSON" if text.startswith((b"{", b"[")) else "it is not a PNG, JPEG or WebP"


def _walk_png(data: bytes) -> _Found:
    """https://www.w3.org/TR/png-3/#5DataRep"""
    width, height, depth, colour, *methods = struct.unpack_from(">IIBBBBB", data, 16)
    if depth not in _PNG_DEPTHS.get(colour, ()) or methods[0] or methods[1] or methods[2] > 1:
        raise NotAnImage("its PNG header is broken")
    palette, pixel_bytes = False, 0
    for kind, length, end in _png_chunks(data):
        palette = palette or kind == b"PLTE"
        if kind == b"IDAT":
            pixel_bytes += length
        elif kind == b"IEND":
            if not pixel_bytes or length or (colour == 3 and not palette):
                raise NotAnImage("the PNG has no picture in it")
            return _Found("image/png", width, height, end)
    raise NotAnImage("it has too many parts")


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Name, length and end of each chunk, after its check sum was compared."""
    view, at = memoryview(data), len(_PNG_MAGIC)
    for number in range(MAX_PARTS):
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length
        (check_sum,) = struct.unpack_from(">I", data, end - 4)
        if (kind == b"IHDR") != (number == 0) or (number == 0 and length != 13):
            raise NotAnImage("its PNG header is broken")
        if crc32(view[at + 4 : end - 4]) != check_sum:
            raise NotAnImage("a check sum in the PNG is wrong")
        if not kind[0] & 0x20 and kind not in _PNG_CRITICAL:
            raise NotAnImage("the PNG has a chunk that no reader knows")
        yield kind, length, end
        at = end


def _walk_jpeg(data: bytes) -> _Found:
    """https://www.w3.org/Graphics/JPEG/itu-t81.pdf, annex B"""
    size, scans, at = None, 0, 2
    for _ in range(MAX_PARTS):
        marker, at = _jpeg_marker(data, at)
        if marker == _EOI:
            if size is None or not scans:
                raise NotAnImage("the JPEG has no picture in it")
            return _Found("image/jpeg", *size, at)
        (length,) = struct.unpack_from(">H", data, at)
        if marker < 0xC0 or 0xD0 <= marker <= _SOI or length < 2 or (marker in _JPEG_FRAMES and size):
            raise NotAnImage("its JPEG markers are broken")
        if marker in _JPEG_FRAMES:
            size = _jpeg_size(data, at, length)
        at += length
        if marker == _SOS:
            if size is None:
                raise NotAnImage("its JPEG markers are broken")
            at, scans = _jpeg_scan_end(data, at), scans + 1
    raise NotAnImage("it has too many parts")


def _jpeg_marker(data: bytes, at: int) -> tuple[int, int]:
    """The marker at `at` (any number of fill bytes before it is legal) and the place after it."""
    match = _JPEG_MARKER.match(data, at)
    if match is None:
        raise NotAnImage("it is cut off" if at >= len(data) - 1 else "its JPEG markers are broken")
    return match[1][0], match.end()


def _jpeg_size(data: bytes, at: int, length: int) -> tuple[int, int]:
    _, height, width, components = struct.unpack_from(">BHHB", data, at + 2)
    if components not in (1, 2, 3, 4) or length != 8 + 3 * components:
        raise NotAnImage("its JPEG header is broken")
    return width, height


def _jpeg_scan_end(data: bytes, at: int) -> int:
    """The first marker after the pixels of a scan; stuffed zeros and restart markers are within them."""
    match = _JPEG_SCAN_END.search(data, at)
    if match is None:
        raise NotAnImage("it is cut off")
    if match.start() == at:
        raise NotAnImage("the JPEG has no picture in it")
    return match.start()


def _walk_webp(data: bytes) -> _Found:
    """https://developers.google.com/speed/webp/docs/riff_container"""
    (riff_bytes,) = struct.unpack_from("<I", data, 4)
    end = 8 + riff_bytes
    if end > len(data):
        raise NotAnImage("it is cut off")
    chunks = list(_webp_chunks(data, end))
    first, at, length = chunks[0] if chunks else (b"", 12, 0)
    if first in _WEBP_FRAMES:
        width, height = _WEBP_FRAMES[first](data, at, length)
    elif first == b"VP8X" and length >= 10:
        width, height = _webp_canvas(data, at, chunks)
    else:
        raise NotAnImage("the WebP has no picture in it")
    return _Found("image/webp", width, height, end)


def _webp_chunks(data: bytes, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Name, start of the content and its length, for each chunk."""
    at = 12
    for _ in range(MAX_PARTS):
        if at >= end:
            return
        kind, length = struct.unpack_from("<4sI", data, at)
        if at + 8 + length > end:
            raise NotAnImage("its WebP chunks are broken")
        yield kind, at + 8, length
        at += 8 + length + length % 2
    raise NotAnImage("it has too many parts")


def _webp_canvas(data: bytes, at: int, chunks: list[tuple[bytes, int, int]]) -> tuple[int, int]:
    flags, width, height = struct.unpack_from("<I3s3s", data, at)
    canvas = int.from_bytes(width, "little") + 1, int.from_bytes(height, "little") + 1
    animated = flags & 0x02
    for kind, start, length in chunks:
        if kind == b"ANMF" and animated and length > 16 + 8:
            return canvas
        if kind in _WEBP_FRAMES and not animated:
            if _WEBP_FRAMES[kind](data, start, length) != canvas:
                raise NotAnImage("its WebP header is broken")
            return canvas
    raise NotAnImage("the WebP has no picture in it")


def _vp8_size(data: bytes, at: int, length: int) -> tuple[int, int]:
    """https://www.rfc-editor.org/rfc/rfc6386#section-9.1"""
    tag_low, tag_high, start_code, width, height = struct.unpack_from("<HB3sHH", data, at)
    first_partition_bytes = (tag_high << 16 | tag_low) >> 5
    if tag_low & 1 or start_code != b"\x9d\x01\x2a" or 10 + first_partition_bytes > length:
        raise NotAnImage("its WebP header is broken")
    return width & 0x3FFF, height & 0x3FFF


def _vp8l_size(data: bytes, at: int, length: int) -> tuple[int, int]:
    """https://developers.google.com/speed/webp/docs/webp_lossless_bitstream_specification"""
    signature, bits = struct.unpack_from("<BI", data, at)
    if signature != 0x2F or bits >> 29 or length < 6:
        raise NotAnImage("its WebP header is broken")
    return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1


_WEBP_FRAMES = {b"VP8 ": _vp8_size, b"VP8L": _vp8l_size}
