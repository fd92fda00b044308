"""Bodies of paid calls with input images: multipart or JSON, of fixed length, read while they are sent."""

from __future__ import annotations

import base64
import secrets
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing

import orjson
from msgspec import Struct

from imagegen.providers.protocol import InputImage, unreadable_input

JSON_TYPE = "application/json"
_BOUNDARY = secrets.token_hex(16)
FORM_TYPE = f"multipart/form-data; boundary={_BOUNDARY}"
"""No client sees the boundary of this process, so none can put it into a field or an image."""

_MARK_TEXT = f"input image {secrets.token_hex(12)}"
_MARK = orjson.dumps(_MARK_TEXT)[1:-1]
_NOT_IN_A_NAME = str.maketrans({'"': "%22", "\r": "%0D", "\n": "%0A"})
"""https://html.spec.whatwg.org/multipage/form-control-infrastructure.html#multipart-form-data"""


class Base64Image(Struct, frozen=True):
    """Image as a base64 text in JSON, behind a prefix."""

    image: InputImage
    prefix: str = ""

    @property
    def size_bytes(self) -> int:
        return len(self.prefix) + (self.image.size_bytes + 2) // 3 * 4

    async def read(self) -> AsyncGenerator[bytes, None]:
        """Yield the text in pieces."""
        yield self.prefix.encode()
        rest = b""
        async with aclosing(self.image.read()) as pieces:
            async for piece in pieces:
                data = rest + piece if rest else piece
                whole = len(data) // 3 * 3
                rest = data[whole:]
                yield base64.b64encode(memoryview(data)[:whole])
        yield base64.b64encode(rest)


def as_data_uri(image: InputImage) -> Base64Image:
    """Return the image as a `data:` URI."""
    return Base64Image(image, f"data:{image.content_type};base64,")


def link_or_data_uri(image: InputImage | str) -> Base64Image | str:
    """Return a link unchanged, and an image as a `data:` URI."""
    return image if isinstance(image, str) else as_data_uri(image)


class StreamedBody:
    """Body of bytes and images, in order."""

    def __init__(self, parts: Sequence[bytes | InputImage | Base64Image]) -> None:
        self._parts = parts
        self._length = sum(len(part) if isinstance(part, bytes) else part.size_bytes for part in parts)

    def __len__(self) -> int:
        return self._length

    async def pieces(self) -> AsyncGenerator[bytes, None]:
        """Yield the bytes. Raises UpstreamError if an image has another size than it had."""
        for part in self._parts:
            if isinstance(part, bytes):
                yield part
                continue
            left = part.size_bytes
            async with aclosing(part.read()) as pieces:
                async for piece in pieces:
                    left -= len(piece)
                    if left >= 0:
                        yield piece
            if left:
                raise unreadable_input()


Body = bytes | StreamedBody


def json_body(fields: Mapping[str, object]) -> Body:
    """Return the fields as JSON; each Base64Image in them is a text that is read when it is sent."""
    images: list[Base64Image] = []

    def marked(value: object) -> str:
        if not isinstance(value, Base64Image):
            raise TypeError
        images.append(value)
        return _MARK_TEXT

    text = orjson.dumps(fields, default=marked)
    if not images:
        return text
    first, *rest = text.split(_MARK)
    parts: list[bytes | InputImage | Base64Image] = [first]
    for image, part in zip(images, rest, strict=True):
        parts += [image, part]
    return StreamedBody(parts)


def form_body(fields: Mapping[str, object], files: Sequence[tuple[str, InputImage]]) -> StreamedBody:
    """Return the body of type FORM_TYPE: fields as text, then the files by the names of their fields."""
    parts: list[bytes | InputImage | Base64Image] = []
    head = b"--%b\r\n" % _BOUNDARY.encode()
    for name, value in fields.items():
        parts.append(b'%bContent-Disposition: form-data; name="%b"\r\n\r\n%b\r\n' % (head, _quoted(name), _text(value)))
    for number, (name, image) in enumerate(files):
        kind = image.content_type
        filename = f"image-{number}.{kind.removeprefix('image/')}".encode()
        disposition = b'form-data; name="%b"; filename="%b"' % (_quoted(name), filename)
        start = b"%bContent-Disposition: %b\r\nContent-Type: %b\r\n\r\n" % (head, disposition, kind.encode())
        parts += [start, image, b"\r\n"]
    return StreamedBody([*parts, b"--%b--\r\n" % _BOUNDARY.encode()])


def _quoted(name: str) -> bytes:
    return name.translate(_NOT_IN_A_NAME).encode()


def _text(value: object) -> bytes:
    return value.encode() if isinstance(value, str) else orjson.dumps(value)
