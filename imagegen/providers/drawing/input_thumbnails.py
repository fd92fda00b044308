"""Input images in the sandbox: shown small and tinted in the image that starts from them; masks as black and white."""

from __future__ import annotations

import math
from collections.abc import Sequence
from io import BytesIO
from threading import Lock

from msgspec import Struct
from PIL import Image, ImageDraw, ImageOps

from imagegen.decoding_limits import why_not_decoded
from imagegen.providers.drawing.canvas import Canvas
from imagegen.providers.drawing.palette import WHITE

_FORMATS = ("PNG", "JPEG", "WEBP")
_NEAREST = Image.Resampling.NEAREST
_THUMBNAIL = (512, 512)
_TINT = 0.3
_MASK_COLOUR = (255, 40, 120)
_MASK_STRENGTH = 0.65

_one_at_a_time = Lock()
"""A decoded image takes up to 256 MiB."""


class UnreadableInput(ValueError):
    """The bytes of an input image can't be decoded; the text is the reason."""


class InputThumbnails(Struct, frozen=True):
    """Small copies of the input images and of the mask."""

    images: Sequence[Image.Image]
    mask: Image.Image | None = None


def thumbnail(data: bytes) -> Image.Image:
    """Return a small copy with an alpha channel. Raises UnreadableInput."""
    try:
        with _one_at_a_time, _opened(data) as file:
            file.draft("RGB", _THUMBNAIL)
            image = file if file.mode in ("RGB", "RGBA", "L") else file.resize(_fitting(file.size), _NEAREST)
            image.thumbnail(_THUMBNAIL)
            return image.convert("RGBA")
    except UnreadableInput:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UnreadableInput("its pixels are broken") from error


def white_where_changed(mask: bytes) -> bytes:
    """Return a mask as a grey PNG that is white where the image is to be changed.

    A mask with transparent parts is changed there, as in OpenAI's API; one without is white there already.

    Raises: UnreadableInput.
    """
    try:
        with _one_at_a_time, _opened(mask) as image:
            grey = _changed(image)
    except UnreadableInput:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UnreadableInput("its pixels are broken") from error
    file = BytesIO()
    grey.save(file, "png", compress_level=1)
    return file.getvalue()


def _opened(data: bytes) -> Image.Image:
    """Return an image that is not decoded yet. Raises UnreadableInput, and what Pillow raises."""
    file = BytesIO(data)
    image = Image.open(file, formats=_FORMATS)
    if reason := why_not_decoded(image, file):
        image.close()
        raise UnreadableInput(reason)
    return image


def _fitting(size: tuple[int, int]) -> tuple[int, int]:
    """Return a size of the same shape that is no larger than a thumbnail."""
    scale = min(1.0, *(most / side for most, side in zip(_THUMBNAIL, size, strict=True)))
    return max(round(size[0] * scale), 1), max(round(size[1] * scale), 1)


def show_inputs(canvas: Canvas, bottom: int, inputs: InputThumbnails) -> None:
    """Draw the images in a grid above `bottom`, tinted in the colours of the scene; the mask lies over the first."""
    margin = max(2, round(canvas.unit * 0.04))
    width, height = canvas.width - 2 * margin, max(bottom, canvas.height // 4) - 2 * margin
    count = len(inputs.images)
    if not count or width < count or height < 8:
        return
    columns = _columns(count, width, height)
    rows = math.ceil(count / columns)
    gap = max(1, margin // 2)
    side = (max((width - gap * (columns - 1)) // columns, 4), max((height - gap * (rows - 1)) // rows, 4))
    for place, image in enumerate(inputs.images):
        row, column = divmod(place, columns)
        shown = _tinted(image, canvas.palette.accent)
        if place == 0 and inputs.mask is not None:
            shown = _with_mask(shown, inputs.mask)
        shown = ImageOps.contain(shown, side, Image.Resampling.BICUBIC)
        at = (margin + column * (side[0] + gap), margin + row * (side[1] + gap))
        canvas.image.paste(shown, at, shown)
        box = (at[0], at[1], at[0] + shown.width - 1, at[1] + shown.height - 1)
        ImageDraw.Draw(canvas.image).rectangle(box, outline=WHITE, width=max(1, margin // 8))


def _columns(count: int, width: int, height: int) -> int:
    """Return how many columns give the largest cells."""

    def side(columns: int) -> float:
        return min(width / columns, height / math.ceil(count / columns))

    return max(range(1, count + 1), key=side)


def _tinted(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    tinted = Image.blend(image.convert("RGB"), Image.new("RGB", image.size, colour), _TINT)
    tinted.putalpha(image.getchannel("A"))
    return tinted


def _with_mask(image: Image.Image, mask: Image.Image) -> Image.Image:
    changed = _changed(mask).resize(image.size).point([round(v * _MASK_STRENGTH) for v in range(256)])
    over = Image.new("RGBA", image.size, (*_MASK_COLOUR, 255))
    return Image.composite(over, image, changed)


def _changed(mask: Image.Image) -> Image.Image:
    """Return in grey how much of the image is to be changed where."""
    alpha = mask.convert("RGBA").getchannel("A") if mask.has_transparency_data else None
    if alpha is not None and alpha.histogram()[255] < alpha.width * alpha.height:
        return ImageOps.invert(alpha)
    return mask.convert("L")
