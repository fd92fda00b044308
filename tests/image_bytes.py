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


def png_chunk(kind: bytes, data: bytes) -> bytes:
    """Return a chunk with its length and its checksum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_file(
    width: int, height: int, stream: bytes, *, depth: int = 8, colour_type: int = 2, before: bytes = b""
) -> bytes:
    """Return a PNG with any header and any compressed stream. before: chunks between the two."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + before + png_chunk(b"IDAT", stream) + png_chunk(b"IEND", b"")
