"""Small valid images, a different one for each (prompt, seed, index), at next to no cost."""

from __future__ import annotations

import hashlib
import struct
import zlib
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from typing import Final

CONTENT_TYPES: Final = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}

# 32 characters in the cached file that each image's own digest takes the place of.
_MARK: Final = b"0123456789abcdef_imagegen_digest"


@dataclass(frozen=True, slots=True)
class DrawnImage:
    """An image to draw. `digest` is 32 hexadecimal digits of what it shows."""

    format: str
    width: int
    height: int
    digest: str

    @property
    def content_type(self) -> str:
        return CONTENT_TYPES[self.format]


def digest_of(prompt: str, seed: int, index: int) -> str:
    return hashlib.md5(f"{seed}:{index}:{prompt}".encode(), usedforsecurity=False).hexdigest()


def draw(image: DrawnImage) -> bytes:
    if image.format == "png":
        return _png(image)
    variant = int(image.digest[0], 16)
    return _drawn_by_pillow(image.format, image.width, image.height, variant).replace(_MARK, image.digest.encode())


def _png(image: DrawnImage) -> bytes:
    """Return sixteen bands of colour; the pixels are cached by size, so only the palette is made for each."""
    colours = hashlib.shake_128(image.digest.encode()).digest(48)
    header = struct.pack(">IIBBBBB", image.width, image.height, 4, 3, 0, 0, 0)
    return b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            _chunk(b"IHDR", header),
            _chunk(b"PLTE", colours),
            _chunk(b"tEXt", b"Comment\0" + image.digest.encode()),
            _bands(image.width, image.height),
            _chunk(b"IEND", b""),
        )
    )


@lru_cache(maxsize=256)
def _bands(width: int, height: int) -> bytes:
    indices = [x * 15 // max(1, width - 1) for x in range(width)] + [0]
    row = bytes(left << 4 | right for left, right in zip(indices[: width + width % 2 : 2], indices[1::2], strict=False))
    return _chunk(b"IDAT", zlib.compress((b"\0" + row) * height, 1))


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@lru_cache(maxsize=512)
def _drawn_by_pillow(kind: str, width: int, height: int, variant: int) -> bytes:
    from PIL import Image  # noqa: PLC0415 - a benchmark's upstream draws PNG only and starts faster without it

    grey = Image.linear_gradient("L").resize((width, height))
    hue = Image.new("L", (width, height), variant * 16)
    image = Image.merge("HSV", (hue, Image.new("L", (width, height), 180), grey)).convert("RGB")
    out = BytesIO()
    if kind == "webp":
        image.save(out, "WEBP", quality=60, method=0, xmp=_MARK)
    else:
        image.save(out, "JPEG", quality=70, comment=_MARK)
    return out.getvalue()
