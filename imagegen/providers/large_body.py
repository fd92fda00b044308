"""Large answers: their base64 images stay where they are in the body, and are decoded when they are saved."""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec
import orjson
from msgspec import Raw, Struct

from imagegen.byte_budget import ByteBudget
from imagegen.formats import declares_base64
from imagegen.tasks.image import ImageBase64

LARGE_BYTES = 256 * 1024
"""A smaller body is read as a whole: its images are small as well."""

MAX_VALUES = 2**17
"""Values of one JSON text. Large responses have few of them, and each takes up to 200 bytes of memory."""

MAX_IMAGES_READ = 100
"""Entries of an answer that are looked at, of every provider: no call is for more than 16 images."""

_HEAD_BYTES = 4_096
_ABSENT = Raw()
_MAX_TEXTS = 4_096
_MAX_ESCAPED_QUOTES = 1_024
_BACKSLASH = ord("\\")
_FIELDS = ("b64_json", "base64", "image", "url")
_START_BYTES = 64
_BEFORE_JSON = b"\xef\xbb\xbf\xfe\xff\0 \t\r\n"
"""Byte order marks, halves of characters in UTF-16 and UTF-32, white space."""

_TOO_MANY_DIGITS = 19
_PLACEHOLDER_TEXT = f"large text {secrets.token_hex(12)} "
_PLACEHOLDER = _PLACEHOLDER_TEXT.encode()


class LargeBody(bytearray):
    """The body of an answer, counted in a budget for as long as it, or an image in it, is referred to."""

    budget: ByteBudget | None = None
    reserved_bytes = 0
    turn: ByteBudget | None = None

    def __del__(self) -> None:
        self.release()

    def release(self) -> None:
        """Return the reserved memory. The traceback of an error would hold a body that no code reads."""
        if self.budget is not None:
            self.budget.give(self.reserved_bytes)
            self.budget, self.reserved_bytes = None, 0
        if self.turn is not None:
            self.turn.give(1)
            self.turn = None

    async def take_turn(self, turns: ByteBudget, within_s: float) -> None:
        """Become the one body that may grow on, after `within_s` seconds also beside another one."""
        if self.turn is None:
            await turns.take(1, within_s)
            self.turn = turns

    def continues(self, source: bytes | bytearray) -> None:
        """Take over the turn of a body that this one is made from."""
        if isinstance(source, LargeBody):
            self.turn, source.turn = source.turn, None

    async def reserve(self, budget: ByteBudget, size_bytes: int, within_s: float) -> None:
        """Reserve memory for `size_bytes` in all. Only the first call waits: a holder of memory must not."""
        missing_bytes = size_bytes - self.reserved_bytes
        if self.budget is None:
            await budget.take(missing_bytes, within_s)
        else:
            budget.try_take(missing_bytes, force=True)
        self.budget, self.reserved_bytes = budget, size_bytes


def has_many_values(body: bytes | bytearray, limit: int = MAX_VALUES) -> bool:
    """Return whether a text may have more than `limit` JSON values: it has as many commas, which base64 has not."""
    at = 0
    for _ in range(limit):
        at = body.find(b",", at) + 1
        if not at:
            return False
    return True


def load_json(body: bytes | bytearray) -> object:
    """Parse a body, leniently if it is not strictly JSON. Raises orjson.JSONDecodeError.

    It may be in UTF-16 or UTF-32, behind a byte order mark, or broken in a few places of its encoding, have numbers
    that JSON has not (they become None) and control characters, and be followed by anything.
    """
    try:
        return orjson.loads(body if type(body) is bytes else memoryview(body))  # it takes no subclass of bytearray
    except orjson.JSONDecodeError as error:
        if not body[:_START_BYTES].lstrip(_BEFORE_JSON).startswith((b"{", b"[")):
            raise
        try:
            return _load_leniently(bytes(body))
        except (ValueError, RecursionError):
            raise error from None


def _load_leniently(body: bytes) -> object:
    """Parse a body. Raises ValueError, RecursionError."""
    text = body.decode(json.detect_encoding(body[:4]), errors="replace").removeprefix("\ufeff").lstrip()
    value, _ = _LENIENT_DECODER.raw_decode(text)
    # halves of surrogate pairs can't be stored
    return orjson.loads(json.dumps(value, ensure_ascii=False).encode(errors="replace"))


def _finite(text: str) -> float | None:
    number = float(text)
    return number if math.isfinite(number) else None


def _whole(text: str) -> float | None:
    return int(text) if len(text) < _TOO_MANY_DIGITS else _finite(text)


_LENIENT_DECODER = json.JSONDecoder(
    strict=False, parse_constant=lambda _name: None, parse_float=_finite, parse_int=_whole
)


def load_object(body: bytes | bytearray) -> dict[str, object] | None:
    """Parse a body as `load_json` does; return None for anything but an object."""
    try:
        value = load_json(body)
    except orjson.JSONDecodeError:
        return None
    return value if isinstance(value, dict) else None


class _ImageEntry(Struct, gc=False):
    b64_json: Raw = _ABSENT
    base64: Raw = _ABSENT
    image: Raw = _ABSENT
    url: Raw = _ABSENT


class _Answer(Struct):
    usage: Raw = _ABSENT
    size: Raw = _ABSENT
    quality: Raw = _ABSENT
    background: Raw = _ABSENT
    output_format: Raw = _ABSENT


class _Entries(_Answer):
    data: list[_ImageEntry] | None = None
    images: list[_ImageEntry] | None = None


class _Texts(_Answer):
    data: list[Raw] | None = None
    images: list[Raw] | None = None


_read_entries = msgspec.json.Decoder(_Entries).decode
_read_texts = msgspec.json.Decoder(_Texts).decode


class LargeAnswer(NamedTuple):
    """Entries of a large answer, and its other fields.

    An entry is a dict with the fields that an image may be in, or a text. A text of base64 is an ImageBase64.
    """

    items: list[object]
    fields: dict[str, object]


class CutObject(NamedTuple):
    """JSON object of a response with a placeholder for each large text; texts: these, as they are in the body."""

    fields: dict[str, object]
    texts: Sequence[memoryview] = ()

    def view(self, value: object) -> memoryview | None:
        """Return the large text that a value is the placeholder of, None if it is none. Its escapes are not decoded."""
        if self.texts and isinstance(value, str) and value.startswith(_PLACEHOLDER_TEXT):
            return self.texts[int(value[len(_PLACEHOLDER_TEXT) :])]
        return None

    def base64(self, value: object) -> object:
        """Return a large text as ImageBase64, None if it is a data URI of something else; any other value unchanged."""
        view = self.view(value)
        return value if view is None else base64_in_place(view)


def cut_object(body: bytes | bytearray) -> CutObject | None:
    """Parse a body with base64 at any place, which is not copied. Return None for anything but an object."""
    cut = _cut_texts(body, with_escapes=True) if len(body) > LARGE_BYTES else None
    if cut is None:
        fields = load_object(body)
        return None if fields is None else CutObject(fields)
    fields = load_object(cut[0])
    return None if fields is None else CutObject(fields, cut[1])


def parse_large(body: bytes | bytearray) -> LargeAnswer | None:
    """Return the entries of a large answer; None if it has no list of them, or is not JSON."""
    cut = _cut_texts(body)
    if cut is not None:
        fields = load_object(cut[0])
        return None if fields is None else _items_of(CutObject(fields, cut[1]))
    try:
        return _listed(_read_entries(body), _fields)
    except msgspec.ValidationError:  # the entries are texts
        pass
    except msgspec.DecodeError:
        return None
    try:
        return _listed(_read_texts(body), _value)
    except msgspec.DecodeError:
        return None


def _cut_texts(body: bytes | bytearray, *, with_escapes: bool = False) -> tuple[bytes, list[memoryview]] | None:
    """Return the body with a placeholder for each large text, and these texts; None if a parser has to read it all.

    Finding the quotes takes a tenth of the time of a parser. Large texts with escapes are left to it unless
    `with_escapes`, and so are bodies of many texts, or with much else in them.
    """
    view, texts = memoryview(body), list[memoryview]()
    parts, begin, start = list[bytes](), 0, body.find(b'"')
    for _ in range(_MAX_TEXTS):
        if start < 0:
            break
        end = _closing_quote(body, view, start)
        if end < 0:
            return None
        if end - start > LARGE_BYTES:
            escaped = not with_escapes and body.find(b"\\", start, end) >= 0
            if escaped or start - begin > LARGE_BYTES:
                return None
            parts.append(bytes(view[begin : start + 1]) + b"%s%d" % (_PLACEHOLDER, len(texts)))
            texts.append(view[start + 1 : end])
            begin = end
        start = body.find(b'"', end + 1)
    if start >= 0 or len(body) - begin > LARGE_BYTES:
        return None
    return b"".join([*parts, view[begin:]]), texts


def _closing_quote(body: bytes | bytearray, view: memoryview, start: int) -> int:
    """Return where a text ends; -1 if it does not, or has many escaped quotes."""
    end = start
    for _ in range(_MAX_ESCAPED_QUOTES):
        end = body.find(b'"', end + 1)
        before = end - 1
        while end > 0 and view[before] == _BACKSLASH:
            before -= 1
        if end < 0 or (end - 1 - before) % 2 == 0:
            return end
    return -1


def _items_of(cut: CutObject) -> LargeAnswer | None:
    entries = cut.fields.get("data") or cut.fields.get("images")
    if not isinstance(entries, list) or not entries:
        return None
    items = [
        {name: cut.base64(entry[name]) for name in _FIELDS if name in entry}
        if isinstance(entry, dict)
        else cut.base64(entry)
        for entry in entries[:MAX_IMAGES_READ]
    ]
    return LargeAnswer(items, cut.fields)


def _listed(answer: _Entries | _Texts, read: Callable[..., object]) -> LargeAnswer | None:
    entries = answer.data or answer.images
    if not entries:
        return None
    other_fields = {name: getattr(answer, name) for name in _Answer.__struct_fields__}
    fields = {name: msgspec.json.decode(raw) for name, raw in other_fields.items() if 0 < len(raw) <= _HEAD_BYTES}
    return LargeAnswer([read(entry) for entry in entries[:MAX_IMAGES_READ]], fields)


def _fields(entry: _ImageEntry) -> dict[str, object]:
    values = (("b64_json", entry.b64_json), ("base64", entry.base64), ("image", entry.image), ("url", entry.url))
    return {name: _value(raw) for name, raw in values if len(raw)}


def _value(raw: Raw) -> object:
    """Return a long text as base64 in place, and anything else decoded."""
    view = memoryview(raw)
    if len(view) <= LARGE_BYTES or view[0] != ord('"'):
        return msgspec.json.decode(raw)
    if b"\\" not in bytes(view[:_HEAD_BYTES]):
        return base64_in_place(view[1:-1])
    # escaped slashes or line ends: all of it has them
    return base64_in_place(memoryview("".join(msgspec.json.decode(raw, type=str).split()).encode()))


def base64_in_place(view: memoryview) -> ImageBase64 | None:
    """Return a large text as base64; None if it is a data URI of something else."""
    head = bytes(view[:_HEAD_BYTES])
    if head[:5].lower() == b"data:":
        start, comma, _ = head.partition(b",")
        if not comma or not declares_base64(start.decode(errors="replace")):
            return None
        view = view[len(start) + 1 :]
    return ImageBase64(view)
