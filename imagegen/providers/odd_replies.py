"""Search for the images in responses of no usual shape: they are paid for, and a repeat has the same shape. No I/O.

An image may be the body itself, JSON may be wrapped (JSONP, lines of JSON, JSON in a text), links or base64 may be
under any name, and a name may come twice, of which parsers keep the last.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import islice

from imagegen.formats import DATA_URI_HEAD
from imagegen.providers.large_body import has_many_values
from imagegen.tasks.image import ImageBytes

MAX_BODY_BYTES = 2**24
_MAX_VALUES = 1_000
_MAX_NODES = 20_000
_MAX_DEPTH = 8
_MAX_IMAGES = 16
_MAX_NAME_CHARS = 200
"""Of the last names that lead to a text."""

_START_CHARS = 64

_IMAGE_START = re.compile(rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|RIFF....WEBP", re.DOTALL)
_BASE64 = re.compile(rf"(?:{DATA_URI_HEAD}|iVBORw0KGgo|/9j/|UklGR)[A-Za-z0-9+/=\s_%-]{{64}}", re.IGNORECASE)
_LINK = re.compile(r"https?://[^\s\"'<>]{3,4000}", re.IGNORECASE)
MARKDOWN_LINK = re.compile(
    rf"!\[[^\]\n]{{0,500}}\]\(\s*<?(https?://[^\s)<>]{{1,4000}}|{DATA_URI_HEAD}[A-Za-z0-9+/=\s_%-]+)"
)
_IMAGE_FILE = re.compile(r"[^?#]+\.(?:png|jpe?g|webp)(?:[?#]|$)", re.IGNORECASE)
_LINK_NAME = re.compile(r"(?:.*_)?(?:src|data)|.*(?:urls?|uris?|links?|images?|img|outputs?|results?|files?)")
_OTHER_NAME = re.compile(
    r"thumb|preview|input|init|mask|control|source|reference|(?<![a-z])refs?(?:_|\.|image|img|url|$)|origin"
    r"|request|param|config|(?<![a-z])arg|args|prompt"
    r"|avatar|profile|icon|logo|doc|help|poll|status|cancel|webhook|callback"
)
_DRAFT = ("thought", True)
"""Member of a part in which a model of Gemini thinks, also in images: https://ai.google.dev/gemini-api/docs/thinking"""

_JSON_START = re.compile(r'[\[{"]')


class _Members(list[tuple[str, object]]):
    """Members of an object, also those with equal names."""


_DECODER = json.JSONDecoder(object_pairs_hook=_Members, strict=False)


def find_images(body: bytes | bytearray) -> list[ImageBytes | str]:
    """Return the images of a response, as bytes, links or base64, each once. Empty if it has none."""
    if _IMAGE_START.match(body):
        return [ImageBytes(bytes(body))]
    if len(body) > MAX_BODY_BYTES or body[:_START_CHARS].lstrip().startswith(b"<") or has_many_values(body, _MAX_NODES):
        return []
    nodes = (node for value in _values(body.decode(errors="replace")) for node in _nodes(value, ""))
    images = (_storable(image) for name, text in islice(nodes, _MAX_NODES) for image in _images(name, text))
    return list(dict.fromkeys(islice(images, _MAX_IMAGES)))


def _values(text: str) -> Iterator[object]:
    """Yield the JSON values of a text, with any text between them."""
    at = 0
    for _ in range(_MAX_VALUES):
        start = _JSON_START.search(text, at)
        if start is None:
            return
        try:
            value, at = _DECODER.raw_decode(text, start.start())
        except (ValueError, RecursionError):
            return
        yield value


def _nodes(value: object, name: str, depth: int = 0) -> Iterator[tuple[str, str]]:
    """Yield each text with the names that lead to it, also from JSON within a text, but none of a draft."""
    if depth > _MAX_DEPTH:
        return
    if isinstance(value, _Members):
        if _DRAFT in value:
            return
        for key, member in value:
            yield from _nodes(member, f"{name}.{key}"[-_MAX_NAME_CHARS:].lower(), depth + 1)
    elif isinstance(value, list):
        for entry in value:
            yield from _nodes(entry, name, depth + 1)
    elif isinstance(value, str):
        if value[:_START_CHARS].lstrip().startswith(("{", "[")):
            for inner in _values(value):
                yield from _nodes(inner, name, depth + 1)
        else:
            yield name, value


def _storable(text: str) -> str:
    """Return a text without halves of surrogate pairs, which escapes of JSON may be."""
    return text if text.isascii() else text.encode(errors="replace").decode()


def _images(name: str, text: str) -> list[str]:
    """Return the images of a text: itself, or the links of Markdown images in it."""
    if _BASE64.match(text):
        images = [text]
    elif _LINK.fullmatch(text):
        is_image = _IMAGE_FILE.match(text) or _LINK_NAME.fullmatch(name.rpartition(".")[2])
        images = [text] if is_image else []
    else:
        images = MARKDOWN_LINK.findall(text) if "](" in text else []
    return images if images and _OTHER_NAME.search(name) is None else []
