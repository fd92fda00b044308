"""Scenes with a sky: ridges, waves, a planet."""

from __future__ import annotations

import math
from itertools import pairwise

from PIL import Image

from imagegen.providers.drawing.canvas import Canvas, Point
from imagegen.providers.drawing.palette import WHITE, Rgb, mix


def ridges(canvas: Canvas) -> None:
    """Draw mountains behind mountains in haze, under a low sun."""
    random, palette = canvas.random, canvas.palette
    night = random.random() < 0.45
    dawn = random.uniform(-0.1, 0.16)
    sky = [part + dawn for part in ((0.04, 0.14, 0.3, 0.5) if night else (0.45, 0.6, 0.78, 0.95))]
    canvas.cover(canvas.gradient([palette.shade(part) for part in sky] + [palette.shade(sky[-1])] * 2))
    if night:
        _stars(canvas, 90)
    sun = (canvas.width * random.uniform(0.2, 0.8), canvas.height * random.uniform(0.16, 0.36))
    _sun(canvas, sun, canvas.unit * random.uniform(0.09, 0.15))
    layers, horizon = random.randint(4, 7), random.uniform(0.3, 0.46)
    haze, deep = (0.48 + dawn, random.uniform(0, 0.12)) if night else (0.72 + dawn / 2, random.uniform(0, 0.3))
    for layer in range(layers):
        near = layer / (layers - 1)
        top = palette.shade(haze + (deep - haze) * near)
        height = canvas.height * (horizon + (0.84 - horizon) * near)
        relief = min(canvas.height * 0.3, canvas.unit * 0.5) * (0.75 - 0.25 * near)
        canvas.polygon(
            _ridge(canvas, height, relief),
            _mist(canvas, height - relief * 0.4, top, mix(palette.shade(haze), top, 0.35 + 0.5 * near)),
        )


def waves(canvas: Canvas) -> None:
    """Draw ribbons of sea, cut from paper, under a round sun."""
    random, palette = canvas.random, canvas.palette
    rising = random.random() < 0.5
    light = random.uniform(0.75, 1.0)
    canvas.cover(canvas.gradient([palette.shade(light), palette.shade(light - 0.14), palette.shade(light - 0.26)]))
    horizon = random.uniform(0.24, 0.42)
    sun = (canvas.width * random.uniform(0.18, 0.82), canvas.height * horizon * random.uniform(0.55, 1.0))
    _sun(canvas, sun, canvas.unit * random.uniform(0.09, 0.19))
    bands, odd = random.randint(6, 10), random.randrange(1, 6)
    calm = random.uniform(0.5, 1.1)
    for band in range(bands):
        near = band / (bands - 1)
        level = canvas.height * (horizon + (0.95 - horizon) * near)
        swell = canvas.unit * calm * random.uniform(0.03, 0.06)
        length = canvas.unit * random.uniform(0.45, 0.9)
        crest = _swell(canvas, level, swell, length, random.uniform(0, math.tau))
        colour = palette.shade(0.72 * (1 - near) if rising else 0.75 - 0.7 * abs(math.sin(near * 4.2)))
        if band == odd:
            colour = palette.accent
        below = [(float(canvas.width), float(canvas.height)), (0.0, float(canvas.height))]
        lifted = [(x, y - canvas.unit * 0.022) for x, y in crest]
        canvas.polygon(lifted + below, palette.shade(0), 0.22)
        canvas.polygon(crest + below, canvas.gradient([mix(colour, WHITE, 0.1), colour, mix(colour, (0, 0, 0), 0.12)]))
        canvas.lines([crest], canvas.unit * 0.004, mix(colour, WHITE, 0.55), 0.7)


def orbit(canvas: Canvas) -> None:
    """Draw a banded planet with a ring and moons."""
    random, palette = canvas.random, canvas.palette
    canvas.cover(canvas.mesh(3, [palette.shade(random.uniform(0, 0.28)) for _ in range(9)]))
    _stars(canvas, 160)
    radius = canvas.unit * random.uniform(0.24, 0.31)
    centre = (canvas.width * random.uniform(0.36, 0.64), canvas.height * random.uniform(0.32, 0.4))
    canvas.glow(centre, radius * 2.6, palette.shade(0.55), 0.75)
    tilt = random.uniform(-0.5, 0.5)
    rings = [(1.45 + 0.13 * i, palette.shade(random.uniform(0.55, 1))) for i in range(random.randint(2, 4))]
    _rings(canvas, centre, radius, tilt, rings, front=False)
    bands = [palette.shade(random.uniform(0.3, 0.95)) for _ in range(random.randint(9, 15))]
    bands[random.randrange(3, len(bands) - 2)] = palette.accent
    around = max(1, round(canvas.height / (2 * radius) * len(bands)))
    sheet = canvas.gradient([bands[i % len(bands)] for i in range(around)])
    canvas.disc(centre, radius, sheet)
    canvas.round_off(centre, radius)
    _rings(canvas, centre, radius, tilt, rings, front=True)
    for _ in range(random.randint(1, 3)):
        angle, far = random.uniform(0, math.tau), radius * random.uniform(1.75, 2.3)
        moon = (centre[0] + far * math.cos(angle), centre[1] + far * 0.6 * math.sin(angle))
        canvas.disc(moon, radius * random.uniform(0.06, 0.16), palette.shade(random.uniform(0.75, 1)))


def _sun(canvas: Canvas, centre: Point, radius: float) -> None:
    light = mix(canvas.palette.accent, WHITE, 0.25)
    canvas.glow(centre, radius * 4.5, light, 0.7)
    canvas.disc(centre, radius, light)


def _stars(canvas: Canvas, count: int) -> None:
    random = canvas.random
    for _ in range(min(count * canvas.width * canvas.height // canvas.unit**2, 600)):
        place = (random.uniform(0, canvas.width), random.uniform(0, canvas.height))
        size = canvas.unit * 0.0012 * random.choice((1, 1, 1, 1.6, 2.4))
        canvas.disc(place, max(size, 0.4), WHITE, random.uniform(0.25, 0.9))


def _mist(canvas: Canvas, level: float, colour: Rgb, foot: Rgb) -> Image.Image:
    """Return a mountain's colour, which fades below the level into the haze of the valley."""
    first = int(10 * level / canvas.height)
    return canvas.gradient([mix(colour, foot, min(max(row - first, 0) / 3, 1.0)) for row in range(12)])


def _ridge(canvas: Canvas, level: float, relief: float) -> list[Point]:
    """Return a mountain line by midpoint displacement, closed at the foot of the image."""
    random = canvas.random
    span, swing = canvas.unit * random.uniform(0.26, 0.42), 0.5
    low = random.randrange(2)
    heights = [
        random.uniform(0.1, 1.0) if number % 2 == low else random.uniform(-1.0, -0.1)
        for number in range(math.ceil(canvas.width / span) + 2)
    ]
    while span > max(canvas.unit / 120, 2.0):
        finer = []
        for left, right in pairwise(heights):
            finer += [left, (left + right) / 2 + random.uniform(-swing, swing)]
        heights, swing, span = [*finer, heights[-1]], swing * 0.5, span / 2
    line = [(i * span, level - relief * 0.5 * height) for i, height in enumerate(heights)]
    return [*line, (line[-1][0], float(canvas.height)), (0.0, float(canvas.height))]


def _swell(canvas: Canvas, level: float, height: float, length: float, phase: float) -> list[Point]:
    step = max(2.0, canvas.unit / 80)
    return [
        (
            i * step,
            level
            + height * math.sin(math.tau * i * step / length + phase)
            + height * 0.45 * math.sin(math.tau * i * step / length * 0.37 + phase * 2),
        )
        for i in range(math.ceil(canvas.width / step) + 1)
    ]


def _rings(
    canvas: Canvas, centre: Point, radius: float, tilt: float, rings: list[tuple[float, Rgb]], *, front: bool
) -> None:
    start = 0.0 if front else math.pi
    for reach, colour in rings:
        path = []
        for step in range(61):
            angle = start + math.pi * step / 60
            x, y = radius * reach * math.cos(angle), radius * reach * 0.26 * math.sin(angle)
            path.append(
                (
                    centre[0] + x * math.cos(tilt) - y * math.sin(tilt),
                    centre[1] + x * math.sin(tilt) + y * math.cos(tilt),
                )
            )
        canvas.lines([path], radius * 0.045, colour, 0.85)
