"""Colours of the sandbox's images."""

from __future__ import annotations

import colorsys

from msgspec import Struct

Rgb = tuple[int, int, int]

WHITE: Rgb = (255, 255, 255)


class Palette(Struct, frozen=True):
    """Colours of one image.

    shades: a ramp from the darkest colour to the lightest; accent: a contrast to it.
    """

    shades: tuple[Rgb, ...]
    accent: Rgb

    def shade(self, part: float) -> Rgb:
        """Return a colour of the ramp: 0 is the darkest, 1 the lightest."""
        place = min(max(part, 0.0), 1.0) * (len(self.shades) - 1)
        first = min(int(place), len(self.shades) - 2)
        return mix(self.shades[first], self.shades[first + 1], place - first)

    def turned(self, degrees: float) -> Palette:
        """Return the same palette with its hues moved around the colour wheel."""
        return Palette(tuple(_turned(c, degrees) for c in self.shades), _turned(self.accent, degrees))


def mix(first: Rgb, second: Rgb, part: float) -> Rgb:
    """Return the colour between two: `first` if `part` is 0, `second` if it is 1."""
    return (
        round(first[0] + (second[0] - first[0]) * part),
        round(first[1] + (second[1] - first[1]) * part),
        round(first[2] + (second[2] - first[2]) * part),
    )


def _turned(colour: Rgb, degrees: float) -> Rgb:
    hue, light, saturation = colorsys.rgb_to_hls(*(channel / 255 for channel in colour))
    red, green, blue = colorsys.hls_to_rgb((hue + degrees / 360) % 1, light, saturation)
    return round(red * 255), round(green * 255), round(blue * 255)


def _palette(shades: str, accent: str) -> Palette:
    return Palette(tuple(_rgb(colour) for colour in shades.split()), _rgb(accent))


def _rgb(colour: str) -> Rgb:
    red, green, blue = bytes.fromhex(colour)
    return red, green, blue


PALETTES = (
    _palette("160f33 3b1c5a 7b2d6b c8505f f4935a ffd9a0", "ffe08a"),
    _palette("04202c 0a4d5c 12807e 4fb99f b7e4c7 fdf6d8", "ff8066"),
    _palette("1a0b10 4a1414 8f2413 d9481c f7931e ffe0a3", "fff1c9"),
    _palette("0b1b33 173a63 2f6690 6fa3c0 b9d6e5 f8f1e5", "f4a259"),
    _palette("0e1f19 1f4037 3d6b4f 7fa05a cfd07a fbf3c9", "f2785c"),
    _palette("2a0f24 5a1846 a02c63 e0607e f7a8a0 ffe9df", "ffcf56"),
    _palette("120c3a 2c1f78 5846c9 8f7bf0 c9b8ff fff0f6", "ff9ecb"),
    _palette("2b1c16 5c3a2a 9a6444 d09a67 eacb9c fbf3e3", "3f8f8b"),
    _palette("06152b 0c3b54 0f766e 3fc1a5 a4f0c8 f4ffe8", "ffd166"),
    _palette("241034 57207a b5379a ff6f91 ffb36b fff3b0", "6ee7f0"),
    _palette("0d1117 22303c 48606f 8aa1a8 cfd8d3 f6efe0", "e4572e"),
)
