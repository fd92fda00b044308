"""Strokes that every scene is made of: gradients, smooth-edged shapes, glows, soft fields."""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random

from PIL import Image, ImageChops, ImageDraw, ImageFilter

from imagegen.providers.drawing.palette import Palette, Rgb

Point = tuple[float, float]
Box = tuple[int, int, int, int]

_FINE = 2
"""Masks are drawn this many times larger and shrunk, so that edges are smooth."""

_PARTS = [min(value / 181, 1.0) for value in range(256)]
"""Of the radius, for each value of Pillow's radial gradient: it is 181 where the circle touches the sheet's edge."""


class Canvas:
    """An image in the making.

    unit: the shorter side in pixels, the measure of everything drawn; random: decides the rest.
    """

    def __init__(self, width: int, height: int, palette: Palette, random: Random) -> None:
        self.width = width
        self.height = height
        self.unit = min(width, height)
        self.palette = palette
        self.random = random
        self.image = Image.new("RGB", (width, height), palette.shade(0))

    def gradient(self, colours: Sequence[Rgb]) -> Image.Image:
        """Return a sheet of the image's size that runs through the colours from top to bottom."""
        column = Image.new("RGB", (1, len(colours)))
        column.putdata(colours)
        blended = column.resize((1, self.height), Image.Resampling.BICUBIC)  # in a tenth of the time of a whole sheet
        return blended.resize((self.width, self.height), Image.Resampling.NEAREST)

    def mesh(self, columns: int, colours: Sequence[Rgb]) -> Image.Image:
        """Return a sheet of the image's size that blends a grid of colours, given row by row."""
        grid = Image.new("RGB", (columns, len(colours) // columns))
        grid.putdata(colours)
        return grid.resize((self.width, self.height), Image.Resampling.BICUBIC)

    def field(self, per_unit: float) -> Image.Image:
        """Return smooth random heights, 0 to 1, that many to the unit, in mode F: eight bits would show as terraces.

        The grid is turned, since its own directions would show.
        """
        count = math.ceil(math.hypot(self.width, self.height) / self.unit * per_unit) + 6
        grid = Image.new("F", (count, count))
        grid.putdata([self.random.random() for _ in range(count * count)])
        angle, scale = self.random.uniform(0.35, 1.2), per_unit / self.unit
        cos, sin = scale * math.cos(angle), scale * math.sin(angle)
        right = count / 2 - (cos * self.width - sin * self.height) / 2
        down = count / 2 - (sin * self.width + cos * self.height) / 2
        turn = (cos, -sin, right, sin, cos, down)
        return grid.transform((self.width, self.height), Image.Transform.AFFINE, turn, Image.Resampling.BICUBIC)

    def cover(self, sheet: Image.Image) -> None:
        """Paint over everything."""
        self.image.paste(sheet)

    def polygon(self, points: Sequence[Point], fill: Rgb | Image.Image, opacity: float = 1.0) -> None:
        """Draw a shape with smooth edges, filled with a colour or with its part of a sheet."""
        box = self._box(points)
        if box is None:
            return
        mask = Image.new("L", ((box[2] - box[0]) * _FINE, (box[3] - box[1]) * _FINE))
        moved = [((x - box[0]) * _FINE, (y - box[1]) * _FINE) for x, y in points]
        ImageDraw.Draw(mask).polygon(moved, fill=round(255 * opacity))
        self._fill(fill, box, mask.reduce(_FINE))

    def disc(self, centre: Point, radius: float, fill: Rgb | Image.Image, opacity: float = 1.0) -> None:
        """Draw a filled circle."""
        box = self._box_around(centre, radius)
        if box is not None:
            self._fill(fill, box, _disc_mask(box, centre, radius, opacity))

    def round_off(self, centre: Point, radius: float) -> None:
        """Make a disc a ball: lit from the upper left, dark on its far side."""
        box = self._box_around(centre, radius)
        if box is None:
            return
        lit, reach = (centre[0] - radius * 0.5, centre[1] - radius * 0.45), radius * 1.9
        darkening = [round(255 * part**1.6) for part in _PARTS]
        night = _radial(darkening, box, lit, reach)
        self._fill(self.palette.shade(0), box, ImageChops.multiply(night, _disc_mask(box, centre, radius, 0.95)))

    def lines(self, paths: Sequence[Sequence[Point]], width: float, fill: Rgb, opacity: float = 1.0) -> None:
        """Draw curves of one colour; where they cross, they are not darker."""
        reach = width / 2 + 1
        box = self._box([(x + by, y + by) for path in paths for x, y in path for by in (-reach, reach)])
        if box is None:
            return
        mask = Image.new("L", ((box[2] - box[0]) * _FINE, (box[3] - box[1]) * _FINE))
        draw = ImageDraw.Draw(mask)
        for path in paths:
            moved = [((x - box[0]) * _FINE, (y - box[1]) * _FINE) for x, y in path]
            draw.line(moved, fill=round(255 * opacity), width=max(1, round(width * _FINE)))
        self._fill(fill, box, mask.reduce(_FINE))

    def glow(self, centre: Point, radius: float, colour: Rgb, strength: float = 1.0) -> None:
        """Draw a light that fades from the centre to nothing at the radius."""
        box = self._box_around(centre, radius)
        if box is not None:
            fading = [round(255 * strength * (1 - part) ** 2) for part in _PARTS]
            self._fill(colour, box, _radial(fading, box, centre, radius))

    def shade_under(self, mask: Image.Image, blur: float, drop: float) -> None:
        """Draw the soft shadow that a sheet with this mask throws below."""
        small = mask.reduce(4) if self.unit >= 256 else mask
        part = small.width / mask.width
        soft = small.filter(ImageFilter.GaussianBlur(blur * part)).resize(mask.size, Image.Resampling.BILINEAR)
        faint = soft.point([round(v * 0.5) for v in range(256)])
        fallen = faint.copy()
        fallen.paste(faint, (0, round(drop)))
        self.image.paste(self.palette.shade(0), (0, 0), fallen)

    def _fill(self, fill: Rgb | Image.Image, box: Box, mask: Image.Image) -> None:
        self.image.paste(fill.crop(box) if isinstance(fill, Image.Image) else fill, box, mask)

    def _box_around(self, centre: Point, radius: float) -> Box | None:
        x, y = centre
        return self._box([(x - radius, y - radius), (x + radius, y + radius)])

    def _box(self, points: Sequence[Point]) -> Box | None:
        """Return the whole pixels that the points span, inside the image; None if empty."""
        left = max(0, int(min(x for x, _ in points)) - 1)
        top = max(0, int(min(y for _, y in points)) - 1)
        right = min(self.width, int(max(x for x, _ in points)) + 2)
        bottom = min(self.height, int(max(y for _, y in points)) + 2)
        return (left, top, right, bottom) if left < right and top < bottom else None


def _disc_mask(box: Box, centre: Point, radius: float, opacity: float) -> Image.Image:
    mask = Image.new("L", ((box[2] - box[0]) * _FINE, (box[3] - box[1]) * _FINE))
    left, top = (centre[0] - radius - box[0]) * _FINE, (centre[1] - radius - box[1]) * _FINE
    span = 2 * radius * _FINE
    ImageDraw.Draw(mask).ellipse((left, top, left + span, top + span), fill=round(255 * opacity))
    return mask.reduce(_FINE)


def _radial(curve: Sequence[int], box: Box, centre: Point, radius: float) -> Image.Image:
    """Return the box's part of a round gradient. curve: its 256 values from the centre to the radius."""
    gradient = Image.radial_gradient("L").point(list(curve))
    per_pixel = 256 / (2 * radius)
    left, top = centre[0] - radius, centre[1] - radius
    source = (
        max(0.0, (box[0] - left) * per_pixel),
        max(0.0, (box[1] - top) * per_pixel),
        min(256.0, (box[2] - left) * per_pixel),
        min(256.0, (box[3] - top) * per_pixel),
    )
    return gradient.resize((box[2] - box[0], box[3] - box[1]), Image.Resampling.BILINEAR, box=source)
