"""Letters: the font of a character, the mark for a missing one, and line breaks."""

from __future__ import annotations

import unicodedata
from functools import lru_cache
from itertools import groupby
from pathlib import Path

from msgspec import Struct
from PIL import ImageDraw, ImageFont

from imagegen.providers.drawing.palette import Rgb

_FONTS = Path(__file__).with_name("fonts")
_FONT_FILES = ("inter-medium-subset.otf", "droid-sans-fallback-subset.ttf")
_EAST_ASIAN = 1
_NO_LINE_STARTS_WITH = "，。、；：？！）】》」』”’…·,.;:?!)]}%"
_UNSEEN = {"Cc", "Cf", "Cs", "Mn", "Me", "Sk"}


def readable(text: str) -> str:
    """Return the text in characters that the fonts have: an emoji becomes its name, any other its code point."""
    shown = []
    for character in unicodedata.normalize("NFC", text):
        if character.isspace():
            shown.append(" ")
        elif _font_of(character) is not None:
            shown.append(character)
        elif unicodedata.category(character) not in _UNSEEN:
            shown.append(_stand_in(character))
    return " ".join("".join(shown).split())


class TextLines(Struct, frozen=True):
    """Text broken to fit: size in pixels, a whole word to a line or cut, all of it or with an ellipsis."""

    size: int
    rows: tuple[str, ...]
    whole: bool

    @property
    def leading(self) -> int:
        """From one baseline to the next, pixels."""
        return round(self.size * 1.28)

    @property
    def width(self) -> float:
        """Of the longest line, pixels."""
        return max(text_width(row, self.size) for row in self.rows)


def fit(text: str, sizes: range, width: float, height: float) -> TextLines:
    """Return the text at the largest size at which it fits; at the smallest it is cut with an ellipsis."""
    for size in sizes:
        lines = broken(text, size, width, max(1, int(height / (size * 1.28))))
        if lines.whole:
            return _even(text, lines, width)
    size = sizes[-1]
    lines = broken(text, size, width, max(1, int(height / (size * 1.28))), cut_words=True)
    if lines.whole:
        return lines
    last = lines.rows[-1]
    while last and text_width(last + "…", size) > width:
        last = last[:-1]
    return TextLines(size, (*lines.rows[:-1], last.rstrip(_NO_LINE_STARTS_WITH + " ") + "…"), whole=False)


def _even(text: str, lines: TextLines, width: float) -> TextLines:
    """Return the same number of lines, about equally long, so that the last one is no single word."""
    narrow, wide = width / 2, width
    while len(lines.rows) > 1 and wide - narrow > lines.size / 2:
        middle = (narrow + wide) / 2
        trial = broken(text, lines.size, middle, len(lines.rows))
        if trial.whole:
            lines, wide = trial, middle
        else:
            narrow = middle
    return lines


def broken(text: str, size: int, width: float, most: int, *, cut_words: bool = False) -> TextLines:
    """Return the first `most` lines of the text; they are `whole` if that is all and no word had to be cut."""
    rows = [""]
    for word in _words(text):
        if text_width(rows[-1] + word.rstrip(), size) <= width:
            rows[-1] += word
            continue
        if text_width(word.rstrip(), size) > width and not cut_words:
            return TextLines(size, tuple(rows[:most]), whole=False)
        rows.extend(_pieces(word, size, width))
        if len(rows) > most + 1:
            break
    rows = [row.strip() for row in rows if row.strip()]
    return TextLines(size, tuple(rows[:most]), whole=len(rows) <= most)


def text_width(text: str, size: int) -> float:
    """Return the width of a text in pixels."""
    return sum(_advance(character, size) for character in text)


def write(draw: ImageDraw.ImageDraw, start: tuple[float, float], text: str, size: int, fill: Rgb) -> None:
    """Draw one line. start: the left end of its baseline."""
    x, y = start
    for number, run in groupby(text, lambda character: _font_of(character) or 0):
        part = "".join(run)
        draw.text((x, y), part, fill=fill, font=_font(number, size), anchor="ls")
        x += text_width(part, size)


def _words(text: str) -> list[str]:
    """Return the parts between which a line may break: words with the space behind them, and East Asian characters."""
    words: list[str] = []
    joined = False
    for character in text:
        alone = _font_of(character) == _EAST_ASIAN and not _is_hangul(character)
        if words and ((joined and not alone) or character in _NO_LINE_STARTS_WITH or character == " "):
            words[-1] += character
        else:
            words.append(character)
        joined = character != " " and not alone
    return words


def _is_hangul(character: str) -> bool:
    return "\uac00" <= character <= "\ud7a3"


def _pieces(word: str, size: int, width: float) -> list[str]:
    pieces = [""]
    for character in word:
        if pieces[-1] and text_width(pieces[-1] + character, size) > width and character != " ":
            pieces.append("")
        pieces[-1] += character
    return pieces


def _stand_in(character: str) -> str:
    name = unicodedata.name(character, "")
    if name and unicodedata.category(character) == "So":
        return f" :{name.lower()}:"
    return f" {ord(character):04X} "


@lru_cache(maxsize=4096)
def _font_of(character: str) -> int | None:
    """Return the number of the first font with the character; None if no font has it."""
    for number in range(len(_FONT_FILES)):
        if character == " " or _shape(character, number) != _blank(number):
            return number
    return None


def _shape(character: str, number: int) -> bytes:
    return bytes(_font(number, 16).getmask(character))


@lru_cache(maxsize=len(_FONT_FILES))
def _blank(number: int) -> bytes:
    """Return what a font draws for a character that it lacks; no font has U+FFFF."""
    return _shape("\uffff", number)


@lru_cache(maxsize=8192)
def _advance(character: str, size: int) -> float:
    return _font(_font_of(character) or 0, size).getlength(character)


@lru_cache(maxsize=32)
def _font(number: int, size: int) -> ImageFont.FreeTypeFont:
    """Return a font without a shaper, so that a line looks the same on every machine."""
    return ImageFont.truetype(_FONTS / _FONT_FILES[number], size, layout_engine=ImageFont.Layout.BASIC)
