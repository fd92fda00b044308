"""Image files in memory for tests of several packages."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from typing import Any

from PIL import Image


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """Return the bytes of an image file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def image_file(colour: Any = "teal", kind: str = "PNG", size: tuple[int, int] = (24, 16), mode: str = "RGB") -> bytes:
    """Return a file of one colour."""
    return encoded(Image.new(mode, size, colour), kind)


def decoded(data: bytes) -> Image.Image:
    """Return the image of a file, whole in memory."""
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def data_uri(data: bytes, kind: str = "png") -> str:
    """Return the `data:` URI of an image file."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def with_scans(count: int, size: int = 64, *, progressive: bool = False, claims_more: bool = False) -> bytes:
    """Return a JPEG with this many more scans, each of some bytes. claims_more: it says that another image follows."""
    data = encoded(Image.new("RGB", (size, size), (9, 90, 200)), "JPEG", progressive=progressive)
    first = data.index(b"\xff\xda")
    if progressive:
        head, scan = data[:-2], data[data.rindex(b"\xff\xda") : -2]
    else:  # one channel in each scan, so that libjpeg keeps the whole image for the others
        head, scan = data[:first], bytes.fromhex("ffda 0008 01 01 00 00 3f 00 00")
    if claims_more:
        images = struct.pack(">IIIHH", 0x30000, len(data), 0, 0, 0) * 2
        tags = struct.pack(">HHI4s", 0xB000, 7, 4, b"0100") + struct.pack(">HHII", 0xB001, 4, 1, 2)
        tags += struct.pack(">HHII", 0xB002, 7, len(images), 8 + 2 + 3 * 12 + 4)
        listing = b"MPF\0MM\0*\0\0\0\x08\0\x03" + tags + bytes(4) + images
        head = head[:2] + b"\xff\xe2" + struct.pack(">H", 2 + len(listing)) + listing + head[2:]
    return head + scan * count + data[-2:]


def deflated_zeros(length: int, times: int) -> bytes:
    """Return a zlib stream of `times * length` zeros. Compressing them all takes 1.4 s for 268 MB."""
    zeros, check, blocks = bytes(length), 1, zlib.compressobj(9, zlib.DEFLATED, -15)
    block = blocks.compress(zeros) + blocks.flush(zlib.Z_FULL_FLUSH)
    for _ in range(times):
        check = zlib.adler32(zeros, check)
    return b"\x78\xda" + block * times + blocks.flush() + check.to_bytes(4, "big")


def black_webp(width: int, height: int) -> bytes:
    """Return a lossless black WebP of any size, which Pillow needs 0.6 s for 48 megapixels to encode."""
    size = (width - 1 | (height - 1) << 14).to_bytes(4, "little")
    return bytes.fromhex("524946461a000000574542505650384c0e0000002f") + size + bytes.fromhex("071011fd0f4444ff03")


def png_chunk(kind: bytes, data: bytes) -> bytes:
    """Return a chunk with its length and its checksum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_file(
    width: int, height: int, stream: bytes, *, depth: int = 8, colour_type: int = 2, before: bytes = b""
) -> bytes:
    """Return a PNG with any header and any compressed stream. before: chunks between the two."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + before + png_chunk(b"IDAT", stream) + png_chunk(b"IEND", b"")
