"""Card in a sandbox image: the prompt's words, and the mark of a sandbox."""

from __future__ import annotations

from msgspec import Struct
from PIL import Image, ImageDraw, ImageFilter

from imagegen.providers.drawing.canvas import Canvas
from imagegen.providers.drawing.lettering import TextLines, fit, readable, text_width, write
from imagegen.providers.drawing.palette import WHITE, mix

_MARKS = ("imagegen sandbox", "sandbox")
_MAX_PROMPT_CHARS = 2_000
"""More never fits at a size that can be read."""


class Card(Struct, frozen=True):
    """Place and content of the card, in pixels."""

    left: int
    top: int
    right: int
    bottom: int
    padding: int
    lines: TextLines
    mark: str
    mark_size: int


def lay_out(width: int, height: int, prompt: str) -> Card:
    """Return the card of an image of this size: bottom left, no larger than its words need."""
    unit = min(width, height)
    margin, padding = max(2, round(unit * 0.04)), max(3, round(unit * 0.036))
    max_text_width = min(width - 2 * (margin + padding), max(unit * 1.4, 220))
    share = min(0.8, max(0.42, 0.42 + (200 - height) / 350))
    mark_size = max(7, round(unit * 0.025))
    max_text_height = height * share - 2 * padding - mark_size * 1.5
    smallest = max(9, round(unit * 0.026))
    largest = max(smallest + 2, round(min(unit * 0.074, height * 0.3)))
    step = max(1, (largest - smallest) // 8)
    sizes = range(largest, smallest - 1, -step)
    lines = fit(readable(prompt[:_MAX_PROMPT_CHARS]) or "…", sizes, max_text_width, max(max_text_height, smallest))
    mark = next((m for m in _MARKS if text_width(m, mark_size) <= max_text_width), _MARKS[-1])
    needs_x = max(lines.width, text_width(mark, mark_size))
    needs_y = len(lines.rows) * lines.leading + mark_size * 1.5
    top = height - margin - 2 * padding - round(needs_y)
    right = margin + 2 * padding + round(needs_x) + 1
    return Card(margin, max(top, 0), min(right, width - margin), height - margin, padding, lines, mark, mark_size)


def blur_card(canvas: Canvas, card: Card) -> None:
    """Draw dark frosted glass: the scene shines through, and white letters are readable on it."""
    box = (card.left, card.top, card.right, card.bottom)
    size = (card.right - card.left, card.bottom - card.top)
    below = canvas.image.crop(box)
    small = below.resize((max(size[0] // 8, 2), max(size[1] // 8, 2)), Image.Resampling.BOX)
    soft = small.filter(ImageFilter.GaussianBlur(3)).resize(size, Image.Resampling.BICUBIC)
    dark = Image.new("RGB", size, mix(canvas.palette.shade(0), (0, 0, 0), 0.35))
    glass = Image.blend(soft, dark, 0.74)
    mask = Image.new("L", (size[0] * 2, size[1] * 2))
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, size[0] * 2 - 1, size[1] * 2 - 1), canvas.unit * 0.05, fill=255)
    canvas.image.paste(glass, box, mask.reduce(2))


def write_words(canvas: Canvas, card: Card) -> None:
    """Write the prompt's words in white, and the mark below them."""
    draw = ImageDraw.Draw(canvas.image)
    left = card.left + card.padding
    baseline = card.bottom - card.padding
    write(draw, (left, baseline), card.mark, card.mark_size, mix(canvas.palette.accent, WHITE, 0.55))
    baseline -= round(card.mark_size * 1.5) + round(card.lines.size * 0.28)
    for row in reversed(card.lines.rows):
        write(draw, (left, baseline), row, card.lines.size, WHITE)
        baseline -= card.lines.leading
