"""Limits of the images of clients and providers that Pillow decodes: memory, and passes over a whole image."""

from __future__ import annotations

from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from PIL import Image

MAX_DECODED_BYTES = 256 * 1024 * 1024
"""Of one image while it is decoded: 67 megapixels of a PNG, 16 of a WebP."""

MAX_SCANS = 64
"""Of a JPEG. Encoders make about ten; each one takes libjpeg as long as a pass over the whole image (50 ms for 36
megapixels), and needs only some bytes of the file:
https://libjpeg-turbo.org/pmwiki/uploads/About/TwoIssueswiththeJPEGStandard.pdf"""

_PIXEL_BYTES = 4
_WEBP_PIXEL_BYTES = 16
"""libwebp's decoder of animations, which Pillow uses for every WebP, holds two canvases, and Pillow two more."""

_SCANS_PIXEL_BYTES = 8
"""Of a JPEG with several scans libjpeg holds all coefficients: two bytes for each of four channels."""

_JPEG_FORMATS = {"JPEG", "MPO"}
"""MPO is Pillow's name for a JPEG with a list of images that follow it."""

_START_OF_SCAN = b"\xff\xda"
_COUNTED_BYTES = 1024 * 1024


def why_not_decoded(image: Image.Image, file: BinaryIO) -> str:
    """Return why an image that was opened from a file is not to be decoded, as "it has ..."; empty if it may be."""
    scans = _scans(file) if image.format in _JPEG_FORMATS else 1
    if image.width * image.height * _decoded_pixel_bytes(image, scans) > MAX_DECODED_BYTES:
        return f"it has {image.width}x{image.height} pixels, too many to be decoded"
    return "it has too many scans to be decoded" if scans > MAX_SCANS else ""


def _decoded_pixel_bytes(image: Image.Image, scans: int) -> int:
    if image.format == "WEBP":
        return _WEBP_PIXEL_BYTES
    return _SCANS_PIXEL_BYTES if scans > 1 or image.info.get("progressive") else _PIXEL_BYTES


def _scans(file: BinaryIO) -> int:
    """Return how many scans a JPEG has at most, with the one before the position, which is the same after it.

    Those of a preview in the metadata are before it.
    """
    at, count, before = file.tell(), 1, b""
    while piece := file.read(_COUNTED_BYTES):
        count += (before + piece).count(_START_OF_SCAN)
        before = piece[-1:]
    file.seek(at)
    return count
