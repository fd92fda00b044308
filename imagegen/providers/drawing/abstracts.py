"""Scenes without a sky: cut paper, silk, facets, tiles."""

from __future__ import annotations

import math
from array import array

from PIL import Image, ImageDraw

from imagegen.providers.drawing.canvas import Canvas, Point
from imagegen.providers.drawing.palette import WHITE, Rgb, mix


def paper(canvas: Canvas) -> None:
    """Draw sheets of cut paper over each other, as the contour lines of a map."""
    random, palette = canvas.random, canvas.palette
    field = canvas.field(random.uniform(2.6, 3.8))
    heights = sorted(array("f", field.resize((32, 32)).tobytes()))
    layers = random.randint(6, 8)
    rising = random.random() < 0.5
    odd = random.randrange(1, layers)
    canvas.cover(canvas.gradient([palette.shade(0.02 if rising else 0.98), palette.shade(0.1 if rising else 0.85)]))
    for layer in range(1, layers + 1):
        part = layer / layers
        colour = palette.accent if layer == odd else palette.shade(part if rising else 1 - part)
        steep = 255 * canvas.unit / 3.0
        edge = heights[len(heights) * layer // (layers + 1)]
        mask = field.point(lambda v, k=steep, e=edge: v * k - e * k).convert("L")
        canvas.shade_under(mask, canvas.unit * 0.016, canvas.unit * 0.012)
        sheet = canvas.gradient([mix(colour, WHITE, 0.07), mix(colour, (0, 0, 0), 0.07)])
        canvas.image.paste(sheet, (0, 0), mask)


def silk(canvas: Canvas) -> None:
    """Draw threads that follow a slow stream."""
    random, palette = canvas.random, canvas.palette
    dark = random.random() < 0.6
    ground = (0.0, 0.22) if dark else (0.86, 1.0)
    canvas.cover(canvas.mesh(3, [palette.shade(random.uniform(*ground)) for _ in range(9)]))
    turns = [(random.uniform(1.2, 3.4), random.uniform(0, math.tau), random.uniform(0.5, 1.1)) for _ in range(4)]
    lean = random.uniform(0, math.tau)
    wide = max(1, canvas.width * canvas.height // canvas.unit**2)
    colours = [palette.shade(part) for part in ((0.35, 0.5, 0.65, 0.8, 1) if dark else (0.1, 0.25, 0.4, 0.55, 0.7))]
    for group, colour in enumerate([*colours, palette.accent]):
        threads = [_thread(canvas, turns, lean) for _ in range(min(wide, 8) * (52 if group < len(colours) else 16))]
        canvas.lines(threads, canvas.unit * random.uniform(0.0025, 0.008), colour, 0.8)


def facets(canvas: Canvas) -> None:
    """Draw a folded sheet of triangles, lit from one side."""
    random, palette = canvas.random, canvas.palette
    colours = [palette.shade(random.random()) for _ in range(16)]
    colours[random.randrange(16)] = palette.accent
    columns, rows = _cells(canvas, random.uniform(8, 13))
    grid = _jittered(canvas, columns, rows)
    small = Image.new("RGB", (4, 4))
    small.putdata(colours)
    tints = small.resize((columns * 2, rows * 2), Image.Resampling.BICUBIC).tobytes()
    fine = 2 if canvas.width * canvas.height <= 1_100_000 else 1
    large = Image.new("RGB", (canvas.width * fine, canvas.height * fine))
    draw = ImageDraw.Draw(large)
    for row in range(rows):
        for column in range(columns):
            four = [grid[row + y][column + x] for x, y in ((0, 0), (1, 0), (1, 1), (0, 1))]
            turn = random.randrange(2)
            for half in (0, 2):
                corners = [four[(turn + half + i) % 4] for i in range(3)]
                start = 3 * ((row * 2 + turn) * columns * 2 + column * 2 + half // 2)
                red, green, blue = tints[start : start + 3]
                light = _lit((red, green, blue), random.gauss(0, 0.11))
                draw.polygon([(x * fine, y * fine) for x, y in corners], fill=light)
    canvas.cover(large.reduce(fine) if fine > 1 else large)


def tiles(canvas: Canvas) -> None:
    """Draw a wall of quarter circles, discs and leaves."""
    random, palette = canvas.random, canvas.palette
    columns, rows = _cells(canvas, random.choice((3, 4, 5)))
    across, down = canvas.width / columns, canvas.height / rows
    inks = [palette.shade(part) for part in (0.0, 0.2, 0.42, 0.62, 0.8, 1.0)] + [palette.accent, palette.accent]
    for row in range(rows):
        for column in range(columns):
            left, top = round(column * across), round(row * down)
            size = (round((column + 1) * across) - left, round((row + 1) * down) - top)
            canvas.image.paste(_tile(canvas, size, inks), (left, top))


def _cells(canvas: Canvas, per_unit: float) -> tuple[int, int]:
    """Return columns and rows of a grid with that many cells along the shorter side."""
    size = canvas.unit / per_unit
    return max(round(canvas.width / size), 1), max(round(canvas.height / size), 1)


def _thread(canvas: Canvas, turns: list[tuple[float, float, float]], lean: float) -> list[Point]:
    x = canvas.random.uniform(-0.1, 1.1) * canvas.width / canvas.unit
    y = canvas.random.uniform(-0.1, 1.1) * canvas.height / canvas.unit
    path = []
    for _ in range(26):
        path.append((x * canvas.unit, y * canvas.unit))
        angle = lean
        for number, (often, phase, strength) in enumerate(turns):
            angle += strength * math.sin(often * (x if number % 2 else y) + phase)
        x, y = x + 0.03 * math.cos(angle), y + 0.03 * math.sin(angle)
    return path


def _jittered(canvas: Canvas, columns: int, rows: int) -> list[list[Point]]:
    across, down, random = canvas.width / columns, canvas.height / rows, canvas.random
    return [
        [
            (
                column * across + (random.uniform(-0.34, 0.34) * across if 0 < column < columns else 0),
                row * down + (random.uniform(-0.34, 0.34) * down if 0 < row < rows else 0),
            )
            for column in range(columns + 1)
        ]
        for row in range(rows + 1)
    ]


def _lit(colour: Rgb, light: float) -> Rgb:
    return mix(colour, WHITE if light > 0 else (0, 0, 0), min(abs(light), 0.5))


def _tile(canvas: Canvas, size: tuple[int, int], inks: list[Rgb]) -> Image.Image:
    random = canvas.random
    ground, ink, dot = random.sample(inks, 3)
    width, height = size[0] * 2, size[1] * 2
    tile = Image.new("RGB", (width, height), ground)
    draw = ImageDraw.Draw(tile)
    match random.randrange(6):
        case 0:
            draw.ellipse((-width, -height, width, height), fill=ink)
        case 1:
            for ring, colour in enumerate((ink, dot, ground)):
                part = 1 - ring / 3
                draw.ellipse((-width * part, -height * part, width * part, height * part), fill=colour)
        case 2:
            draw.ellipse((width * 0.12, height * 0.12, width * 0.88, height * 0.88), fill=ink)
            draw.pieslice((width * 0.12, height * 0.12, width * 0.88, height * 0.88), 0, 180, fill=dot)
        case 3:
            draw.polygon(((0, 0), (width, 0), (0, height)), fill=ink)
        case 4:
            draw.pieslice((-width, 0, width, height * 2), 270, 360, fill=ink)
            draw.pieslice((0, -height, width * 2, height), 90, 180, fill=dot)
        case _:
            draw.ellipse((-width / 2, 0, width / 2, height), fill=ink)
            draw.ellipse((width / 2, 0, width * 1.5, height), fill=dot)
    turned = tile.transpose(random.choice(list(Image.Transpose)))
    return turned.resize(size, Image.Resampling.BOX)
