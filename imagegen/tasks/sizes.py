"""Sizes that are named by an aspect ratio and a resolution."""

from __future__ import annotations

import math

MAX_RATIO = 8
"""Of the longer side to the shorter one."""

_SIDES = {"512": 512, "1K": 1024, "2K": 2048, "4K": 4096}
_MULTIPLE = 16
"""What every provider takes."""


def sides_of(aspect_ratio: str, resolution: str = "1K") -> tuple[int, int] | None:
    """Return width and height of a ratio `W:H`, with about the area of the resolution's square; None if it is too long.

    Multiples of 16 pixels.
    """
    across, _, down = aspect_ratio.partition(":")
    wide, high = int(across), int(down)
    if max(wide, high) > MAX_RATIO * min(wide, high):
        return None
    side, root = _SIDES[resolution], math.sqrt(wide / high)
    return round(side * root / _MULTIPLE) * _MULTIPLE, round(side / root / _MULTIPLE) * _MULTIPLE
