"""Limits of a model's image sizes, and the allowed size that is nearest to another one."""

from __future__ import annotations

import math
from decimal import Decimal
from functools import cached_property

from msgspec import Struct

_MAX_ROUNDS = 4
"""Each repair of one limit may break another by one step of `multiple`."""


class SizeLimits(Struct, frozen=True, forbid_unknown_fields=True, dict=True):
    """Limits in pixels; None if unknown.

    multiple: of each side. min, max: of a side. min_pixels, max_pixels: of the area. ratio: long side to short side, at
    most. list: the only sizes, as `1024x768`.
    """

    multiple: int | None = None
    min: int | None = None
    max: int | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    ratio: Decimal | None = None
    list: tuple[str, ...] | None = None

    @cached_property
    def listed(self) -> frozenset[tuple[int, int]]:
        """The sizes of the list."""
        return frozenset(map(parse_size, self.list or ()))

    @property
    def most_pixels(self) -> int | None:
        """Largest area, as far as the limits state one."""
        if self.list:
            return max(width * height for width, height in self.listed)
        if self.max_pixels is None and self.max is not None:
            return self.max**2
        return self.max_pixels

    def allows(self, width: int, height: int) -> bool:
        if self.list:
            return (width, height) in self.listed
        step, low, high, area = self.multiple, self.min, self.max, width * height
        if step is not None and (width % step or height % step):
            return False
        if (low is not None and (width < low or height < low)) or (
            high is not None and (width > high or height > high)
        ):
            return False
        if (self.min_pixels and area < self.min_pixels) or (self.max_pixels and area > self.max_pixels):
            return False
        return self.ratio is None or max(width, height) <= self.ratio * min(width, height)

    def nearest(self, width: int, height: int) -> tuple[int, int]:
        """Return the allowed size that is nearest: each side for itself, then the shape, then the area."""
        if self.list:
            return min(sorted(self.listed), key=lambda size: _distance(size, (width, height)))
        sides = self._side(width), self._side(height)
        for _ in range(_MAX_ROUNDS):
            if self.allows(*sides):
                break
            sides = self._within_area(*self._within_ratio(*sides))
        return sides

    def broken_rules(self, width: int, height: int) -> str:
        """Return in words the limits that a size exceeds."""
        if self.list:
            return f"the sizes are {', '.join(self.list)}"
        step, low, high = self.multiple or 1, self.min or 1, self.max
        small, large, area = min(width, height), max(width, height), width * height
        rules = {
            f"sides are {low} to {high} pixels" if high else f"sides are at least {low} pixels": small < low
            or (high is not None and large > high),
            f"sides are multiples of {step}": bool(width % step or height % step),
            f"the long side is at most {self.ratio or 0:f} times the short one": self.ratio is not None
            and large > self.ratio * small,
            f"the area is at least {self.min_pixels} pixels": area < (self.min_pixels or 0),
            f"the area is at most {self.max_pixels} pixels": area > (self.max_pixels or area),
        }
        return ", ".join(rule for rule, is_broken in rules.items() if is_broken)

    def _side(self, side: float) -> int:
        """Return the allowed length that is nearest, of two the shorter."""
        step = self.multiple or 1
        low, high = _up(self.min or step, step), _down(self.max, step) if self.max else None
        nearest = max(math.ceil(side / step - 0.5) * step, low)
        return nearest if high is None else min(nearest, high)

    def _within_ratio(self, width: int, height: int) -> tuple[int, int]:
        """Shorten the long side, or lengthen the short one if the long one would be too short."""
        long, short = max(width, height), min(width, height)
        if self.ratio is None or long <= self.ratio * short:
            return width, height
        step = self.multiple or 1
        shorter = _down(short * self.ratio, step)
        if shorter * short >= (self.min_pixels or 0):
            long = shorter
        else:
            short = _up(long / self.ratio, step)
        return (long, short) if width > height else (short, long)

    def _within_area(self, width: int, height: int) -> tuple[int, int]:
        """Scale both sides, so that the shape stays."""
        step, area = self.multiple or 1, width * height
        if self.max_pixels and area > self.max_pixels:
            scale = math.sqrt(self.max_pixels / area)
            return _down(width * scale, step), _down(height * scale, step)
        if self.min_pixels and area < self.min_pixels:
            scale = math.sqrt(self.min_pixels / area)
            return _up(width * scale, step), _up(height * scale, step)
        return width, height


def parse_size(text: str) -> tuple[int, int]:
    """Read `1024x768`. Raises ValueError for anything else."""
    width, cross, height = text.partition("x")
    if not (cross and text.isascii() and width.isdigit() and height.isdigit() and int(width) and int(height)):
        raise ValueError(f"{text[:40]!r} is no size such as 1024x768")
    return int(width), int(height)


def _distance(size: tuple[int, int], other: tuple[int, int]) -> float:
    """Return how much the shape and the area change, as factors; the shape counts twice."""
    across, down = math.log(size[0] / other[0]), math.log(size[1] / other[1])
    return 2 * abs(across - down) + abs(across + down)


def _down(length: float | Decimal, step: int) -> int:
    return max(int(length // step) * step, step)


def _up(length: float | Decimal, step: int) -> int:
    return max(math.ceil(length / step) * step, step)
