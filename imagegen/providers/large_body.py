"""Large answers: their base64 images stay where they are in the body, and are decoded when they are saved."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import orjson
from msgspec import Raw, Struct

from imagegen.byte_budget import ByteBudget
from imagegen.tasks.image import ImageBase64

LARGE_BYTES = 256 * 1024
"""A smaller body is read as a whole: its images are small as well."""

_HEAD_BYTES = 4_096
_ABSENT = Raw()


class LargeBody(bytearray):
    """The body of an answer, counted in a budget for as long as it, or an image in it, is referred to."""

    budget: ByteBudget | None = None

    def __del__(self) -> None:
        if self.budget is not None:
            self.budget.give(len(self))


def load_json(body: bytes | bytearray) -> object:
    """Parse a body. Raises orjson.JSONDecodeError."""
    return orjson.loads(body if type(body) is bytes else memoryview(body))  # it takes no subclass of bytearray


class _Entry(Struct, gc=False):
    b64_json: Raw = _ABSENT
    base64: Raw = _ABSENT
    image: Raw = _ABSENT
    url: Raw = _ABSENT


class _Entries(Struct):
    data: list[_Entry] | None = None
    images: list[_Entry] | None = None


class _Texts(Struct):
    data: list[Raw] | None = None
    images: list[Raw] | None = None


_read_entries = msgspec.json.Decoder(_Entries).decode
_read_texts = msgspec.json.Decoder(_Texts).decode


def large_items(body: bytes | bytearray) -> list[object] | None:
    """Return the entries of a large answer; None if it has no list of them, or is not JSON.

    An entry is a dict with the fields that an image may be in, or a text. A text of base64 is an ImageBase64.
    """
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


def _listed(answer: _Entries | _Texts, read: Callable[..., object]) -> list[object] | None:
    entries = answer.data or answer.images
    return [read(entry) for entry in entries] if entries else None


def _fields(entry: _Entry) -> dict[str, object]:
    values = (("b64_json", entry.b64_json), ("base64", entry.base64), ("image", entry.image), ("url", entry.url))
    return {name: _value(raw) for name, raw in values if len(raw)}


def _value(raw: Raw) -> object:
    """Return a long text as base64 in place, and anything else decoded."""
    view = memoryview(raw)
    if len(view) <= LARGE_BYTES or view[0] != ord('"'):
        return msgspec.json.decode(raw)
    head = bytes(view[:_HEAD_BYTES])
    if b"\\" in head:  # escaped slashes or line ends: all of it has them
        text = "".join(msgspec.json.decode(raw, type=str).split()).encode()
        view, head = memoryview(text), text[:_HEAD_BYTES]
    else:
        view = view[1:-1]
        head = head[1:]
    if head[:5].lower() == b"data:":
        start, comma, _ = head.partition(b",")
        if not comma or not start.lower().endswith(b";base64"):
            return None
        view = view[len(start) + 1 :]
    return ImageBase64(view)
