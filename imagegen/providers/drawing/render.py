"""Rendering of a sandbox image: the same spec gives the same bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from io import BytesIO
from random import Random

from msgspec import Struct

from imagegen.providers.drawing import abstracts, landscapes
from imagegen.providers.drawing.canvas import Canvas
from imagegen.providers.drawing.caption import blur_card, lay_out, write_words
from imagegen.providers.drawing.input_thumbnails import InputThumbnails, show_inputs
from imagegen.providers.drawing.palette import PALETTES

_SCENES: tuple[Callable[[Canvas], None], ...] = (
    landscapes.ridges,
    abstracts.paper,
    landscapes.orbit,
    abstracts.tiles,
    landscapes.waves,
    abstracts.facets,
    abstracts.silk,
)
_SAVING: dict[str, dict[str, int]] = {
    "png": {"compress_level": 4},
    "jpeg": {"quality": 90, "subsampling": 0},
    "webp": {"quality": 88, "method": 2},
}


class DrawingSpec(Struct, frozen=True):
    """Parameters of a sandbox image.

    output_format: `png`, `jpeg` or `webp`. repeat: 0, or a number for another image of the same parameters.
    """

    prompt: str
    seed: int | None
    index: int
    width: int
    height: int
    output_format: str
    repeat: int = 0


class Drawing:
    """An image in four steps, each of which takes a while: call them in this order, off the event loop."""

    def __init__(self, spec: DrawingSpec) -> None:
        self._spec = spec
        self._canvas = _canvas(spec)
        self._card = lay_out(spec.width, spec.height, spec.prompt)

    def paint(self) -> None:
        """Draw the scene, without words."""
        _SCENES[(_number(self._spec.prompt) + _place(self._spec)) % len(_SCENES)](self._canvas)

    def blur_card(self) -> None:
        """Draw the glass below the words."""
        blur_card(self._canvas, self._card)

    def write_words(self) -> None:
        """Write the prompt and the mark."""
        write_words(self._canvas, self._card)

    def show_inputs(self, inputs: InputThumbnails) -> None:
        """Draw the images that the request starts from, above the words."""
        show_inputs(self._canvas, self._card.top, inputs)

    def encode(self) -> bytes:
        """Return the bytes of the file."""
        file = BytesIO()
        self._canvas.image.save(file, self._spec.output_format, **_SAVING[self._spec.output_format])
        return file.getvalue()


def _canvas(spec: DrawingSpec) -> Canvas:
    repeat = f"/{spec.repeat}" if spec.repeat else ""
    random = Random(_number(f"{spec.seed}/{spec.index}/{spec.prompt}{repeat}"))  # noqa: S311 - an image, no secret
    palette = PALETTES[(_number(spec.prompt) // 1_000 + 3 * _place(spec)) % len(PALETTES)]
    return Canvas(spec.width, spec.height, palette.turned(random.uniform(-18, 18)), random)


def _place(spec: DrawingSpec) -> int:
    """Return the number that decides scene and palette.

    Neighbours in seed or index differ in both, since the counts of scenes and palettes are prime.
    """
    return spec.repeat + spec.index if spec.seed is None else spec.seed + spec.index + 3


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])
