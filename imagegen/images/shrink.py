"""Making of a thumbnail with Pillow, within bounded memory for any file.

Pillow is imported at the first thumbnail: it costs start time and memory that only those who use it should pay.
"""

from __future__ import annotations

import io
import warnings
from functools import cache
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from imagegen.decoding_limits import why_not_decoded

if TYPE_CHECKING:
    from PIL import Image

QUALITIES = (82, 65, 45, 25)
MAX_BYTES_PER_PIXEL = 0.3
"""Limit of the file of a square thumbnail: 20 KB for 256 pixels. A file over it is made with a lower quality."""

STRIP_PIXELS = 1_000_000
"""Pixels of a large image that are converted at once."""

MARGIN = 3
"""Pixels of the first, coarse reduction for one of the thumbnail; a better filter does the rest."""

MAX_PROFILE_BYTES = 4_096
"""A larger colour profile is left out; most have some hundred bytes."""

_ORIENTATION = 0x0112
_WIDE_MODES = {"I;16", "I;16B", "I;16L", "I;16N", "I"}


class NoThumbnail(ValueError):
    """The file can't be decoded, or not within the limit of memory."""


class NoThumbnailNow(Exception):
    """This machine lacks memory or descriptors, or could not read the file: a later try may succeed."""


class Thumbnail(NamedTuple):
    """A WebP file and its size in pixels."""

    data: bytes
    width: int
    height: int


def shrink(source: bytes | BinaryIO, size: int) -> Thumbnail:
    """Return a WebP of the first frame with at most `size` pixels on its longer side, never enlarged.

    It is turned by the EXIF orientation. Blocks. Raises NoThumbnail, NoThumbnailNow.
    """
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        image, profile = _shrunk(file, size)
        return Thumbnail(_encoded(image, profile, size), image.width, image.height)
    except Exception as error:  # a decoder may raise anything for a hostile file
        text = str(error) or type(error).__name__
        is_own_fault = isinstance(error, MemoryError | ImportError) or getattr(error, "errno", None) is not None
        raise (NoThumbnailNow if is_own_fault else NoThumbnail)(text) from error


@cache
def _load_pillow() -> None:
    """Import Pillow's decoder of WebP, which it does not register otherwise, and silence it about odd files."""
    import PIL.WebPImagePlugin  # noqa: F401, PLC0415

    warnings.filterwarnings("ignore", module=r"PIL\.")


def _shrunk(file: BinaryIO, size: int) -> tuple[Image.Image, bytes]:
    """Return the small image, turned, and its colour profile."""
    _load_pillow()
    from PIL import Image, ImageOps  # noqa: PLC0415

    with Image.open(file, formats=("PNG", "JPEG", "WEBP")) as image:
        if reason := why_not_decoded(image, file):
            raise NoThumbnail(reason)
        orientation = _orientation(image)
        image.draft("RGB", (MARGIN * size, MARGIN * size))
        image.load()
        profile = image.info.get("icc_profile") or b""
        if image.mode not in ("RGB", "RGBA", "P") or len(profile) > MAX_PROFILE_BYTES:
            profile = b""
        small = _reduced(image, size)
    small.thumbnail((size, size), Image.Resampling.LANCZOS)
    small.getexif()[_ORIENTATION] = orientation
    return ImageOps.exif_transpose(small), profile


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # noqa: BLE001 - broken EXIF does not make the image unusable
        return 1


def _reduced(image: Image.Image, size: int) -> Image.Image:
    """Return the image as RGB or RGBA, reduced by a whole factor to at least MARGIN times the size.

    It is converted in strips, so that an image is in memory as a whole only in its own mode.
    """
    from PIL import Image  # noqa: PLC0415

    mode = "RGBA" if image.has_transparency_data else "RGB"
    factor = max(image.size) // (MARGIN * size)
    if factor <= 1:
        return _converted(image, mode)
    width, height = image.size
    reduced = Image.new(mode, (-(-width // factor), -(-height // factor)))
    rows = max(STRIP_PIXELS // width // factor, 1) * factor
    for top in range(0, height, rows):
        strip = image.crop((0, top, width, min(top + rows, height)))
        reduced.paste(_converted(strip, mode).reduce(factor), (0, top // factor))
    return reduced


def _converted(image: Image.Image, mode: str) -> Image.Image:
    """Return the image in a mode of 8 bits; 16 bits are scaled, where `convert` alone would cut them."""
    if image.mode in _WIDE_MODES:
        image = image.point(lambda value: value * (1 / 256)).convert("L")
    return image if image.mode == mode else image.convert(mode)


def _encoded(image: Image.Image, profile: bytes, size: int) -> bytes:
    """Return the WebP, at the best quality for which the file is small enough."""
    data = b""
    for quality in QUALITIES:
        file = io.BytesIO()
        image.save(file, "WEBP", quality=quality, method=4, exif=b"", icc_profile=profile)
        data = file.getvalue()
        if len(data) <= size * size * MAX_BYTES_PER_PIXEL:
            break
    return data
